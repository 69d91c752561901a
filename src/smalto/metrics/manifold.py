"""Improved precision and recall (arXiv:1904.06991) by blocks of rows, without an N x N matrix."""

from typing import Any, Literal

import torch
from torch import Tensor

from smalto.errors import InputError
from smalto.metrics.finite import all_finite, check_finite
from smalto.metrics.metric_state import CarriesTensors

DistanceDtype = Literal["fp32", "fp16"]


class PrecisionRecall(CarriesTensors):
    """Precision: share of generated images inside the manifold of real ones; recall: the other way round.

    A manifold is the union of balls around each image, reaching to its k-th nearest neighbour in the same
    set. Distances are squared Euclidean in float32 on features centred at the real mean; or, with
    ``distance_dtype="fp16"``, in float16 as ADM's evaluator computes them, which moves both values in the third digit.

    Features of all images are kept (50,000 x 2048 float32: 0.4 GB a side) and gathered over processes.
    Precision and recall depend on the number of images; compare only runs with equal numbers.

    Args:
        num_features: D.
        k: neighbour that sets a ball's radius.
        block_size: rows of a distance block, which takes block_size x N x 4 bytes.
        distance_dtype: ``fp32``, or ``fp16`` to compare with numbers of ADM's evaluator.
    """

    full_state_update = False
    is_differentiable = False
    carried = ("_given",)
    real: list[Tensor]
    fake: list[Tensor]

    def __init__(
        self,
        *,
        num_features: int,
        k: int = 3,
        block_size: int = 1000,
        distance_dtype: DistanceDtype = "fp32",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if distance_dtype not in ("fp32", "fp16"):
            raise InputError(f"distance_dtype is {distance_dtype!r}, must be fp32, or fp16 as in ADM's evaluator")
        if k < 1 or block_size < 1:
            raise InputError(f"k is {k} and block_size {block_size}; both must be >= 1")
        self.num_features = num_features
        self.k = k
        self.block_size = block_size
        self.distance_dtype: DistanceDtype = distance_dtype
        self._given: Tensor | None = None
        self.add_state("real", default=[], dist_reduce_fx="cat")
        self.add_state("fake", default=[], dist_reduce_fx="cat")

    def update(self, pool: Tensor, real: bool) -> None:
        """Add features (B, D) of real or generated images; float64 stays, others become float32.

        Raises:
            ValueError: real features after `set_real`.
        """
        if real and self._given is not None:
            raise InputError("real features were set from a reference; drop it to measure real images instead")
        pool = pool.detach()
        (self.real if real else self.fake).append(pool if pool.dtype == torch.float64 else pool.float())

    def set_real(self, pool: Tensor) -> None:
        """Use known features (N, D) for the real side, the same on every process; never gathered.

        Raises:
            ValueError: features that are not finite.
        """
        check_finite("the features of the real images", pool)
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
        """Precision and recall, float32 scalars in [0, 1]; distances are taken in the dtype of the features.

        NaN where a feature is not finite, or its square.

        Raises:
            ValueError: not more than k images on a side.
        """
        return self.measure(*self.sides())

    def measure(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Precision and recall of features (N, D) and (M, D) by this metric's rules."""
        return precision_recall(real, fake, k=self.k, block_size=self.block_size, distance_dtype=self.distance_dtype)

    def sides(self) -> tuple[Tensor, Tensor]:
        """Features of the real and of the generated images that this process knows, (N, D) and (M, D)."""
        fake = _joined(self.fake, self.num_features, self.device)
        real = self._given.to(fake) if self._given is not None else _joined(self.real, self.num_features, self.device)
        return real, fake

    def reset_fake(self) -> None:
        """Forget the generated side, keep the real one."""
        kept = list(self.real)  # reset empties the list in place
        self.reset()
        self.real = kept


def precision_recall(
    real: Tensor,
    fake: Tensor,
    *,
    k: int = 3,
    block_size: int = 1000,
    distance_dtype: DistanceDtype = "fp32",
) -> tuple[Tensor, Tensor]:
    """See `PrecisionRecall`; real (N, D), fake (M, D)."""
    if min(real.shape[0], fake.shape[0]) <= k:
        raise InputError(
            f"precision and recall with k={k} need more than {k} images a side, got {real.shape[0]} real and "
            f"{fake.shape[0]} generated"
        )
    if distance_dtype == "fp32":
        centre = real.mean(dim=0)  # |a|^2 + |b|^2 - 2ab loses digits when the mean is large against the spread
        real, fake = real - centre, fake - centre
    points = _HalfPoints if distance_dtype == "fp16" else _Points
    reals, fakes = points(real), points(fake)
    if not all_finite(8 * reals.norms, 8 * fakes.norms):  # no distance is above four times the larger norm
        return real.new_full((), torch.nan), fake.new_full((), torch.nan)
    real_radii, fake_radii = (_radii(x, k, block_size) for x in (reals, fakes))
    covered = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    recalled = []
    for start in range(0, len(real), block_size):
        rows = slice(start, start + block_size)
        distance = reals.squared_distances(rows, fakes)
        recalled.append((distance <= fake_radii).any(dim=1))
        covered |= (distance <= real_radii[rows, None]).any(dim=0)
    return covered.float().mean(), torch.cat(recalled).float().mean()


class _Points:
    """Features (N, D) with their squared norms, which every block of distances needs."""

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self.norms = torch.linalg.vector_norm(features, dim=1).square_()

    def __len__(self) -> int:
        return len(self.features)

    def squared_distances(self, rows: slice, other: "_Points") -> Tensor:
        """Float32 (rows, M)."""
        part = self.features[rows]
        squared = torch.addmm(other.norms.expand(len(part), -1), part, other.features.T, alpha=-2)
        return squared.add_(self.norms[rows, None]).clamp_(min=0)


class _HalfPoints(_Points):
    """As in ADM's evaluator: features, norms, products and sums rounded to float16; float32 where that overflows."""

    def __init__(self, features: Tensor) -> None:
        super().__init__(features)
        self.rounded = features.half().float()  # products in float32 then sum as on a GPU
        squares = (part.square().half().float().sum(dim=1) for part in self.rounded.split(2000))
        self.half_norms = torch.cat([*squares]).half()

    def squared_distances(self, rows: slice, other: "_Points") -> Tensor:
        """See the base class."""
        assert isinstance(other, _HalfPoints)
        product = (self.rounded[rows] @ other.rounded.T).half()
        squared = ((self.half_norms[rows, None] - 2 * product) + other.half_norms).float()
        return squared if bool(squared.isfinite().all()) else super().squared_distances(rows, other)


def _radii(points: _Points, k: int, block_size: int) -> Tensor:
    # k + 1: the nearest point of the same set is the point itself.
    blocks = (points.squared_distances(slice(i, i + block_size), points) for i in range(0, len(points), block_size))
    return torch.cat([distance.topk(k + 1, dim=1, largest=False).values[:, -1] for distance in blocks])


def _joined(blocks: list[Tensor] | Tensor, width: int, device: torch.device) -> Tensor:
    if isinstance(blocks, Tensor):
        return blocks
    return torch.cat(blocks) if blocks else torch.zeros(0, width, device=device)
