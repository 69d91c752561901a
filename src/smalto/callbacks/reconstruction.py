"""How well the tokenizer rebuilds validation images: rFID, PSNR, SSIM, codebook usage, a sheet of pairs."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from smalto.callbacks.pictures import log_picture
from smalto.metrics.codebook import CodebookUsage
from smalto.metrics.features import FeatureExtractor
from smalto.metrics.image import PSNR, SSIM
from smalto.metrics.suite import GenerationMetrics
from smalto.sampling.sheet import image_sheet
from smalto.types import ImageBatch


class Reconstruction(L.Callback):
    """Measures every validation on whatever weights it runs with, the averaged ones if the run has them.

    Args:
        features: network behind rFID; its name is part of the metric's.
        ssim_data_range: 1 for images in [0, 1]; the paper's numbers were made with 2.
        sheet_pairs: originals, and their reconstructions below, on the sheet.
    """

    def __init__(self, *, features: FeatureExtractor, ssim_data_range: float = 1.0, sheet_pairs: int = 16) -> None:
        self.features = features
        self.sheet_pairs = sheet_pairs
        self.psnr = PSNR()
        self.ssim = SSIM(data_range=ssim_data_range)
        self.usage: Any = None
        self._suite: Any = None
        self._real_done = False
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Empty all sums; the originals' features are kept from the first validation."""
        device = pl_module.device
        if self._suite is None:
            self._suite = GenerationMetrics(features=self.features, kind="reconstruction")
            self._suite.to(device)
            self.usage = CodebookUsage(codebook_size=pl_module.codebook_size)
        for metric in (self.psnr, self.ssim, self.usage):
            metric.to(device).reset()
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
        image, reconstruction = batch["image"], outputs["reconstruction"]
        self.psnr.update(reconstruction, image)
        self.ssim.update(reconstruction, image)
        self.usage.update(outputs["codes"])
        if not self._real_done:
            self._suite.update_real(image)
        self._suite.update_fake(reconstruction)
        if trainer.is_global_zero and sum(len(a) for a, _ in self._pairs) < self.sheet_pairs:
            self._pairs.append((image, reconstruction))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Compute and log."""
        usage = self.usage.compute()
        values: dict[str, Any] = {"psnr": self.psnr.compute(), "ssim": self.ssim.compute()}
        values |= {f"codebook_{key}": value for key, value in usage.items()}
        values |= self._suite.compute()
        self._suite.reset_fake()
        self._real_done = True
        bar = {"psnr", "codebook_usage"}
        for key, value in values.items():
            number = torch.as_tensor(value, dtype=torch.float32)
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
