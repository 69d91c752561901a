"""Image sets on disk for tests of evaluation."""

import numpy as np
import torch
from PIL import Image


def make_pixels(count: int, *, seed: int, side: int = 16, shift: float = 0.0) -> torch.Tensor:
    """uint8 (N, 3, S, S) with structure that a colour grid sees."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * (1 - shift) + shift
    return (torch.nn.functional.interpolate(coarse, size=(side, side)) * 255).to(torch.uint8)


def write_folder(path, images: torch.Tensor):
    path.mkdir(parents=True)
    for i, pixels in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels).save(path / f"{i:04d}.png")
    return path


def write_npz(path, images: torch.Tensor, **arrays):
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **arrays)
    return path
