"""Every task, every callback, every precision for some steps on a pretended GPU, in Lightning's own order of hooks."""

import re

import pytest

from gpu_rehearsal.cases import CASES, NEEDS_TOKENIZER, SLOW
from gpu_rehearsal.findings import FETCH, GENERATOR, MIXED, SEND, Findings
from gpu_rehearsal.runs import BETWEEN, END, EVALUATION, EVENT, QUIET, REPEATED, TOKENIZER_FILE, VALIDATION, trained
from smalto import train
from smalto.runtime import compose

ALLOWED = {
    r"fetch __bool__ at data/transforms.py:to_pixels": "pictures that are not finite are told, once a batch",
    r"send \(\) (float32|int64) at tasks/.*:validation_step": "Lightning's sum of a value, made at its first batch",
}
"""What may wait in a repeated step: a pattern, and the reason. One that is not found any more must go."""


EACH = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A checkpoint of a tokenizer, made on the CPU."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train.run(compose("train", [*TOKENIZER_FILE, f"run_dir={folder}"]))
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="session")
def rehearsed(tmp_path_factory, tokenizer):
    """Findings of a case, trained once."""
    known: dict[str, Findings] = {}

    def run(name: str) -> Findings:
        if name not in known:
            words = [*CASES[name], f"task.tokenizer_ckpt={tokenizer}"] if name in NEEDS_TOKENIZER else CASES[name]
            known[name] = trained(tmp_path_factory.mktemp(name) / "run", *words)
        return known[name]

    return run


@pytest.mark.parametrize("name", EACH)
def test_a_repeated_step_waits_for_nothing(rehearsed, name):
    found = rehearsed(name)
    assert found.of(QUIET, BETWEEN, EVALUATION, END), "the run came to its end, and something of it was seen"
    waits = [line for line in found.of(*REPEATED, kinds=(FETCH, SEND)) if not allowed(line)]
    assert waits == []


@pytest.mark.parametrize("name", EACH)
def test_nothing_mixes_devices(rehearsed, name):
    assert rehearsed(name).of(*rehearsed(name).phases, kinds=(MIXED, GENERATOR)) == {}


def test_what_is_allowed_is_still_there(rehearsed):
    lines = [line for name in set(CASES) - SLOW for line in rehearsed(name).of(*REPEATED, kinds=(FETCH, SEND))]
    assert [pattern for pattern in ALLOWED if not any(re.search(pattern, line) for line in lines)] == []


def allowed(line: str) -> bool:
    return any(re.search(pattern, line) for pattern in ALLOWED)


def test_the_rehearsal_sees_a_fetch_in_a_step(rehearsed, monkeypatch, tmp_path):
    from smalto.tasks.gpt import GPTTask

    step = GPTTask.training_step

    def fetching(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        float(loss)
        return loss

    monkeypatch.setattr(GPTTask, "training_step", fetching)
    found = trained(tmp_path / "run", *CASES["gpt"])
    assert any(line.startswith("fetch __float__ at ") for line in found.of(QUIET))
    assert found.of(QUIET, kinds=(FETCH,)) != rehearsed("gpt").of(QUIET, kinds=(FETCH,))


def test_all_phases_were_seen(tmp_path, monkeypatch):
    """With something to find in each of them."""
    from smalto.callbacks.step_seed import StepSeed

    def fetch(self, trainer, pl_module, *args):
        float(next(pl_module.parameters()).sum())

    for hook in ("on_train_batch_start", "on_train_batch_end", "on_validation_batch_end", "on_train_end"):
        monkeypatch.setattr(StepSeed, hook, fetch, raising=False)
    found = trained(tmp_path / "run", *CASES["gpt"])
    assert {QUIET, EVENT, VALIDATION, EVALUATION, END} <= found.phases
    assert any(phase == QUIET and kind == FETCH for phase, kind, *_ in found.counts)
