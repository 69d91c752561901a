"""The sampling benchmark runs and its contestants compute the same thing."""

import pytest
import torch

from benchmarks import contestants, sampling
from benchmarks.paired import interleave, ratio


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(contestants.SIZES, "tiny", {"dim": 32, "num_layers": 1, "num_heads": 2})
    monkeypatch.setattr(contestants, "CODES", 16)
    with torch.inference_mode():
        yield


def test_a_row_has_every_figure():
    found = sampling.row("tiny", 2, rounds=3, peer=None)
    assert set(found["ms_per_step"]) == {
        "plain fp32",
        "model fp32",
        "engine fp32",
        "engine auto",
        "engine int8",
        "read",
    }
    assert all(value >= 0 for value in found["ms_per_step"].values())
    assert found["against"] == ["plain fp32"]
    assert 0 < found["fp32"] < 100


def test_the_plain_reference_draws_from_the_model(monkeypatch):
    """With nearly all probability on one code, every contestant must find that code."""
    net = contestants.make_model("tiny")
    net.output.weight.mul_(1e4)
    steps = [contestants.plain_step(net, 3), contestants.smalto_step(net, 3), contestants.engine_step(net, 3, "fp32")]
    # At position 0 the plain cache has nothing but zeros before it, as the others are set to.
    for position in (0, 5):
        plain, model, engine = (step(position).flatten() for step in steps)
        assert torch.equal(plain, model)
        assert torch.equal(model, engine)


def test_ratios_are_medians_within_rounds_against_the_better_one():
    seconds = {"a": [1.0, 4.0, 9.0], "b": [2.0, 4.0, 6.0], "slow": [20.0, 40.0, 60.0]}
    assert ratio(seconds, "a", "slow", "b") == 1.0
    calls: list[tuple[str, int]] = []
    interleave({name: lambda i, name=name: calls.append((name, i)) for name in "xy"}, rounds=2)
    assert calls == [("x", 0), ("y", 0), ("x", 0), ("y", 0), ("x", 1), ("y", 1)]
