"""Improved precision and recall (arXiv:1904.06991) by blocks of rows, without an N x N matrix."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class PrecisionRecall(Metric):
    """Precision: share of generated images inside the manifold of real ones; recall: the other way round.

    A manifold is the union of balls around each image, reaching to its k-th nearest neighbour in the same
    set. Distances are squared Euclidean in float32 on features centred at the real mean. ADM's evaluator
    computes them in float16, which shifts both values up by 0.003 to 0.004; that is not imitated.

    Features of all images are kept (50,000 x 2048 float32: 0.4 GB a side) and gathered over processes.
    Precision and recall depend on the number of images; compare only runs with equal numbers.

    Args:
        num_features: D.
        k: neighbour that sets a ball's radius.
        block_size: rows of a distance block, which takes block_size x N x 4 bytes.
    """

    full_state_update = False
    is_differentiable = False
    real: list[Tensor]
    fake: list[Tensor]

    def __init__(self, *, num_features: int, k: int = 3, block_size: int = 2000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1 or block_size < 1:
            raise ValueError(f"k is {k} and block_size {block_size}; both must be >= 1")
        self.num_features = num_features
        self.k = k
        self.block_size = block_size
        self._given: Tensor | None = None
        self.add_state("real", default=[], dist_reduce_fx="cat")
        self.add_state("fake", default=[], dist_reduce_fx="cat")

    def update(self, pool: Tensor, real: bool) -> None:
        """Add features (B, D) of real or generated images.

        Raises:
            ValueError: real features after `set_real`.
        """
        if real and self._given is not None:
            raise ValueError("real features were set from a reference; drop it to measure real images instead")
        (self.real if real else self.fake).append(pool.detach().float())

    def set_real(self, pool: Tensor) -> None:
        """Use known features (N, D) for the real side, the same on every process; never gathered."""
        self._given = pool
        self.real = []
        self._computed = None

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """A process without samples takes part with an empty block of the right width."""
        for block in (self.real, self.fake):
            if not block:
                block.append(torch.zeros(0, self.num_features, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Precision and recall, float32 scalars in [0, 1].

        Raises:
            ValueError: not more than k images on a side.
        """
        fake = _joined(self.fake)
        real = self._given.to(fake) if self._given is not None else _joined(self.real)
        return precision_recall(real, fake, k=self.k, block_size=self.block_size)

    def reset_fake(self) -> None:
        """Forget the generated side, keep the real one."""
        kept = list(self.real)  # reset empties the list in place
        self.reset()
        self.real = kept


def precision_recall(real: Tensor, fake: Tensor, *, k: int = 3, block_size: int = 2000) -> tuple[Tensor, Tensor]:
    """See `PrecisionRecall`; real (N, D), fake (M, D)."""
    if min(real.shape[0], fake.shape[0]) <= k:
        raise ValueError(
            f"precision and recall with k={k} need more than {k} images a side, got {real.shape[0]} real and "
            f"{fake.shape[0]} generated"
        )
    centre = real.mean(dim=0)  # |a|^2 + |b|^2 - 2ab loses digits when the mean is large against the spread
    real, fake = real - centre, fake - centre
    precision = _inside(fake, real, _radii(real, k, block_size), block_size)
    recall = _inside(real, fake, _radii(fake, k, block_size), block_size)
    return precision, recall


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    squared = torch.addmm(b.square().sum(dim=1).expand(a.shape[0], -1), a, b.T, alpha=-2)
    return squared.add_(a.square().sum(dim=1, keepdim=True)).clamp_(min=0)


def _radii(points: Tensor, k: int, block_size: int) -> Tensor:
    # k + 1: the nearest point of the same set is the point itself.
    blocks = (_squared_distances(block, points) for block in points.split(block_size))
    return torch.cat([distance.kthvalue(k + 1, dim=1).values for distance in blocks])


def _inside(points: Tensor, centres: Tensor, radii: Tensor, block_size: int) -> Tensor:
    blocks = (_squared_distances(block, centres) <= radii for block in points.split(block_size))
    return torch.cat([covered.any(dim=1) for covered in blocks]).float().mean()


def _joined(blocks: list[Tensor] | Tensor) -> Tensor:
    return torch.cat(blocks) if isinstance(blocks, list) else blocks
