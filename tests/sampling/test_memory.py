"""A batch that memory does not hold is refused with the numbers that help."""

import pytest
import torch

from smalto.sampling import memory
from smalto.sampling.memory import bytes_per_image, check_batch, free_bytes


def test_a_batch_too_large_is_refused_with_the_largest_that_fits(class_gpt, monkeypatch):
    each = bytes_per_image(class_gpt, guided=True, itemsize=4)
    packed = 4 * (sum(p.numel() for p in class_gpt.blocks.parameters()) + class_gpt.output.weight.numel())
    monkeypatch.setattr(memory, "free_bytes", lambda device: packed + 10 * each + each // 2)
    check_batch(class_gpt, 10, guided=True, dtype="fp32")
    with pytest.raises(ValueError, match=r"a batch of 11 images .* the largest batch that fits is 10 \(batch_size"):
        check_batch(class_gpt, 11, guided=True, dtype="fp32")
    check_batch(class_gpt, 11, guided=False, dtype="fp32")
    check_batch(class_gpt, 11, guided=True, dtype="fp32", packed=True)
    check_batch(class_gpt, 11, guided=True, dtype="bf16")
    check_batch(class_gpt, 11, guided=True, dtype="fp32", held=each)
    monkeypatch.setattr(memory, "free_bytes", lambda device: packed)
    with pytest.raises(ValueError, match="not even one image fits"):
        check_batch(class_gpt, 1, guided=True, dtype="fp32")
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    check_batch(class_gpt, 10**9, guided=True, dtype="fp32")


def test_the_estimate_holds_the_cache(class_gpt, text_gpt):
    for net in (class_gpt, text_gpt):
        cache = net.new_cache(2)
        held = sum(buffer.nbytes for buffer in cache.keys + cache.values)
        assert held < bytes_per_image(net, guided=True, itemsize=4) < 2**20


def test_free_memory_of_this_machine():
    free = free_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
    assert free_bytes(torch.device("meta")) is None
