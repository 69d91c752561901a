"""Two gloo processes with unequal shares give the numbers of one process."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_features import TinyFeatures

from smalto.metrics.codebook import CodebookUsage
from smalto.metrics.image import PSNR
from smalto.metrics.rules import Rules
from smalto.metrics.suite import GenerationMetrics

RULES = Rules(split_size=1000, kid_subsets=2, kid_subset_size=20)
SPLITS = {"uneven": (50, 130), "idle": (0, 0)}  # images of rank 0: real, generated


def images(n, seed):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(n, 1, 1, 1, generator=generator)
    image = (torch.rand(n, 3, 16, 16, generator=generator) * scale * 255).to(torch.uint8)
    return image, (scale.flatten() * 3).long()


def measure(real, fake, batch=40):
    metrics = GenerationMetrics(features=TinyFeatures(), num_classes=3, rules=RULES)
    # Reference first, generated images after: the order in which training callbacks work.
    for image, label in zip(*(t.split(batch) for t in real), strict=True):
        if len(image):
            metrics.update_real(image, label)
    reference = metrics.finish_real(images="both")
    for image, label in zip(*(t.split(batch) for t in fake), strict=True):
        if len(image):
            metrics.update_fake(image, label)
    first = metrics.compute().values
    assert metrics.compute().values == first  # computing does not consume anything
    usage, psnr = CodebookUsage(codebook_size=4), PSNR()
    usage.update(fake[1])
    if len(fake[0]):
        psnr.update(fake[0], fake[0] // 2)
    extra = {"usage": float(usage.compute()["entropy"]), "psnr": float(psnr.compute())}
    return first | extra, reference


def worker(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for name, cuts in SPLITS.items():
        sides = zip((images(150, 1), images(180, 2)), cuts, strict=True)
        mine = [tuple(t[:cut] if rank == 0 else t[cut:] for t in side) for side, cut in sides]
        values, reference = measure(*mine)
        torch.save((values, reference.gaussian.n, reference.pool), f"{folder}/{name}{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path, free_port):
    mp.spawn(worker, args=(free_port, str(tmp_path)), nprocs=2)
    expected, reference = measure(images(150, 1), images(180, 2))
    for file in (f"{name}{rank}.pt" for name in SPLITS for rank in range(2)):
        values, n, pool = torch.load(tmp_path / file, weights_only=True)
        assert n == 150, file
        torch.testing.assert_close(pool, reference.pool)  # same order: ranks are concatenated
        # A float32 feature's last bit may depend on its row in a chunk; what is summed up in float64 does not.
        assert values == pytest.approx(expected, rel=1e-8), file
