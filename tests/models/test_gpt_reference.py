"""The generator at sizes without recorded numbers, against the slow reference that reads the authors' names."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from official_files import filled, gpt_shapes
from reference_gpt import cross_entropy, greedy, logits
from smalto.models.gpt import GPT
from smalto.sampling.autoregressive import generate
from smalto.tasks.official import official_name
from smalto.tasks.official_config import Hints, gpt_node
from smalto.tasks.registry import factory
from smalto.types import SamplingConfig


@dataclass(frozen=True)
class Size:
    dim: int
    layers: int
    heads: int
    vocab: int
    side: int
    hidden: int
    classes: int | None = None
    text_dim: int = 0


SIZES = {
    "head size 100, 49 codes, 33 classes": Size(200, 1, 2, 1024, 7, 768, classes=33),
    "head size 32, 64 codes": Size(64, 2, 2, 96, 8, 256, classes=10),
    "head size 100, text": Size(100, 1, 1, 64, 4, 512, text_dim=20),
    "head size 16, text, two layers": Size(32, 2, 2, 48, 3, 256, text_dim=12),
}


class Case:
    def __init__(self, size: Size) -> None:
        conditioning = {"classes": size.classes} if size.classes else {"text_dim": size.text_dim}
        shapes = gpt_shapes(dim=size.dim, layers=size.layers, hidden=size.hidden, vocab=size.vocab, **conditioning)
        official = filled(shapes)
        node = gpt_node(official, Hints(image_size=16 * size.side, num_heads=size.heads), Path("x"))
        self.net: GPT = factory(node, "gpt", where="this test")()
        self.net.load_state_dict({name: official[official_name("gpt", name)] for name in self.net.state_dict()})
        self.net.eval()
        self.weights = {name: value.double().numpy() for name, value in official.items()}
        self.settings = {"num_heads": size.heads, "side": size.side}
        rng = np.random.default_rng(0)
        self.codes = rng.integers(0, size.vocab, (2, size.side**2))
        if size.classes:
            self.condition, self.valid = np.array([0, size.classes - 1]), [None, None]
            self.null = np.array(size.classes)
        else:
            self.valid = [np.arange(120) >= 120 - length for length in (3, 41)]
            self.condition = rng.normal(size=(2, 120, size.text_dim)) * np.array(self.valid)[:, :, None]
            self.condition = self.condition.astype(np.float32)
            self.null = self.weights["cls_embedding.uncond_embedding"]
        self.mask = None if size.classes else torch.from_numpy(np.array(self.valid))

    def reference(self, row: int) -> np.ndarray:
        given = self.codes[row], np.asarray(self.condition[row])
        return logits(self.weights, *given, valid=self.valid[row], **self.settings)


@pytest.fixture(scope="module", params=SIZES)
def case(request) -> Case:
    return Case(SIZES[request.param])


def test_logits_and_loss(case):
    codes = torch.from_numpy(case.codes)
    with torch.inference_mode():
        ours = case.net(codes, torch.from_numpy(case.condition), case.mask)
    for row in range(2):
        expected = case.reference(row)
        assert np.abs(expected - ours[row].numpy()).max() < 1e-4
        loss = F.cross_entropy(ours[row], codes[row]).item()
        assert loss == pytest.approx(cross_entropy(expected, case.codes[row]), abs=1e-5)


@pytest.mark.parametrize(("scale", "interval"), [(1.0, -1), (3.0, -1), (3.0, 1)])
def test_greedy_codes(case, scale, interval):
    count = 5  # the reference starts anew for every code
    ours = generate(
        case.net,
        torch.from_numpy(case.condition),
        sampling=SamplingConfig(cfg_scale=scale, cfg_interval=interval, temperature=0),
        uniforms=torch.zeros(2, case.net.num_codes),
        condition_mask=case.mask,
    )
    guidance = {"scale": scale, "interval": interval, "count": count, "valid": case.valid[1]}
    expected = greedy(case.weights, np.asarray(case.condition[1]), case.null, **guidance, **case.settings)
    assert ours[1, :count].tolist() == expected


def test_gradients_are_the_slope_of_the_reference(case):
    """Along a random direction in all weights at once, the reference's loss changes as our gradient says."""
    codes, condition = torch.from_numpy(case.codes), torch.from_numpy(case.condition)
    net = case.net.double()
    mask = None if case.mask is None else case.mask[:1]
    net.zero_grad()
    F.cross_entropy(
        net(codes[:1], condition[:1].double() if mask is not None else condition[:1], mask)[0], codes[0]
    ).backward()
    rng = np.random.default_rng(1)
    direction = {name: rng.normal(size=value.shape) for name, value in case.weights.items()}
    direction.pop("cls_embedding.uncond_embedding", None)
    slope = sum(
        float((parameter.grad * torch.from_numpy(direction[official_name("gpt", name)])).sum())
        for name, parameter in net.named_parameters()
        if parameter.grad is not None
    )
    trained, step, losses = case.weights, 1e-6, []
    for sign in (1, -1):
        moved = {name: value + sign * step * direction.get(name, 0) for name, value in trained.items()}
        found = logits(moved, case.codes[0], np.asarray(case.condition[0]), valid=case.valid[0], **case.settings)
        losses.append(cross_entropy(found, case.codes[0]))
    net.float()
    # float64 on both sides; central differences of step 1e-6 leave about 1e-8.
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-5, abs=1e-6)
