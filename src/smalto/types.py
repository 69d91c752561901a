"""What crosses a floor: batches, protocols between tasks and callbacks, sampling parameters. Torch only."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict, runtime_checkable

from torch import Tensor

from smalto.errors import InputError

CodeShape = tuple[tuple[int, int], ...]
"""Grids of codes in generation order: ``((16, 16),)`` for a raster model, one entry per scale for next-scale models."""


class ImageBatch(TypedDict):
    """Images as every data module yields them."""

    image: Tensor  # uint8 (B, 3, H, W) in [0, 255]
    label: Tensor  # int64 (B,)


class CodeBatch(TypedDict):
    """Codes with their condition: a class label, or text features."""

    codes: Tensor  # int64 (B, L) in generation order
    label: NotRequired[Tensor]  # int64 (B,)
    text: NotRequired[Tensor]  # float (B, T, C), padding on the left, zeros there
    text_mask: NotRequired[Tensor]  # bool (B, T), True at valid positions


@runtime_checkable
class ImageTokenizer(Protocol):
    """Pixels to codes and back; the only party that knows where a code lies in the plane."""

    codebook_size: int
    code_shape: CodeShape

    def encode(self, image: Tensor) -> Tensor:
        """Float (B, 3, H, W) in [-1, 1] to int64 (B, L)."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Int64 (B, L) to float (B, 3, H, W), about [-1, 1], not clamped."""
        ...


class ReadyTokenizer(Protocol):
    """A tokenizer and what is known of it; ``smalto.tasks.checkpoint.LoadedTokenizer`` is one."""

    @property
    def tokenizer(self) -> Any:
        """A module in eval mode with ``encode``: float (B, 3, S, S) in [-1, 1] to int64 (B, L)."""

    @property
    def codebook_size(self) -> int:
        """All codes are below."""

    @property
    def code_shape(self) -> CodeShape:
        """Grids of codes of an image."""

    @property
    def image_size(self) -> int:
        """Side S of the images it encodes."""

    @property
    def fingerprint(self) -> str:
        """Of the weights."""

    @property
    def path(self) -> str | Path:
        """Of the checkpoint."""


@dataclass(frozen=True)
class SamplingConfig:
    """How codes are drawn from logits.

    Args:
        cfg_scale: classifier-free guidance ``u + s (c - u)``; 1 switches it off and halves the work.
        cfg_interval: guidance acts up to and including decode step ``cfg_interval``; -1 means always.
        temperature: divides the logits, below 1e-5 like 1e-5, as the authors'; 0 takes the most probable code.
        top_k: keep the k largest logits (ties with the k-th are kept); 0 keeps all.
        top_p: keep the smallest set whose probability reaches p; 1 keeps all.
    """

    cfg_scale: float = 1.0
    cfg_interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        problems = []
        if not 1.0 <= self.cfg_scale < math.inf:
            problems.append(f"cfg_scale is {self.cfg_scale}, must be a finite number >= 1 (1 = no guidance)")
        if self.cfg_interval < -1:
            problems.append(f"cfg_interval is {self.cfg_interval}, must be -1 (always) or a step number")
        if not 0 <= self.temperature < math.inf:
            problems.append(f"temperature is {self.temperature}, must be a finite number >= 0 (0 = most probable code)")
        if self.top_k < 0:
            problems.append(f"top_k is {self.top_k}, must be >= 0 (0 = all codes)")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}, must be in (0, 1] (1 = all codes)")
        if problems:
            raise InputError("sampling: " + "; ".join(problems))


class SamplesImages(Protocol):
    """A task that writes images; generation callbacks know nothing else about it."""

    def sample_images(self, condition: Tensor, *, sampling: SamplingConfig, seeds: Tensor) -> Tensor:
        """Class labels (B,) or text features, one int64 seed per image, to uint8 (B, 3, H, W)."""
        ...


class CountsFlops(Protocol):
    """A task that knows the arithmetic of its step; the throughput callback knows nothing else about it."""

    @property
    def tokens_per_image(self) -> int:
        """Codes of an image."""

    @property
    def training_flops(self) -> float:
        """Of one image in a training step, forward and backward, a multiply-add as two."""


class Reconstructs(Protocol):
    """A task that encodes and decodes images; reconstruction callbacks know nothing else about it."""

    codebook_size: int

    def reconstruct(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, 3, H, W) to its reconstruction uint8 (B, 3, H, W) and codes int64 (B, L)."""
        ...
