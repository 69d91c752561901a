"""After ``to(device)`` no tensor of a metric lies elsewhere: what processes gather must be where NCCL is."""

import pytest
import torch
from tiny_features import TinyFeatures
from torch import Tensor

from smalto.metrics.codebook import CodebookUsage, QueueUsage
from smalto.metrics.likelihood import CodeLikelihood
from smalto.metrics.probe import ClassMeans, ClassProbe
from smalto.metrics.reconstruction import ReconstructionMetrics
from smalto.metrics.suite import GenerationMetrics

META = torch.device("meta")


def tensors(thing, seen=None, place="") -> dict[str, Tensor]:
    """All that can be reached from an object of ours, by the way to it, but for what states start over from."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, type) or place.endswith(("._defaults", "._cache")):
        return {}
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return {place: thing}
    if isinstance(thing, dict):
        parts = {f"{place}[{key}]": value for key, value in thing.items()}
    elif isinstance(thing, (list, tuple, set)):
        parts = {f"{place}[{i}]": value for i, value in enumerate(thing)}
    elif type(thing).__module__.split(".")[0] in ("smalto", "torchmetrics", "torch", "tiny_features"):
        parts = {f"{place}.{key}": value for key, value in getattr(thing, "__dict__", {}).items()}
    else:
        return {}
    return {k: v for name, value in parts.items() for k, v in tensors(value, seen, name).items()}


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator), torch.arange(count) % 3


def measured() -> GenerationMetrics:
    suite = GenerationMetrics(features=TinyFeatures(), num_classes=3)
    suite.update_real(*images(12, 0))
    suite.finish_real()
    return suite


def known() -> GenerationMetrics:
    suite = GenerationMetrics(features=TinyFeatures(), num_classes=3, reference=measured().reference)
    suite.update_fake(*images(12, 1))
    return suite


def reconstruction() -> ReconstructionMetrics:
    metrics = ReconstructionMetrics(features=TinyFeatures(), codebook_size=8)
    metrics.update(images(6, 0)[0], images(6, 1)[0], torch.arange(6).view(6, 1))
    return metrics


def probe() -> ClassProbe:
    return ClassProbe(means=ClassMeans(torch.ones(3, 4), torch.ones(4), torch.ones(3, dtype=torch.int64)))


def queue() -> QueueUsage:
    usage = QueueUsage(codebook_size=4)
    usage.update(torch.arange(4))
    return usage


MAKERS = [
    measured,
    known,
    reconstruction,
    probe,
    CodeLikelihood,
    lambda: CodebookUsage(codebook_size=4),
    queue,
]


@pytest.mark.parametrize("make", MAKERS)
def test_every_tensor_moves(make):
    moved = make().to(META)
    found = tensors(moved)
    assert found
    assert [place for place, tensor in found.items() if tensor.device != META] == []


def test_the_search_sees_what_is_left_behind():
    suite = known()
    suite.to(META)
    suite._frechet._given = measured().reference.gaussian
    assert any(tensor.device != META for tensor in tensors(suite).values())


def test_a_known_reference_counts_where_the_network_is():
    """The class means are gathered with what was generated; both sides must agree on the place."""
    suite = GenerationMetrics(features=TinyFeatures(), num_classes=3, reference=measured().reference).to("cpu")
    suite.update_fake(*images(12, 1))
    values = suite.compute().values
    again = known()
    assert values == again.compute().values


def test_moving_to_where_it_is_keeps_what_was_computed():
    reference = measured().reference
    assert reference.to("cpu") is reference
