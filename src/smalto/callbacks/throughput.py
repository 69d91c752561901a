"""How fast a run is: images, codes and FLOPs per second, share of the machine's peak, memory."""

import resource
import sys
import time
from typing import Any

import lightning as L
import torch

from smalto.errors import InputError
from smalto.nn.peak import peak_tflops as find_peak


class Throughput(L.Callback):
    """Logs the speed of each window of steps, without waiting for the device.

    ``train/images_per_second`` and ``train/codes_per_second`` of all processes, ``train/tflops_per_second`` and
    ``train/mfu`` of one device, ``train/memory_peak_gb``: high-water mark of the device's memory, on a CPU of the
    process. Waiting for data counts; validation, checkpoints and pictures do not. Arithmetic is that of the model
    (``training_flops``), so recomputed activations lower the MFU as they should.

    Args:
        window: steps between two readings.
        peak_tflops: of one device, for the MFU: a number, the name of a device (dense half-precision peak, see
            :data:`smalto.nn.peak.NAMED_TFLOPS`), or None: measured at the start with one matrix product in the
            dtype of the run.
    """

    def __init__(self, *, window: int = 50, peak_tflops: float | str | None = None) -> None:
        if window < 1:
            raise InputError(f"callbacks.throughput.window is {window}, must be at least 1")
        if peak_tflops is not None:
            find_peak(peak_tflops, torch.device("cpu"), torch.float32)  # a wrong name is told before anything is loaded
        self.window = window
        self.peak_tflops = peak_tflops
        self._peak = 0.0
        self._tokens = 0
        self._images = self._steps = 0
        self._flops = self._seconds = 0.0
        self._start = self._end = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Find the peak once; learn when all other callbacks are done with a batch."""
        if not any(isinstance(callback, _Last) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.callbacks.append(_Last(self))  # type: ignore[attr-defined]
        half = trainer.precision in ("bf16-mixed", "bf16-true", "16-true")
        self._peak = 1e12 * find_peak(self.peak_tflops, pl_module.device, torch.bfloat16 if half else torch.float32)
        self._tokens = pl_module.tokens_per_image
        self._restart(pl_module)
        self._end = 0.0

    def _restart(self, pl_module: Any) -> None:
        self._images = self._steps = 0
        self._seconds = 0.0
        self._flops = pl_module.training_flops  # anew: a discriminator may have come

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock; the time since the last batch was spent on waiting for this one."""
        self._start = time.perf_counter()
        if self._end:
            self._seconds += self._start - self._end

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop the clock; log once a window is full, and at the last step."""
        self._seconds += time.perf_counter() - self._start
        self._images += len(next(iter(batch.values())))
        self._steps += 1
        if self._steps == self.window or trainer.global_step == trainer.max_steps:
            self._log(trainer, pl_module)
            self._restart(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """What follows is not training."""
        self._end = 0.0

    def others_began(self) -> None:
        """From here on the run computes."""
        self._start = time.perf_counter()

    def others_done(self) -> None:
        """From here on the run waits for the next batch."""
        self._end = time.perf_counter()

    def _log(self, trainer: L.Trainer, pl_module: Any) -> None:
        rate = self._images / self._seconds
        values = {
            "train/images_per_second": rate * trainer.world_size,
            "train/codes_per_second": rate * trainer.world_size * self._tokens,
            "train/tflops_per_second": rate * self._flops / 1e12,
            "train/mfu": rate * self._flops / self._peak,
            "train/memory_peak_gb": peak_memory(pl_module.device) / 1e9,
        }
        # For the bar and for whoever reads the trainer's metrics; Lightning would send numbers to the device.
        pl_module.log_dict({name: torch.tensor(value) for name, value in values.items()}, logger=False)
        # Past Lightning's log_every_n_steps, which need not meet the ends of windows.
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)


class _Last(L.Callback):
    """Added behind all others: pictures and checkpoints that those make around a batch are not part of it."""

    def __init__(self, throughput: Throughput) -> None:
        self.throughput = throughput

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.throughput.others_began()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.throughput.others_done()


def peak_memory(device: torch.device) -> int:
    """Bytes at the high-water mark: allocated on a GPU, resident of this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts kilobytes, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
