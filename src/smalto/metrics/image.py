"""How close a reconstruction is to its image: PSNR, SSIM and LPIPS on uint8 pairs."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from smalto.errors import InputError


class _MeanOverImages(Metric):
    """Sums of a per-image score and of its square, and the number of images, added over processes."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    min_size = 1
    """Shortest side of an image that has a score."""
    total: Tensor
    square: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("square", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
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
            raise InputError(
                f"got {image.dtype} {tuple(image.shape)} and {other.dtype} {tuple(other.shape)}; "
                f"{type(self).__name__} compares uint8 images of one shape"
            )
        if not len(image):
            return
        score = self.score(image, other).double()
        self.total += score.sum()
        self.square += score.square().sum()
        self.count += image.shape[0]

    def compute(self) -> Tensor:
        """Mean over images, float64 scalar; NaN when no image was seen."""
        return self.total / self.count

    def mean_and_error(self) -> tuple[float, float]:
        """Mean over images and its standard error, NaN where there are too few; all processes call it together."""
        with self.sync_context():
            mean = self.total / self.count
            variance = (self.square / self.count - mean.square()).clamp_min(0) / (self.count - 1).clamp_min(0)
            return float(mean), float(variance.sqrt()) if int(self.count) > 1 else math.nan


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
    min_size = WINDOW

    def __init__(self, *, data_range: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if data_range <= 0:
            raise InputError(f"data_range is {data_range}, must be > 0 (1 for images in [0, 1], 2 as the paper)")
        self.data_range = data_range

    def score(self, image: Tensor, other: Tensor) -> Tensor:
        """See the base class.

        Raises:
            ValueError: an image smaller than the window.
        """
        window = self.WINDOW
        if min(image.shape[-2:]) < window:
            raise InputError(f"SSIM needs images of at least {window} x {window}, got {tuple(image.shape[-2:])}")
        x, y = image.double() / 255, other.double() / 255
        mean_x, mean_y, xx, yy, xy = (F.avg_pool2d(v, window, stride=1) for v in (x, y, x * x, y * y, x * y))
        unbiased = window**2 / (window**2 - 1)
        var_x, var_y = unbiased * (xx - mean_x**2), unbiased * (yy - mean_y**2)
        cov = unbiased * (xy - mean_x * mean_y)
        c1, c2 = (0.01 * self.data_range) ** 2, (0.03 * self.data_range) ** 2
        numerator = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
        return (numerator / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).flatten(1).mean(dim=1)


class LPIPS(_MeanOverImages):
    """Mean perceptual distance (Zhang et al. 2018) of uint8 pairs.

    Args:
        network: float pairs (B, 3, H, W) in [-1, 1] to distances, B in all; its name belongs to the metric's. Not
            part of this metric's state.
    """

    higher_is_better = False

    def __init__(self, *, network: Callable[[Tensor, Tensor], Tensor], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.min_size = getattr(network, "min_size", 1)
        self._network = [network]  # in a list: neither moved, saved nor copied with the metric

    @torch.no_grad()
    def score(self, image: Tensor, other: Tensor) -> Tensor:
        """See the base class."""
        return self._network[0](image / 127.5 - 1, other / 127.5 - 1).flatten()
