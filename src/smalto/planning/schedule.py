"""Steps, epochs, hours and cost of a training."""

from dataclasses import dataclass
from typing import Any

from smalto.errors import InputError

MFU = {"gpt": 0.35, "tokenizer": 0.15}
"""Share of the peak that is assumed when none is given.

By the days that LlamaGen's authors gave for 300 epochs on A100s they reached 0.28 with B, 0.46 with L, 0.35 with XL,
0.24 with XXL and 0.42 with 3B, and 0.16 with the tokenizer. What a run reaches is logged as ``train/mfu``.
"""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long a training lasts, in every unit.

    Args:
        steps_per_epoch: optimizer steps, the last, smaller batch left out.
        steps: in all; None if the config sets no end.
        images_per_step: by all devices.
        tokens_per_image: codes.
    """

    steps_per_epoch: int
    steps: int | None
    images_per_step: int
    tokens_per_image: int

    @property
    def epochs(self) -> float | None:
        """In all."""
        return None if self.steps is None else self.steps / self.steps_per_epoch

    @property
    def tokens(self) -> int | None:
        """Codes that the model is trained on, in all."""
        return None if self.steps is None else self.steps * self.images_per_step * self.tokens_per_image


def find_schedule(trainer: dict[str, Any], *, num_images: int, batch_size: int, tokens_per_image: int) -> Schedule:
    """From ``max_steps`` and ``max_epochs`` of a resolved ``trainer`` node, whichever ends first.

    Raises:
        ValueError: fewer images than a batch.
    """
    accumulate = trainer["accumulate_grad_batches"]
    if num_images < batch_size * accumulate:
        raise InputError(
            f"an epoch has {num_images} images, one step takes data.batch_size={batch_size} x "
            f"trainer.accumulate_grad_batches={accumulate}; lower one of them, or give plan.num_images"
        )
    per_epoch = num_images // batch_size // accumulate
    limits = [trainer["max_steps"]] if trainer["max_steps"] > 0 else []
    if (trainer["max_epochs"] or -1) > 0:
        limits.append(trainer["max_epochs"] * per_epoch)
    return Schedule(
        steps_per_epoch=per_epoch,
        steps=min(limits, default=None),
        images_per_step=batch_size * accumulate,
        tokens_per_image=tokens_per_image,
    )
