"""What is run in both trees: commands of smalto, small enough for seconds, of every family that ``conf/task`` names."""

from dataclasses import dataclass
from pathlib import Path

STEPS = 20
DTYPES = ("fp32", "fp16", "bf16", "int8")

TRAINER = [f"trainer.max_steps={STEPS}", "trainer.val_check_interval=10", "trainer.log_every_n_steps=1", "logger=csv"]
FEATURES = ["features=lite0", "features.size=32"]
TOKENIZER = ["tokenizer=demo", "tokenizer.base_channels=8", "tokenizer.z_channels=16", "image_size=32"]
TOKENIZER += ["tokenizer.quantizer.codebook_size=64", "tokenizer.quantizer.codebook_dim=8"]
GPT = ["task=gpt", "model=nano", "model.dim=48", "model.num_layers=3", "data.batch_size=8"]

TRAININGS: dict[str, dict[str, list[str]]] = {
    "tokenizer": {
        # The discriminator comes half way; losses of all kinds are on.
        "tokenizer": [],
        "tokenizer_ddp": ["trainer.devices=2", "strategy=ddp"],
    },
    "gpt": {
        "gpt": [],
        "gpt_accumulated": ["trainer.accumulate_grad_batches=2", "task.loss_rows=50"],
        "gpt_ddp": ["trainer.devices=2", "strategy=ddp"],
        "gpt_text": ["conditioner=text", "model.conditioner.text_dim=16", "model.conditioner.num_tokens=6"],
    },
}
"""By the name of the task: trainings, and what sets each apart. A task without an entry fails the comparison."""


@dataclass(frozen=True)
class Command:
    """One run of the command line.

    Args:
        name: of it, and of the folder it writes.
        words: what is typed behind ``smalto``.
        needs: name of the command whose output it reads.
        alone: in a process of its own, because it starts others.
    """

    name: str
    words: list[str]
    needs: str | None = None
    alone: bool = False


def families(conf: Path) -> list[str]:
    """Tasks that a tree can train."""
    return sorted(path.stem for path in (conf / "task").glob("[a-z]*.yaml"))


def chosen(found: list[Command], beginning: str) -> list[Command]:
    """Those whose names begin so, and what they need."""
    wanted = {command.name for command in found if command.name.startswith(beginning)}
    for command in reversed(found):
        if command.name in wanted and command.needs:
            wanted.add(command.needs)
    return [command for command in found if command.name in wanted]


def commands(out: Path, tasks: list[str]) -> list[Command]:
    """In the order in which they need each other; everything is written under ``out``.

    Raises:
        SystemExit: a task that nothing is known of here.
    """
    unknown = set(tasks) - set(TRAININGS)
    if unknown:
        raise SystemExit(
            f"same-numbers: no trainings of task={', '.join(unknown)}; add them to tests/same_numbers/cases.py"
        )
    images = str(out / "images")
    prepare = ["prepare", f"out={images}", "resize=pad", "image_size=28", "limit=240", "workers=0", "mlflow=false"]
    found = [Command("images", prepare)]
    for task in sorted(tasks, reverse=True):  # tokenizers first
        for name, own in TRAININGS[task].items():
            words = ["train", *TRAINER, *TOKENIZER, *own, f"hydra.run.dir={out / name}", "trainer.accelerator=cpu"]
            words += _tokenizer(images) if task == "tokenizer" else _generator(out, images, text=name.endswith("text"))
            needs = "images" if task == "tokenizer" else None if name.endswith("text") else "codes"
            found.append(Command(name, words, needs, alone="strategy=ddp" in own))
        if task == "tokenizer":
            words = [
                "extract",
                f"tokenizer_ckpt={_last(out / 'tokenizer')}",
                f"data.path={images}",
                f"out={out / 'codes'}",
            ]
            found.append(Command("codes", [*words, "workers=0", "crops=center", "mlflow=false"], "tokenizer"))
    checkpoint = f"ckpt={_last(out / 'gpt')}"
    for dtype in DTYPES:
        words = [
            "sample",
            checkpoint,
            f"out={out / ('samples_' + dtype)}",
            "num_images=16",
            "mlflow=false",
            "device=cpu",
        ]
        found.append(
            Command(f"samples_{dtype}", [*words, f"engine.dtype={dtype}", "sheet_rows=2", "sheet_columns=2"], "gpt")
        )
    words = [
        "evaluate",
        checkpoint,
        f"out={out / 'evaluation' / 'metrics.json'}",
        f"reference={images}",
        "num_samples=24",
    ]
    words += [*FEATURES, "mlflow=false", "device=cpu", "protocol.rules.kid_subset_size=10", "perceptual=squeeze_caffe"]
    found.append(Command("evaluation", [*words, f"paths.references={out / 'references'}"], "gpt"))
    return found


def _last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def _tokenizer(images: str) -> list[str]:
    words = ["task=tokenizer", "data=images", f"data.path={images}", "data.num_workers=0", "data.batch_size=8"]
    words += ["callbacks=tokenizer", "perceptual=squeeze_caffe", "tokenizer.quantizer.entropy_weight=0.01", *FEATURES]
    return [*words, "discriminator.base_channels=8", "discriminator.num_layers=2", f"task.disc_start={STEPS // 2}"]


def _generator(out: Path, images: str, *, text: bool) -> list[str]:
    if text:
        return [*GPT, "data=synthetic_text", "callbacks=_common"]
    words = [*GPT, "data=codes", f"data.path={out / 'codes'}", f"task.tokenizer_ckpt={_last(out / 'tokenizer')}"]
    words += ["model.conditioner.num_classes=10", "callbacks=gpt", f"callbacks.generation.reference.path={images}"]
    words += ["callbacks.generation.reference.num_workers=0", "callbacks.generation.every_n_steps=10", *FEATURES]
    words += ["callbacks.generation.num_samples=16", "callbacks.generation.final_num_samples=16"]
    return [*words, f"paths.references={out / 'references'}", "protocol.rules.kid_subset_size=10"]
