"""Trainings on the pretended GPU, by the command's own function and in Lightning's own order of hooks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.trainer import call

from gpu_rehearsal.findings import Findings
from gpu_rehearsal.machine import ON_GPU, gpu
from smalto import train
from smalto.data.synthetic import SyntheticImages
from smalto.runtime import compose

EVERY = 4
"""Steps between two of all that happens at intervals: logging, validation, saving, evaluation."""
STEPS = 12
SETTLED = 2
"""First steps, in which optimizers and averages are made."""

QUIET, EVENT, BETWEEN = "step", "step with an event", "between steps"
VALIDATION, EVALUATION, START, END = "validation step", "evaluation", "start", "end"
"""Phases of a training. ``step`` and ``between steps`` repeat a million times: nothing may wait there."""
REPEATED = (QUIET, BETWEEN, VALIDATION)


@contextmanager
def phases(found: Findings) -> Iterator[None]:
    """Tell ``found`` what a training does, by the hooks that Lightning calls."""
    original = call._call_callback_hooks

    def phase_of(step: int, last: int) -> str:
        return EVENT if step < SETTLED or (step + 1) % EVERY == 0 or step + 1 >= last else QUIET

    def hooks(trainer: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "on_train_batch_start":
            found.phase = phase_of(trainer.global_step, trainer.max_steps)
        elif name == "on_validation_batch_start":
            found.phase = VALIDATION
        elif name in ("on_validation_start", "on_validation_epoch_end"):
            found.phase = EVALUATION
        elif name == "on_train_end":
            found.phase = END
        result = original(trainer, name, *args, **kwargs)
        if name == "on_train_batch_end" and found.phase == QUIET:
            found.phase = BETWEEN
        return result

    call._call_callback_hooks = hooks
    try:
        yield
    finally:
        call._call_callback_hooks = original


class Gratings(SyntheticImages):
    """Images of three classes, with the options of images on a disk."""

    def __init__(self, *, path: str, augment: str, flip_prob: float, **options: Any) -> None:
        super().__init__(num_classes=3, num_train=4, num_val=8, **options)
        self.path = None


TRAINER = [f"trainer.max_steps={STEPS}", f"trainer.val_check_interval={EVERY}", f"trainer.log_every_n_steps={EVERY}"]
TRAINER += ["logger=csv", f"callbacks.checkpoint.every_n_steps={EVERY}", "callbacks.throughput.window=4"]
TRAINER += ["callbacks.throughput.peak_tflops=1", f"callbacks.gradient_guard.patience={EVERY}"]
FEATURES = ["features=lite0", "features.size=32", "features.chunk_size=4"]
TOKENIZER = ["task=tokenizer", "tokenizer=demo", "tokenizer.base_channels=8", "tokenizer.z_channels=8", "image_size=32"]
TOKENIZER += ["tokenizer.quantizer.codebook_size=16", "tokenizer.quantizer.codebook_dim=4", "data=synthetic_images"]
TOKENIZER += ["data.num_train=64", "data.num_val=8", "data.batch_size=4", "discriminator.base_channels=8"]
TOKENIZER += ["discriminator.num_layers=1", "task.disc_start=4", "perceptual=squeeze_caffe", "callbacks=tokenizer"]
TOKENIZER_FILE = [word for word in TOKENIZER if not word.startswith(("callbacks", "perceptual", "task.disc_start"))]
TOKENIZER_FILE += ["callbacks=_common", "perceptual=none", "discriminator=none", "trainer.max_steps=2", "logger=none"]
TOKENIZER_FILE = [word for word in TOKENIZER_FILE if not word.startswith("discriminator.")]
GPT = ["task=gpt", "model=nano", "model.dim=32", "model.num_layers=2", "model.num_heads=2", "image_size=32"]
GPT += ["tokenizer=demo", "tokenizer.base_channels=8", "tokenizer.z_channels=8", "tokenizer.quantizer.codebook_size=16"]
GPT += ["tokenizer.quantizer.codebook_dim=4", "model.conditioner.num_classes=3", "data=synthetic_codes"]
GPT += ["data.num_classes=3", "data.num_train=128", "data.num_val=8", "data.batch_size=4"]
GENERATION = ["callbacks=gpt", f"callbacks.generation.every_n_steps={2 * EVERY}", "callbacks.generation.batch_size=4"]
GENERATION += [
    "callbacks.generation.num_samples=6",
    "callbacks.generation.final_num_samples=8",
    "protocol.rules.kid_subsets=0",
]
_REFERENCE = "callbacks.generation.reference"
GENERATION += [f"{_REFERENCE}._target_=gpu_rehearsal.runs.Gratings", f"{_REFERENCE}.path=."]
GENERATION += [f"{_REFERENCE}.num_workers=0", f"{_REFERENCE}.batch_size=4"]
GENERATION += ["callbacks.generation.sheet_classes=2", "callbacks.generation.sheet_columns=2", *FEATURES]
TEXT = ["task=gpt", "conditioner=text", "model.conditioner.text_dim=8", "model.conditioner.num_tokens=3"]
TEXT += ["data=synthetic_text", "callbacks=_common"]


def trained(folder: Path, *words: str) -> Findings:
    """Train on the pretended GPU; what was found."""
    found = Findings()
    config = compose("train", [*TRAINER, *words, *ON_GPU, f"run_dir={folder}"])
    with gpu(found), phases(found):
        train.run(config)
    return found
