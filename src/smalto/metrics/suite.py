"""All distribution metrics of a set of images from one feature pass, in training and in `smalto evaluate`."""

import logging
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from smalto.errors import InputError
from smalto.metrics.distribution import FrechetDistance
from smalto.metrics.features import FeatureExtractor, Features
from smalto.metrics.finite import FEATURES
from smalto.metrics.inception_score import InceptionScore
from smalto.metrics.manifold import PrecisionRecall
from smalto.metrics.metric_state import load_metric_state, metric_state
from smalto.metrics.probe import ClassMeans, ClassMoments
from smalto.metrics.reference import Kind, Reference
from smalto.metrics.rules import Rules
from smalto.metrics.scores import Scores
from smalto.metrics.scoring import add_class_accuracy, add_inception_score, add_manifold

log = logging.getLogger(__name__)

# Lightning validates inside inference mode; sums made there could not be added to at the end of training.
_ordinary_tensors = torch.inference_mode(False)

_COUNTS = ("_num_real", "_num_fake", "_num_unlabelled", "_num_real_labels")


class GenerationMetrics:
    """FID, sFID, IS, KID, precision, recall and class accuracy of generated images against real ones.

    A plain object, not a module: kept on a LightningModule it adds nothing to checkpoints or to EMA copies.
    No random numbers are drawn from the global generators. With an initialised process group every process updates
    with its own images and calls `compute` and `finish_real` together; sums are added, features gathered. Names are
    ``fid_NAME``, ``sfid_NAME``, ``is_NAME``, ``kid_NAME``, ``precision_NAME``, ``recall_NAME``,
    ``class_accuracy_NAME``, with NAME the extractor's; for reconstructions ``rfid_NAME`` and ``rsfid_NAME`` only.

    Args:
        features: the extractor.
        reference: statistics of the real images; None when they come by `update_real`.
        num_classes: number of class labels; None for images without classes.
        kind: what the other images are, see `Reference`.
        rules: how the numbers are computed.
        distributed: whether processes that are joined in a group share this; False measures in this one alone.

    Raises:
        ValueError: a reference of another extractor or kind, or with another number of classes.
    """

    @_ordinary_tensors
    def __init__(
        self,
        *,
        features: FeatureExtractor,
        reference: Reference | None = None,
        num_classes: int | None = None,
        kind: Kind = "generation",
        rules: Rules | None = None,
        distributed: bool = True,
    ) -> None:
        self.rules = rules or Rules()
        joined = _joined if distributed else _alone
        self._joined = joined
        self.features = features
        self.num_classes = num_classes
        self.kind: Kind = kind
        self.per_class_accuracy: list[float] = []
        self._frechet = FrechetDistance(num_features=features.num_features, distributed_available_fn=joined)
        self._spatial = FrechetDistance(num_features=features.num_spatial, distributed_available_fn=joined)
        self._inception = InceptionScore(
            num_logits=features.num_logits,
            split_size=self.rules.split_size,
            remainder=self.rules.split_remainder,
            distributed_available_fn=joined,
        )
        self._manifold = PrecisionRecall(
            num_features=features.num_features,
            k=self.rules.num_neighbours,
            distance_dtype=self.rules.distance_dtype,
            distributed_available_fn=joined,
        )
        self._moments: ClassMoments | None = None
        if num_classes is not None and kind == "generation":
            self._moments = ClassMoments(
                num_classes=num_classes, num_features=features.num_features, distributed_available_fn=joined
            )
        self._labelled: list[tuple[Tensor, Tensor]] = []  # generated features (shared with _manifold), labels asked for
        self._num_real = self._num_fake = self._num_unlabelled = self._num_real_labels = 0
        self._told = False  # of the bias with few images, once
        self.reference: Reference | None = None
        if reference is not None:
            self._use(reference)

    @_ordinary_tensors
    def to(self, device: torch.device | str) -> "GenerationMetrics":
        """Move the network and all sums."""
        for part in (self.features, *self._parts().values()):
            part.to(device)
        self._labelled = [(pool.to(device), label.to(device)) for pool, label in self._labelled]
        if self.reference is not None:
            self.reference = self.reference.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the sums are."""
        return self._frechet.device

    def state(self) -> dict[str, Any]:
        """Everything this process has seen so far, for `torch.save`."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        labelled = [label for _, label in self._labelled]
        return {key: metric_state(metric) for key, metric in self._parts().items()} | {
            "counts": counts,
            "labels": labelled,
        }

    @_ordinary_tensors
    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`, on any device."""
        for key, metric in self._parts().items():
            load_metric_state(metric, state[key])
        for name, value in state["counts"].items():
            setattr(self, name, value)
        labels = [label.to(self.device) for label in state["labels"]]
        if labels:
            self._labelled = list(zip(self._manifold.fake[-len(labels) :], labels, strict=True))

    def _parts(self) -> dict[str, Metric]:
        parts: dict[str, Metric | None] = {
            "frechet": self._frechet,
            "spatial": self._spatial,
            "inception": self._inception,
            "manifold": self._manifold,
            "moments": self._moments,
        }
        return {key: metric for key, metric in parts.items() if metric is not None}

    @property
    def num_fake(self) -> int:
        """Generated images seen by this process."""
        return self._num_fake

    def update_real(self, image: Tensor, label: Tensor | None = None) -> None:
        """Add real images, uint8 (B, 3, H, W), and their labels (B,) where there are classes.

        Raises:
            ValueError: the real side is complete: a reference was given, `finish_real` or `compute` was
                called.
        """
        self.update_real_features(self.features(image), label)

    @_ordinary_tensors
    def update_real_features(self, found: Features, label: Tensor | None = None) -> None:
        """As `update_real`, from what the extractor gave for them; labels of -1 are no labels."""
        if self.reference is not None:
            raise InputError("the real side is complete; make new GenerationMetrics for other real images")
        self._frechet.update(found.pool, real=True)
        self._spatial.update(found.spatial, real=True)
        if self._moments is not None and label is not None and bool((label >= 0).all()):
            self._moments.update(found.pool, label)
            self._num_real_labels += len(found.pool)
        room = self.rules.max_pool - self._num_real
        if self.kind == "generation" and room > 0:
            self._manifold.update(found.pool[:room], real=True)
        self._num_real += len(found.pool)

    def update_fake(self, image: Tensor, label: Tensor | None = None, index: Tensor | None = None) -> None:
        """Add generated or reconstructed images.

        Args:
            image: uint8 (B, 3, H, W).
            label: int64 (B,), the classes asked for.
            index: int64 (B,), numbers of the images, see `InceptionScore`.
        """
        self.update_fake_features(self.features(image), label, index)

    @_ordinary_tensors
    def update_fake_features(self, found: Features, label: Tensor | None = None, index: Tensor | None = None) -> None:
        """As `update_fake`, from what the extractor gave for them."""
        self._frechet.update(found.pool, real=False)
        self._spatial.update(found.spatial, real=False)
        self._num_fake += len(found.pool)
        if self.kind == "reconstruction":
            return
        self._inception.update(found.logits, index)
        self._manifold.update(found.pool, real=False)
        if label is None:
            self._num_unlabelled += len(found.pool)
        else:
            self._labelled.append((found.pool, label.to(found.pool.device)))

    @_ordinary_tensors
    def finish_real(self, *, images: str = "", content: str = "", protocol: dict | None = None) -> Reference:
        """Close the real side and return it, for `Reference.save`. All processes call it together.

        Args:
            images: see `Reference`.
            content: see `Reference`.
            protocol: see `Reference`.

        Raises:
            ValueError: fewer than two real images.
        """
        if self.reference is not None:
            return self.reference
        total = self._total(self._num_real)
        if total < 2:
            raise InputError(f"real statistics need at least 2 images, got {total}")
        with self._manifold.sync_context():
            pool = self._manifold.sides()[0][: self.rules.max_pool].clone()
        classes = None
        if self._moments is not None and self._total(self._num_real_labels):
            classes = ClassMeans(**self._moments.compute())
        reference = Reference(
            extractor=self.features.name,
            kind=self.kind,
            images=images,
            gaussian=self._frechet.real(),
            pool=pool,
            classes=classes,
            spatial=self._spatial.real(),
            content=content,
            protocol=protocol or {},
        )
        self._use(reference)
        return reference

    @_ordinary_tensors
    def compute(self) -> Scores:
        """Every metric that these images allow; one that they do not is missing, with the reason.

        Closes the real side. All processes call it together.
        """
        real = self.reference.gaussian.n if self.reference else self._total(self._num_real)
        fake = self._total(self._num_fake)
        if self.reference is None and real is not None and real >= 2:
            self.finish_real()
        scores = Scores()
        self._add_frechet(scores, real, fake)
        if self.kind == "generation":
            add_inception_score(scores, self._inception, fake)
            add_manifold(scores, self._manifold, self.rules, kept=len(self.reference.pool) if self.reference else 0)
            classes = self.reference.classes if self.reference else None
            labelled = None if self._total(self._num_unlabelled) else self._labelled
            self.per_class_accuracy = add_class_accuracy(scores, classes, labelled, fake, joined=self._joined)
        for name, reason in scores.missing.items():
            log.info("no %s: %s", name, reason)
        return scores.renamed(f"_{self.features.name}")

    @_ordinary_tensors
    def reset_fake(self) -> None:
        """Forget the generated images, keep the real side."""
        self._frechet.reset()
        self._spatial.reset()
        self._inception.reset()
        self._manifold.reset_fake()
        self._labelled = []
        self._num_fake = self._num_unlabelled = 0
        self.per_class_accuracy = []

    def _use(self, reference: Reference) -> None:
        reference.require(extractor=self.features.name, kind=self.kind)
        classes = reference.classes
        if classes is not None and self.num_classes not in (None, classes.count.numel()):
            raise InputError(
                f"the reference knows {classes.count.numel()} classes, num_classes is {self.num_classes}; "
                "they describe different image sets"
            )
        self.reference = reference
        self._frechet.set_real(reference.gaussian)
        if reference.spatial is not None:
            self._spatial.set_real(reference.spatial)
        self._manifold.set_real(reference.pool)

    def _add_frechet(self, scores: Scores, real: int | None, fake: int) -> None:
        fid, sfid = ("fid", "sfid") if self.kind == "generation" else ("rfid", "rsfid")
        if self.reference is None or fake < 2:
            scores.missing |= dict.fromkeys((fid, sfid), f"needs 2 images a side, got {real} real and {fake} generated")
            return
        smaller = min(real or fake, fake)
        if smaller <= self.features.num_features and not self._told:
            self._told = True
            log.info(
                "FID of %d images with %d features is biased upwards; compare equal numbers only",
                smaller,
                self.features.num_features,
            )
        scores.add(fid, float(self._frechet.compute()), cause=FEATURES)
        if self.reference.spatial is None:
            scores.missing[sfid] = f"the reference {self.reference.images} has no spatial statistics"
        else:
            scores.add(sfid, float(self._spatial.compute()), cause=FEATURES)

    def _total(self, count: int) -> int:
        """Sum over processes; every process has to ask."""
        if not self._joined():
            return count
        total = torch.tensor(count, device=self._frechet.device)
        torch.distributed.all_reduce(total)
        return int(total)


def _joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _alone() -> bool:
    return False
