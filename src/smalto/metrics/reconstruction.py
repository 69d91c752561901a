"""Everything measured on pairs of images and their reconstructions, in training and in `smalto evaluate`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from smalto.metrics.codebook import CodebookUsage, QueueUsage
from smalto.metrics.features import FeatureExtractor
from smalto.metrics.image import LPIPS, PSNR, SSIM
from smalto.metrics.metric_state import load_metric_state, metric_state
from smalto.metrics.reference import Reference
from smalto.metrics.rules import Rules
from smalto.metrics.scores import Scores
from smalto.metrics.suite import GenerationMetrics


class ReconstructionMetrics:
    """rFID, rsFID, PSNR, SSIM, LPIPS and codebook usage; names without the extractor's belong to no extractor.

    ``codebook_usage`` is over everything seen, ``codebook_queue_usage`` over the last 65,536 codes as in the paper.
    A plain object, see `GenerationMetrics`; several processes update and compute together.

    Args:
        features: the extractor behind rFID.
        perceptual: network behind LPIPS, see `LPIPS`; None leaves it out.
        perceptual_name: name of the metric that it gives, such as ``lpips_vgg``.
        codebook_size: of the tokenizer; None for pairs whose codes are not known.
        ssim_data_range: see `SSIM`.
        reference: statistics of the originals, if they are known already.
        rules: how rFID is computed.
    """

    def __init__(
        self,
        *,
        features: FeatureExtractor,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        perceptual_name: str = "lpips",
        codebook_size: int | None = None,
        ssim_data_range: float = 1.0,
        reference: Reference | None = None,
        rules: Rules | None = None,
    ) -> None:
        self.distribution = GenerationMetrics(
            features=features, kind="reconstruction", reference=reference, rules=rules
        )
        self._pairs: dict[str, PSNR | SSIM | LPIPS] = {"psnr": PSNR(), "ssim": SSIM(data_range=ssim_data_range)}
        if perceptual is not None:
            self._pairs[perceptual_name] = LPIPS(network=perceptual)
        self._too_small: dict[str, str] = {}
        self._usage = None if codebook_size is None else CodebookUsage(codebook_size=codebook_size)
        self._queue = None if codebook_size is None else QueueUsage(codebook_size=codebook_size)

    def to(self, device: torch.device | str) -> "ReconstructionMetrics":
        """Move all sums and the extractor; the perceptual network is the caller's."""
        self.distribution.to(device)
        for metric in self._parts().values():
            metric.to(device)
        return self

    def state(self) -> dict[str, Any]:
        """Everything this process has seen so far, for `torch.save`."""
        parts = {name: metric_state(metric) for name, metric in self._parts().items()}
        return parts | {"distribution": self.distribution.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`, on any device."""
        for name, metric in self._parts().items():
            load_metric_state(metric, state[name])
        self.distribution.load_state(state["distribution"])

    def _parts(self) -> dict[str, Metric]:
        usage = {"usage": self._usage, "queue": self._queue}
        return {**self._pairs, **{name: metric for name, metric in usage.items() if metric is not None}}

    def update(self, image: Tensor, reconstruction: Tensor, codes: Tensor | None = None) -> None:
        """Add pairs, uint8 (B, 3, H, W) both, and their codes int64 (B, L) where they are known."""
        side = min(image.shape[-2:])
        for name, metric in self._pairs.items():
            if side >= metric.min_size:
                metric.update(reconstruction, image)
            else:
                self._too_small[name] = f"needs images of at least {metric.min_size} px, got {side}"
        if self._usage is not None and self._queue is not None and codes is not None:
            self._usage.update(codes)
            self._queue.update(codes)
        if self.distribution.reference is None:
            self.distribution.update_real(image)
        self.distribution.update_fake(reconstruction)

    def compute(self) -> Scores:
        """All of them; closes the side of the originals, which later rounds reuse."""
        scores = Scores()
        for name, metric in self._pairs.items():
            if name in self._too_small:
                scores.missing[name] = self._too_small[name]
            else:
                scores.add(name, *metric.mean_and_error())
        if self._usage is not None and self._queue is not None:
            for key, value in self._usage.compute().items():
                scores.add(f"codebook_{key}", float(value))
            scores.add("codebook_queue_usage", float(self._queue.compute()))
        scores.update(self.distribution.compute())
        return scores

    def reset(self) -> None:
        """Forget the pairs, keep the originals' features."""
        for metric in self._parts().values():
            metric.reset()
        self.distribution.reset_fake()
