"""Stateless order and randomness: each choice is a function of (seed, epoch, index); no state to save."""

import numpy as np

_ORDER, _SAMPLE = 1, 2  # keeps the permutation and the samples from sharing random numbers

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Permutation of ``range(n)``, int64, the same for the same (seed, epoch, n)."""
    return np.random.default_rng((_ORDER, seed, epoch)).permutation(n)


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Private random numbers of sample ``index`` in ``epoch``, whoever asks, whenever, in any process."""
    return np.random.default_rng((_SAMPLE, seed, epoch, index))


def sample_uniform(seed: int, epoch: int, indices: np.ndarray, stream: int) -> np.ndarray:
    """One number in [0, 1) per index, float64, a hash of (seed, stream, epoch, index).

    A thousand times cheaper than a ``sample_rng`` each, for choices of one draw: which crop, mirrored
    or not.

    Args:
        seed: of the run.
        epoch: counts from 0.
        indices: integers >= 0, any shape; the result has the same shape.
        stream: number of the choice, so that two choices about a sample are independent.
    """
    state = _mix(np.asarray([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    for word in (stream, epoch):
        state = _mix(state ^ np.asarray([word], dtype=np.uint64))
    bits = _mix(_mix(state ^ np.asarray(indices).astype(np.uint64)))
    return (bits >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014), on arrays; overflow wraps as intended."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
