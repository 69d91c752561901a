"""How well the tokenizer rebuilds validation images: rFID, PSNR, SSIM, LPIPS, codebook usage, a sheet of pairs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor

from smalto.callbacks.pictures import log_picture
from smalto.data.transforms import Rounding, to_pixels
from smalto.metrics.features import FeatureExtractor
from smalto.metrics.reconstruction import ReconstructionMetrics
from smalto.sampling.sheet import image_sheet
from smalto.types import ImageBatch


class Reconstruction(L.Callback):
    """Measures every validation on whatever weights it runs with, the averaged ones if the run has them.

    Args:
        features: network behind rFID; its name is part of the metric's.
        perceptual: makes the network behind LPIPS, whose name is the metric's; it is not the one that trains, which an
            ablation may have switched off. None leaves LPIPS out.
        ssim_data_range: 1 for images in [0, 1]; the paper's numbers were made with 2.
        rounding: of pixels, see :func:`smalto.data.transforms.to_pixels`.
        sheet_pairs: originals, and their reconstructions below, on the sheet.
    """

    def __init__(
        self,
        *,
        features: FeatureExtractor,
        perceptual: Callable[[], Any] | None = None,
        ssim_data_range: float = 1.0,
        rounding: Rounding = "nearest",
        sheet_pairs: int = 16,
    ) -> None:
        self.features = features
        self.perceptual = perceptual or None  # {} is how a config says none
        self.ssim_data_range = ssim_data_range
        self.rounding: Rounding = rounding
        self.sheet_pairs = sheet_pairs
        self._metrics: ReconstructionMetrics | None = None
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Empty all sums; the originals' features are kept from the first validation."""
        pl_module.to_pixels = partial(to_pixels, rounding=self.rounding)
        if self._metrics is None:
            with torch.random.fork_rng(devices=[]):  # building a network draws numbers that training would get
                network = None if self.perceptual is None else self.perceptual().to(pl_module.device).eval()
            self._metrics = ReconstructionMetrics(
                features=self.features,
                perceptual=network,
                perceptual_name=getattr(network, "name", "lpips"),
                codebook_size=pl_module.codebook_size,
                ssim_data_range=self.ssim_data_range,
            ).to(pl_module.device)
        self._metrics.reset()
        self._pairs = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add one batch."""
        assert self._metrics is not None
        image, reconstruction = batch["image"], outputs["reconstruction"]
        self._metrics.update(image, reconstruction, outputs["codes"])
        if trainer.is_global_zero and sum(len(a) for a, _ in self._pairs) < self.sheet_pairs:
            self._pairs.append((image, reconstruction))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Compute and log."""
        assert self._metrics is not None
        bar = {"psnr", "codebook_usage"}
        for key, value in self._metrics.compute().values.items():
            number = torch.tensor(value, dtype=torch.float32)
            pl_module.log(f"val/{key}", number, prog_bar=key in bar, rank_zero_only=True)
        if trainer.is_global_zero and self._pairs:
            originals = torch.cat([a for a, _ in self._pairs])[: self.sheet_pairs]
            rebuilt = torch.cat([b for _, b in self._pairs])[: self.sheet_pairs]
            both = torch.cat([originals, rebuilt])
            log_picture(
                trainer,
                "sheets/reconstruction",
                image_sheet(both, columns=len(originals), row_names=["original", "rebuilt"]),
            )
