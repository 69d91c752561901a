"""What one process does not find must not leave the others waiting for it."""

import time
from functools import partial

import pytest
import torch.distributed as dist
from tiny_features import TinyFeatures

from forked_ranks import run_ranks
from smalto.data.ranks import agreed
from smalto.errors import InputError, MissingFile, UserError
from smalto.evaluation.references import find_reference
from smalto.metrics.rules import Rules
from tiny_pictures import put


def looked_for(rank: int, folder, *, only) -> str:
    dist.init_process_group("gloo", rank=rank, world_size=2)
    start = time.perf_counter()
    path = folder if rank == only else folder / "absent"
    try:
        find_reference(
            path,
            features=TinyFeatures(),
            kind="generation",
            rules=Rules(),
            cache_dir=folder / "cache",
            rank=rank,
            world_size=2,
        )
    except UserError as error:
        return f"{type(error).__name__} {error} after {time.perf_counter() - start < 20}"
    return "found"


@pytest.mark.parametrize("only", [0, 1])
def test_images_that_one_process_does_not_find_end_all(tmp_path, only):
    put(tmp_path, *(f"{i}.png" for i in range(4)))
    told = run_ranks(partial(looked_for, folder=tmp_path, only=only), 2)
    assert told[1 - only].startswith(MissingFile.__name__)
    assert told[only].startswith(f"UserError process {1 - only} stopped: ")
    assert all(text.endswith("after True") for text in told)


def test_alone_nobody_is_asked():
    assert agreed(lambda: 3, world_size=1) == 3
    with pytest.raises(InputError, match="mine"):
        agreed(lambda: (_ for _ in ()).throw(InputError("mine")), world_size=1)
