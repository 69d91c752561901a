import pytest
import torch

from smalto.nn.kv_cache import KVCache


@pytest.fixture
def cache() -> KVCache:
    return KVCache(
        num_layers=2, batch_size=4, num_kv_heads=1, max_length=5, head_dim=2, dtype=torch.float32, device="cpu"
    )


def entry(value: float, rows: int = 4, positions: int = 1) -> torch.Tensor:
    return torch.full((rows, 1, positions, 2), value)


def test_returns_everything_filled_so_far(cache):
    cache.update(0, entry(1.0, positions=2), entry(-1.0, positions=2))
    cache.advance(2)
    keys, values = cache.update(0, entry(2.0), entry(-2.0))
    assert keys[0, 0, :, 0].tolist() == [1.0, 1.0, 2.0]
    assert values[0, 0, :, 0].tolist() == [-1.0, -1.0, -2.0]


def test_layers_are_apart_and_do_not_advance_by_themselves(cache):
    cache.update(0, entry(1.0), entry(1.0))
    keys, _ = cache.update(1, entry(7.0), entry(7.0))
    assert cache.length == 0
    assert keys.shape == (4, 1, 1, 2)
    assert (keys == 7).all()


def test_refuses_more_than_it_holds(cache):
    cache.advance(4)
    with pytest.raises(ValueError, match="holds 5 positions, 6"):
        cache.update(0, entry(0.0, positions=2), entry(0.0, positions=2))


def test_keeps_the_first_rows(cache):
    rows = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 1, 2)
    cache.update(1, rows, rows)
    cache.prefix_mask = torch.tensor([[True], [False], [True], [True]])
    cache.advance(1)
    cache.keep_rows(2)
    keys, _ = cache.update(1, entry(9.0, rows=2), entry(9.0, rows=2))
    assert keys[:, 0, :, 0].tolist() == [[0.0, 9.0], [1.0, 9.0]]
    assert cache.prefix_mask.tolist() == [[True], [False]]


def test_reset_starts_from_the_front(cache):
    cache.prefix_mask = torch.ones(4, 1, dtype=torch.bool)
    cache.advance(5)
    cache.reset()
    assert cache.prefix_mask is None
    assert cache.update(0, entry(3.0), entry(3.0))[0].shape[2] == 1
