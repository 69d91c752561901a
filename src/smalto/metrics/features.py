"""Frozen networks that turn images into the features every distribution metric is computed from.

A number is only comparable with numbers from the same network at the same input size, so both are part of
`FeatureExtractor.name`, which goes into metric names and reference files.
"""

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from smalto.errors import InputError

SPATIAL_CHANNELS = 7
"""Channels of the intermediate map behind sFID, as in ADM's evaluator."""


@dataclass(frozen=True)
class Features:
    """What one pass over a batch yields, all float32.

    Args:
        pool: (B, D), last spatial feature map averaged over the plane: FID, KID, precision, recall, class probe.
        spatial: (B, S), the first channels of an intermediate map with all its places: sFID.
        logits: (B, K), ImageNet logits: Inception Score.
    """

    pool: Tensor
    spatial: Tensor
    logits: Tensor

    def __getitem__(self, rows: slice) -> "Features":
        """Some of the images."""
        return Features(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def to(self, device: torch.device | str) -> "Features":
        """The same on another device."""
        return Features(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    @classmethod
    def joined(cls, parts: "list[Features]") -> "Features":
        """Several batches as one."""
        return cls(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)})


class FeatureExtractor(nn.Module):
    """Base of all extractors: uint8 images in, `Features` out, never trained, float32 even under autocast.

    Args:
        name: goes into metric names; letters, digits, ``_``.
        num_features: D of `Features.pool`.
        num_spatial: S of `Features.spatial`.
        num_logits: K of `Features.logits`.
        chunk_size: images per pass through the network, whatever the batch given; a last, smaller part is padded.
    """

    def __init__(self, *, name: str, num_features: int, num_spatial: int, num_logits: int, chunk_size: int) -> None:
        super().__init__()
        if chunk_size < 1:
            raise InputError(f"chunk_size is {chunk_size}, must be >= 1 (images per pass)")
        self.name = name
        self.num_features = num_features
        self.num_spatial = num_spatial
        self.num_logits = num_logits
        self.chunk_size = chunk_size

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Stay in eval mode whatever is asked: batch statistics in a metric would depend on the batch."""
        return super().train(False)

    def freeze(self) -> None:
        """Eval mode, no gradients, channels-last weights; every subclass ends its constructor with it."""
        self.eval()
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)

    def extract(self, image: Tensor) -> Features:
        """The network's own part of `forward`: one chunk, uint8 (B, 3, H, W)."""
        raise TypeError(f"{type(self).__name__} does not define extract(image)")

    @torch.no_grad()
    def forward(self, image: Tensor) -> Features:
        """Features of a batch of any size, an empty one included.

        Args:
            image: uint8 (B, 3, H, W) in [0, 255].

        Raises:
            ValueError: other dtype or shape; floats are refused because their range cannot be known.
        """
        if image.dtype != torch.uint8 or image.dim() != 4 or image.shape[1] != 3:
            raise InputError(
                f"{self.name} got {image.dtype} {tuple(image.shape)}; features are taken from uint8 "
                "(B, 3, H, W) in [0, 255]; convert with smalto's own float-to-uint8 before"
            )
        if image.shape[0] == 0:
            empty = torch.zeros(0, device=image.device)
            sizes = (self.num_features, self.num_spatial, self.num_logits)
            return Features(*(empty.view(0, size) for size in sizes))
        with torch.autocast(image.device.type, enabled=False):
            return Features.joined([self._extract_padded(chunk) for chunk in image.split(self.chunk_size)])

    def _extract_padded(self, chunk: Tensor) -> Features:
        """Always one shape: libraries choose kernels by it, and an image's features must not depend on its batch."""
        missing = self.chunk_size - len(chunk)
        padded = torch.cat([chunk, chunk.new_zeros(missing, *chunk.shape[1:])]) if missing else chunk
        return self.extract(padded)[: len(chunk)]


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a weight file whose sha256 does not begin with ``expected``.

    Raises:
        ValueError: another file; numbers from other weights would be mislabelled.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(expected):
        raise InputError(
            f"{path} has sha256 {found[: max(16, len(expected))]}..., the published file's starts with "
            f"{expected}; fetch it again, numbers from other weights would be mislabelled"
        )
