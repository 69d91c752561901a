import gzip
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import smalto
from smalto.metrics.lite0 import Lite0Features

FOLDER = Path(smalto.__file__).parent / "data" / "fashion_mnist"


def fashion(start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Embedded Fashion-MNIST test images: uint8 (N, 3, 32, 32) and labels."""
    images, classes = (
        gzip.decompress((FOLDER / f"t10k-{name}-ubyte.gz").read_bytes()) for name in ("images-idx3", "labels-idx1")
    )
    pixels = np.frombuffer(images, np.uint8, offset=16)
    labels = np.frombuffer(classes, np.uint8, offset=8)
    image = torch.from_numpy(pixels.reshape(-1, 1, 28, 28)[start:stop].copy())
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2)).repeat(1, 3, 1, 1)
    return padded, torch.from_numpy(labels[start:stop].astype(np.int64))


@pytest.fixture(scope="session")
def real() -> tuple[Tensor, Tensor]:
    return fashion(0, 200)


@pytest.fixture(scope="session")
def held_out() -> tuple[Tensor, Tensor]:
    return fashion(200, 400)


@pytest.fixture(scope="session")
def lite0() -> Lite0Features:
    return Lite0Features(size=64)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
