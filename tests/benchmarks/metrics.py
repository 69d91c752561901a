"""Speed of the metrics: ``PYTHONPATH=src:tests python -m benchmarks.metrics [threads=1] [rounds=1]``.

The matrix root of FID against ``scipy.linalg.sqrtm``, as ADM's evaluator and the authors take it; all metrics of
10,000 against 10,000 images from features of Inception's sizes (the network itself is not run).

:func:`smalto.metrics.distribution.frechet_distance` says when it takes eigenvalues and when singular values.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

import scipy.linalg
import torch
from torch import Tensor

from benchmarks.paired import interleave
from benchmarks.rows import Row, arguments, time_row
from smalto.metrics.distribution import Gaussian, frechet_distance
from smalto.metrics.features import FeatureExtractor, Features
from smalto.metrics.kernel import kernel_distance
from smalto.metrics.rules import Rules
from smalto.metrics.suite import GenerationMetrics

FEATURES, SPATIAL, LOGITS = 2048, 2023, 1008


def gaussian(seed: int, *, dim: int, count: int) -> Gaussian:
    """Moments of ``count`` random vectors; the condition of their covariance is in the thousands."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, dim, generator=generator, dtype=torch.float64) * torch.logspace(0, -1.5, dim)
    return Gaussian(mean=values.mean(0), cov=values.T.cov(), n=count)


def root_rows(*, dim: int = FEATURES, rounds: int = 1) -> list[Row]:
    """The whole distance, from moments of full rank to the number."""
    a, b = (gaussian(seed, dim=dim, count=5 * dim) for seed in (0, 1))
    found: dict[str, float] = {}

    def ours(_: int) -> None:
        fresh = (Gaussian(mean=one.mean, cov=one.cov, n=one.n) for one in (a, b))  # roots are kept with their owner
        found["ours"] = float(frechet_distance(*fresh))

    def scipys(_: int) -> None:
        root = scipy.linalg.sqrtm((a.cov @ b.cov).numpy())
        means, traces = (a.mean - b.mean).square().sum(), a.cov.trace() + b.cov.trace()
        found["scipy"] = float(means + traces) - 2 * float(root.real.trace())

    seconds = interleave({"ours": ours, "scipy": scipys}, rounds=rounds, warm=False)
    error = abs(found["ours"] - found["scipy"]) / found["scipy"]
    name = f"FID of two {dim}-dim Gaussians of full rank, float64"
    return [
        time_row(f"{name} / scipy.linalg.sqrtm", seconds, "ours", "scipy", goal="<= 0.10"),
        Row(f"{name}, relative difference", error, 1e-6, error / 1e-6, "", "<= 1"),
    ]


def features(count: int, seed: int, *, batch: int = 1000) -> Iterator[tuple[Features, Tensor]]:
    """Random features and image numbers, a batch at a time."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, batch):
        sizes = (FEATURES, SPATIAL, LOGITS)
        parts = [torch.rand(min(batch, count - start), size, generator=generator) for size in sizes]
        yield Features(*parts), torch.arange(start, start + len(parts[0]))


def suite_rows(*, count: int = 10_000, rounds: int = 1) -> list[Row]:
    """FID, sFID, IS, precision and recall from features; KID apart."""
    sizes = {"num_features": FEATURES, "num_spatial": SPATIAL, "num_logits": LOGITS}
    network = FeatureExtractor(name="random", **sizes, chunk_size=1)  # never run

    def suite(_: int) -> None:
        metrics = GenerationMetrics(features=network, rules=Rules(kid_subsets=0))
        for found, _index in features(count, 0):
            metrics.update_real_features(found)
        for found, index in features(count, 1):
            metrics.update_fake_features(found, index=index)
        missing = metrics.compute().missing
        assert not set(missing) - {"class_accuracy_random"}, missing

    pools = [torch.cat([found.pool for found, _ in features(count, seed)]) for seed in (0, 1)]
    contestants = {"suite": suite, "kid": lambda _: kernel_distance(*pools, subset_size=min(500, count))}
    seconds = interleave(contestants, rounds=rounds, warm=False)
    names = {
        "suite": f"FID, sFID, IS, precision, recall of {count} x {FEATURES} features a side",
        "kid": "KID, 100 subsets of 500",
    }
    return [Row(name, sorted(seconds[key])[rounds // 2], None, None, "s") for key, name in names.items()]


def main(given: list[str]) -> None:
    """Print the rows as JSON lines."""
    options = arguments(given)
    torch.set_num_threads(int(options.get("threads", 1)))
    rounds = int(options.get("rounds", 1))
    for row in [*root_rows(rounds=rounds), *suite_rows(rounds=rounds)]:
        print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
