"""Batches of images from any task that writes images."""

from contextlib import contextmanager

import pytest
import torch

from smalto.sampling.requests import image_seeds
from smalto.sampling.service import draw_images
from smalto.types import SamplingConfig


class Painter:
    """Fills an image with its label and the low bits of its seed; no model."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def sample_images(self, condition, *, sampling, seeds):
        self.batches.append(len(condition))
        values = torch.stack([condition, seeds % 251, torch.zeros_like(seeds)], dim=1)
        return values.to(torch.uint8)[:, :, None, None].expand(-1, -1, 2, 2)


class PreparedPainter(Painter):
    """Says when its weights are held."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    @contextmanager
    def fixed_weights(self):
        self.events.append("held")
        try:
            yield
        finally:
            self.events.append("released")


def draw(task, indices, batch_size=4, classes=(3, 1, 2)):
    arguments = {"sampling": SamplingConfig(), "classes": classes, "seed": 5}
    return draw_images(task, indices=indices, batch_size=batch_size, **arguments)


def test_every_index_once_in_order_with_its_label_and_seed():
    task = Painter()
    batches = list(draw(task, range(10)))
    assert task.batches == [4, 4, 2]
    assert [i for batch in batches for i in batch.indices] == list(range(10))
    labels = torch.cat([batch.labels for batch in batches])
    assert labels.tolist() == [3, 1, 2, 3, 1, 2, 3, 1, 2, 3]
    images = torch.cat([batch.images for batch in batches])
    assert images.shape == (10, 3, 2, 2)
    assert images[:, 0, 0, 0].tolist() == labels.tolist()
    assert images[:, 1, 0, 0].tolist() == (image_seeds(5, range(10)) % 251).tolist()


@pytest.mark.parametrize("indices", [[7], [9, 2, 5, 0, 4], range(1, 10, 3)])
def test_an_image_is_the_same_in_any_selection(indices):
    everything = torch.cat([batch.images for batch in draw(Painter(), range(10))])
    chosen = torch.cat([batch.images for batch in draw(Painter(), indices, batch_size=2)])
    assert torch.equal(chosen, everything[list(indices)])


def test_nothing_is_drawn_ahead():
    task = Painter()
    batches = draw(task, range(1_000_000))
    next(batches)
    assert task.batches == [4]
    assert list(draw(task, [])) == []


def test_weights_are_held_for_all_batches_and_released_however_it_ends():
    task = PreparedPainter()
    list(draw(task, range(10)))
    assert task.events == ["held", "released"]
    batches = draw(task, range(10))
    next(batches)
    batches.close()
    assert task.events == ["held", "released"] * 2


def test_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match="batch_size is 0"):
        next(draw(Painter(), range(3), batch_size=0))
