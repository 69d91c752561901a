"""How close a reconstruction is to its image, pixel by pixel: PSNR and SSIM on uint8 pairs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric


class _MeanOverImages(Metric):
    """Sum of a per-image score and the number of images, added over processes."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def score(self, image: Tensor, other: Tensor) -> Tensor:
        """Score (B,) of uint8 pairs (B, C, H, W)."""
        raise TypeError(f"{type(self).__name__} does not define score(image, other)")

    def update(self, image: Tensor, other: Tensor) -> None:
        """Add pairs of uint8 images (B, C, H, W): the original and its reconstruction.

        Raises:
            ValueError: not uint8, or different shapes.
        """
        if image.dtype != torch.uint8 or other.dtype != torch.uint8 or image.shape != other.shape:
            raise ValueError(
                f"got {image.dtype} {tuple(image.shape)} and {other.dtype} {tuple(other.shape)}; "
                "PSNR and SSIM compare uint8 images of one shape"
            )
        self.total += self.score(image, other).double().sum()
        self.count += image.shape[0]

    def compute(self) -> Tensor:
        """Mean over images, float64 scalar; NaN when no image was seen."""
        return self.total / self.count


class PSNR(_MeanOverImages):
    """Mean over images of each image's peak signal-to-noise ratio in dB, data range 255.

    The mean is over per-image values, as in LlamaGen's evaluation, not the PSNR of the mean error. An exact
    copy would be infinite; its error is taken as one grey level in one value, the smallest there is, so it
    stays the best and the mean stays finite. LlamaGen compares with the unquantised original: its values
    differ in the third digit.
    """

    def score(self, image: Tensor, other: Tensor) -> Tensor:
        """See the base class."""
        error = (image.float() - other.float()).square().flatten(1)
        return psnr_from_mse(error.double().mean(dim=1).clamp_min(1 / error.shape[1]), data_range=255.0)


def psnr_from_mse(mse: Tensor, *, data_range: float) -> Tensor:
    """Mean squared errors to dB."""
    return 10 * torch.log10(data_range**2 / mse)


class SSIM(_MeanOverImages):
    """Structural similarity (Wang et al. 2004) as scikit-image computes it by default, on images in [0, 1].

    That is the protocol of LlamaGen's evaluation: 7 x 7 uniform window, unbiased covariances, windows inside
    the image only, mean over channels. torchmetrics' default (11 x 11 Gaussian) gives other numbers.

    Args:
        data_range: width of the value range; 1 is right for [0, 1]. The paper's tables were made with 2.0,
            which inflates the value: use that only to compare with them.
    """

    WINDOW = 7

    def __init__(self, *, data_range: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if data_range <= 0:
            raise ValueError(f"data_range is {data_range}, must be > 0 (1 for images in [0, 1], 2 as the paper)")
        self.data_range = data_range

    def score(self, image: Tensor, other: Tensor) -> Tensor:
        """See the base class.

        Raises:
            ValueError: an image smaller than the window.
        """
        window = self.WINDOW
        if min(image.shape[-2:]) < window:
            raise ValueError(f"SSIM needs images of at least {window} x {window}, got {tuple(image.shape[-2:])}")
        x, y = image.double() / 255, other.double() / 255
        mean_x, mean_y, xx, yy, xy = (F.avg_pool2d(v, window, stride=1) for v in (x, y, x * x, y * y, x * y))
        unbiased = window**2 / (window**2 - 1)
        var_x, var_y = unbiased * (xx - mean_x**2), unbiased * (yy - mean_y**2)
        cov = unbiased * (xy - mean_x * mean_y)
        c1, c2 = (0.01 * self.data_range) ** 2, (0.03 * self.data_range) ** 2
        numerator = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
        return (numerator / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).flatten(1).mean(dim=1)
