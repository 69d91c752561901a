import threading
import time
from itertools import chain

import numpy as np
import pytest
import torch

from smalto.data.loader import AHEAD, ResumableLoader


def fetch(epoch, indices):
    return {"epoch": torch.full((len(indices),), epoch), "index": torch.from_numpy(np.asarray(indices))}


def loader(*, n=20, batch_size=4, shuffle=True, rank=0, world_size=1, workers=0, seed=0):
    return ResumableLoader(
        fetch=fetch,
        num_samples=n,
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        rank=rank,
        world_size=world_size,
        num_workers=workers,
    )


def indices(source):
    return [batch["index"].tolist() for batch in source]


@pytest.mark.parametrize("workers", [0, 1])
def test_epochs_differ_and_repeat(workers):
    source, again = loader(workers=workers), loader()
    epochs = []
    for epoch in (0, 1, 2):
        source.sampler.set_epoch(epoch)
        again.set_epoch(epoch)
        epochs.append(indices(source))
        assert epochs[-1] == indices(again)
        assert sorted(chain.from_iterable(epochs[-1])) == list(range(20))
        assert len(epochs[-1]) == len(source) == 5
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(("workers", "consumed"), [(0, 0), (0, 1), (0, 3), (0, 5), (1, 2)])
def test_resume_continues_after_what_was_consumed(workers, consumed):
    def start():
        source = loader(workers=workers)
        source.set_epoch(3)
        return source

    unbroken = start()
    expected = indices(unbroken)
    unbroken.set_epoch(4)
    following = indices(unbroken)
    broken = start()
    states = [broken.state_dict() | {"batches": 0}] + [broken.state_dict() for _ in broken]
    state = states[consumed]  # what a checkpoint after so many batches holds
    assert state["batches"] == consumed
    resumed = loader(workers=workers)
    resumed.load_state_dict(state)
    assert len(resumed) == 5  # of the full epoch, also now
    resumed.set_epoch(3 if consumed < 5 else 4)
    rest = expected[consumed:] if consumed < 5 else following
    assert indices(resumed) == rest
    assert resumed.state_dict()["batches"] == 5
    resumed.set_epoch(4)
    assert indices(resumed) == following


def test_an_epoch_set_after_iter_is_seen():
    # Lightning calls iter() first and set_epoch afterwards
    source = loader()
    batches = iter(source)
    source.set_epoch(7)
    assert next(batches)["epoch"].tolist() == [7] * 4


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generator_is_left_alone(workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    indices(loader(workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_global_batches_do_not_depend_on_the_number_of_ranks(world_size):
    ranks = [indices(loader(n=22, batch_size=8, rank=r, world_size=world_size)) for r in range(world_size)]
    merged = [list(chain.from_iterable(parts)) for parts in zip(*ranks, strict=True)]
    assert merged == indices(loader(n=22, batch_size=8))
    assert [len(b) for b in merged] == [8, 8]  # the rest of the epoch is dropped


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [4, 5, 11, 12, 13, 14, 24, 25, 35])
def test_validation_has_every_sample_once_and_equal_batch_counts(n, world_size):
    ranks = [loader(n=n, batch_size=12, shuffle=False, rank=r, world_size=world_size) for r in range(world_size)]
    batches = [indices(rank) for rank in ranks]
    assert len({len(b) for b in batches}) == 1
    assert all(len(rank) == len(b) for rank, b in zip(ranks, batches, strict=True))
    sizes = [[len(part) for part in parts] for parts in zip(*batches, strict=True)]
    assert all(min(s) > 0 and max(s) - min(s) <= 1 for s in sizes)
    assert sorted(i for b in batches for part in b for i in part) == list(range(n))


def test_validation_on_one_process_is_in_order_with_full_batches():
    assert indices(loader(n=10, shuffle=False)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_impossible_sizes_are_explained():
    with pytest.raises(ValueError, match=r"batch_size is 6 for 4 processes"):
        loader(batch_size=6, world_size=4)
    with pytest.raises(ValueError, match=r"3 samples are too few.*needs 4"):
        loader(n=3)
    with pytest.raises(ValueError, match=r"1 samples are too few.*needs 2"):
        loader(n=1, shuffle=False, world_size=2)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU for whoever asks; names of the threads that made pinned memory."""
    threads: list[str] = []

    def pin(tensor):
        threads.append(threading.current_thread().name)
        return tensor

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: threads.append(f"set {device}"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return threads


@pytest.mark.parametrize("consumed", [0, 1, 3, 5])
def test_a_thread_gathers_and_pins_for_a_gpu_and_resumes_as_exactly(monkeypatch, gpu, consumed):
    with monkeypatch.context() as without:
        without.setattr(torch.cuda, "is_available", lambda: False)
        expected = indices(loader())
    source = loader()
    batches = iter(source)
    assert [next(batches)["index"].tolist() for _ in range(consumed)] == expected[:consumed]
    state = source.state_dict()
    assert state["batches"] == consumed  # what the thread has ready does not count
    batches.close()
    resumed = loader()
    resumed.load_state_dict(state)
    assert indices(resumed) == (expected[consumed:] or expected)
    assert gpu[0] == "set 1"  # not the first GPU, which a new thread would take
    assert {name.partition("_")[0] for name in gpu} == {"set 1", "batches"}


def test_the_next_batches_are_made_while_one_is_used_and_no_more_than_that(gpu):
    made = []
    source = loader(n=40)
    plain = source._dataset._fetch
    source._dataset._fetch = lambda *item: (made.append(item), plain(*item))[1]
    batches = iter(source)
    next(batches)
    until = time.monotonic() + 5
    while len(made) < 1 + AHEAD and time.monotonic() < until:
        time.sleep(0.01)
    assert len(made) == 1 + AHEAD
    batches.close()


def test_an_error_in_the_thread_is_that_of_the_batch(gpu):
    source = loader()
    source._dataset._fetch = lambda *item: 1 / 0
    with pytest.raises(ZeroDivisionError):
        next(iter(source))
