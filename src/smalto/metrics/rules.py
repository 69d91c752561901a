"""How metrics are computed from features, in one place, so that a protocol can name it."""

from dataclasses import dataclass

from smalto.errors import InputError
from smalto.metrics.inception_score import Remainder
from smalto.metrics.manifold import DistanceDtype


@dataclass(frozen=True)
class Rules:
    """How the metrics are computed from features.

    Args:
        split_size: images per split of the Inception Score.
        split_remainder: see `InceptionScore`.
        num_neighbours: k of precision and recall.
        distance_dtype: of precision and recall, ``fp32`` or ``fp16`` as in ADM's evaluator.
        kid_subsets: pairs of subsets of KID; 0 leaves it out.
        kid_subset_size: images of a subset.
        max_pool: real images whose features are kept for precision, recall and KID (first come); 0 leaves them out.
    """

    split_size: int = 5000
    split_remainder: Remainder = "equal"
    num_neighbours: int = 3
    distance_dtype: DistanceDtype = "fp32"
    kid_subsets: int = 100
    kid_subset_size: int = 500
    max_pool: int = 10_000

    def __post_init__(self) -> None:
        problems = []
        if self.max_pool < 0:
            problems.append(f"max_pool is {self.max_pool}, must be >= 0 (0 = no precision, recall and KID)")
        if self.kid_subsets < 0 or self.kid_subset_size < 2:
            problems.append(
                f"kid_subsets is {self.kid_subsets} and kid_subset_size {self.kid_subset_size}; must be >= 0 (0 = no "
                "KID) and >= 2"
            )
        if problems:
            raise InputError("rules: " + "; ".join(problems))
