"""Runs of the command line on one device, and the numbers they leave."""

import csv
import json
from pathlib import Path

import numpy as np
import torch

from same_numbers.cases import Command, commands
from same_numbers.work import alone, here

DETERMINED = ["model.token_dropout=0", "model.resid_dropout=0", "model.ffn_dropout=0", "model.conditioner.drop_prob=0"]
"""Devices draw other random numbers, so nothing is drawn."""


class Failed(Exception):
    """A command did not come to its end; what it said."""


class Runs:
    """Commands in a folder of their own, on a device.

    Args:
        out: folder.
        device: of all that does not say another.
    """

    def __init__(self, out: Path, device: torch.device) -> None:
        self.out = out
        self.device = device
        self.losses: dict[str, dict[int, float]] = {}
        self.known = {command.name: command for command in commands(out, ["tokenizer", "gpt"])}

    def run(self, name: str, words: list[str], *, several: bool = False) -> Path:
        """Run a command; its folder.

        Raises:
            Failed: it was refused, or broke.
        """
        said = (alone if several else here)(Command(name, words))
        if said:
            raise Failed(said.strip().splitlines()[-1] if said.strip() else name)
        return self.out / name

    def prepare(self) -> None:
        """Images, a tokenizer and its codes: what all others read."""
        for name in ("images", "tokenizer", "codes"):
            words = self.known[name].words
            self.run(name, words if name == "images" else [*words, *self.placed(words[0])])

    def placed(self, verb: str, device: str | None = None) -> list[str]:
        """The words that put a command on a device."""
        kind = device or self.device.type
        accelerator = "gpu" if kind == "cuda" else "cpu"
        return [f"trainer.accelerator={accelerator}"] if verb == "train" else [f"device={kind}"]

    def train(self, like: str, name: str, *words: str, device: str | None = None) -> dict[int, float]:
        """Train one of the tiny configs into ``name``, unless that is done; its losses by step."""
        if name in self.losses:
            return self.losses[name]
        own = [] if like.startswith("tokenizer") else DETERMINED
        known = [
            word for word in self.known[like].words if not word.startswith(("hydra.run.dir", "trainer.accelerator"))
        ]
        several = any(word.startswith("trainer.devices=") for word in words)
        words = (*self.placed("train", device), *own, *words, f"hydra.run.dir={self.out / name}")
        folder = self.run(name, [*known, *words], several=several)
        with (folder / "logs" / "metrics.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
        self.losses[name] = {int(row["step"]): float(row["train/loss"]) for row in rows}
        return self.losses[name]

    def metrics(self, name: str) -> dict[str, float]:
        """What a training ended with."""
        return json.loads((self.out / name / "metrics.json").read_text())

    def sample(self, ckpt: str, name: str, *words: str, device: str | None = None) -> np.ndarray:
        """Pictures uint8 (N, H, W, 3) that a generator draws, in the order of their numbers."""
        wanted = [f"ckpt={self.out / ckpt / 'checkpoints' / 'last.ckpt'}", f"out={self.out / name}", "num_images=16"]
        folder = self.run(name, ["sample", *wanted, "mlflow=false", *self.placed("sample", device), *words])
        with np.load(next(folder.glob("*.npz"))) as arrays:
            return arrays["arr_0"][np.argsort(arrays["index"])]


def furthest(first: dict[int, float], second: dict[int, float]) -> float:
    """The largest relative difference of losses of the same step; infinite where steps are missing."""
    if not first or first.keys() != second.keys():
        return float("inf")
    return max(abs(second[step] - value) / max(abs(value), 1e-6) for step, value in first.items())
