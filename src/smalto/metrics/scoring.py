"""From metrics that have seen everything to `Scores`: what can be computed, its spread, and what is missing and why."""

import logging
from collections.abc import Callable

from torch import Tensor

from smalto.metrics.finite import FEATURES, LOGITS
from smalto.metrics.inception_score import InceptionScore
from smalto.metrics.kernel import kernel_distance
from smalto.metrics.manifold import PrecisionRecall
from smalto.metrics.probe import ClassMeans, ClassProbe
from smalto.metrics.rules import Rules
from smalto.metrics.scores import Scores

log = logging.getLogger(__name__)

SORTED = 0.05
"""Excess of equal neighbours above which samples count as sorted by class, beyond five deviations of chance."""


def add_inception_score(scores: Scores, metric: InceptionScore, count: int) -> None:
    """``is`` of ``count`` images over all processes, with its deviation over splits when there are several."""
    if count < 2:
        scores.missing["is"] = f"needs 2 images, got {count}"
        return
    found = metric.compute()
    splits = metric.splits(count)
    scores.add("is", float(found["mean"]), float(found["std"]) if splits > 1 else None, cause=LOGITS)
    if splits > 1 and float(found["class_runs"]) > SORTED + 5 * float(found["class_runs_deviation"]):
        log.warning(
            "the samples look sorted by class (neighbours are alike %.0f %% more often than by chance): each split of "
            "%d then holds few classes and the Inception Score is too low; shuffle them",
            100 * float(found["class_runs"]),
            metric.split_size,
        )


def add_manifold(scores: Scores, metric: PrecisionRecall, rules: Rules, *, kept: int) -> None:
    """``precision``, ``recall`` and ``kid`` from one gathering of the features; ``kept`` real ones are at hand."""
    with metric.sync_context():
        real, fake = metric.sides()
        count = f"kept {kept} real and {len(fake)} generated"
        if min(kept, len(fake)) > metric.k:
            precision, recall = metric.measure(real, fake)
            scores.add_share("precision", float(precision), len(fake), cause=FEATURES)
            scores.add_share("recall", float(recall), kept, cause=FEATURES)
        else:
            reason = f"needs more than {metric.k} images a side, {count}"
            scores.missing |= dict.fromkeys(("precision", "recall"), reason)
        if rules.kid_subsets and min(kept, len(fake)) >= rules.kid_subset_size:
            size = rules.kid_subset_size
            kid = kernel_distance(real, fake, num_subsets=rules.kid_subsets, subset_size=size)
            scores.add("kid", *kid, cause=FEATURES)
        elif rules.kid_subsets:
            scores.missing["kid"] = f"needs {rules.kid_subset_size} images a side (kid_subset_size), {count}"


def add_class_accuracy(
    scores: Scores,
    classes: ClassMeans | None,
    labelled: list[tuple[Tensor, Tensor]] | None,
    count: int,
    *,
    joined: Callable[[], bool],
) -> list[float]:
    """``class_accuracy`` of generated features and the labels asked for, by nearest class mean; per class as returned.

    Args:
        scores: taken in here.
        classes: fitted on the real images; None when those have no labels.
        labelled: (features, labels) of this process; None when some images came without.
        count: generated images over all processes.
        joined: whether processes share the counts.
    """
    if classes is None:
        scores.missing["class_accuracy"] = "the real images came without class labels"
    elif not count or labelled is None:
        scores.missing["class_accuracy"] = "generated images came without the labels asked for"
    else:
        # Only now, because the class means are known only when the last real image was seen.
        probe = ClassProbe(means=classes, distributed_available_fn=joined).to(classes.mean.device)
        for pool, label in labelled:
            probe.update(pool.to(classes.mean.device), label.to(classes.mean.device))
        result = probe.compute()
        scores.add_share("class_accuracy", float(result["accuracy"]), count, cause=FEATURES)
        return [float(value) for value in result["per_class"]]
    return []
