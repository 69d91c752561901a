"""All distribution metrics of a set of images from one feature pass, in training and in `smalto evaluate`."""

import logging
import math

import torch
from torch import Tensor

from smalto.metrics.distribution import FrechetDistance, InceptionScore
from smalto.metrics.features import FeatureExtractor
from smalto.metrics.manifold import PrecisionRecall
from smalto.metrics.probe import ClassMeans, ClassMoments, ClassProbe
from smalto.metrics.reference import Kind, Reference

log = logging.getLogger(__name__)

# Lightning validates inside inference mode; sums made there could not be added to at the end of training.
_ordinary_tensors = torch.inference_mode(False)


class GenerationMetrics:
    """FID, Inception Score, precision, recall and class accuracy of generated images against real ones.

    A plain object, not a module: kept on a LightningModule it adds nothing to checkpoints or to EMA copies.
    No random numbers are drawn. With an initialised process group every process updates with its own images
    and calls `compute` and `finish_real` together; sums are added, features gathered. Keys are ``fid_NAME``,
    ``is_NAME``, ``is_std_NAME``, ``precision_NAME``, ``recall_NAME``, ``class_accuracy_NAME``, with NAME the
    extractor's; for reconstructions only ``rfid_NAME``.

    Args:
        features: the extractor.
        reference: statistics of the real images; None when they come by `update_real`.
        num_classes: number of class labels; None for images without classes.
        kind: what the other images are, see `Reference`.
        max_pool: real images whose features are kept for precision and recall (first come).
        k: neighbour of precision and recall.
        split_size: images per split of the Inception Score.

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
        max_pool: int = 10_000,
        k: int = 3,
        split_size: int = 5000,
    ) -> None:
        if max_pool < 0:
            raise ValueError(f"max_pool is {max_pool}, must be >= 0 (0 = no precision and recall)")
        self.features = features
        self.num_classes = num_classes
        self.kind: Kind = kind
        self.max_pool = max_pool
        self.per_class_accuracy: list[float] = []
        self._frechet = FrechetDistance(num_features=features.num_features)
        self._inception = InceptionScore(num_logits=features.num_logits, split_size=split_size)
        self._manifold = PrecisionRecall(num_features=features.num_features, k=k)
        self._moments: ClassMoments | None = None
        if num_classes is not None and kind == "generation":
            self._moments = ClassMoments(num_classes=num_classes, num_features=features.num_features)
        self._labelled: list[tuple[Tensor, Tensor]] = []  # generated features (shared with _manifold), labels asked for
        self._num_real = 0
        self._num_fake = 0
        self._num_unlabelled = 0
        self._num_real_labels = 0
        self.reference: Reference | None = None
        if reference is not None:
            self._use(reference)

    @_ordinary_tensors
    def to(self, device: torch.device | str) -> "GenerationMetrics":
        """Move the network and all sums."""
        for part in (self.features, self._frechet, self._inception, self._manifold, self._moments):
            if part is not None:
                part.to(device)
        self._labelled = [(pool.to(device), label.to(device)) for pool, label in self._labelled]
        return self

    @property
    def num_fake(self) -> int:
        """Generated images seen by this process."""
        return self._num_fake

    @_ordinary_tensors
    def update_real(self, image: Tensor, label: Tensor | None = None) -> None:
        """Add real images, uint8 (B, 3, H, W), and their labels (B,) where there are classes.

        Raises:
            ValueError: the real side is complete: a reference was given, `finish_real` or `compute` was
                called.
        """
        if self.reference is not None:
            raise ValueError("the real side is complete; make new GenerationMetrics for other real images")
        pool = self.features(image).pool
        self._frechet.update(pool, real=True)
        if self._moments is not None and label is not None:
            self._moments.update(pool, label.to(pool.device))
            self._num_real_labels += image.shape[0]
        room = self.max_pool - self._num_real
        if self.kind == "generation" and room > 0:
            self._manifold.update(pool[:room], real=True)
        self._num_real += image.shape[0]

    @_ordinary_tensors
    def update_fake(self, image: Tensor, label: Tensor | None = None) -> None:
        """Add generated or reconstructed images, uint8 (B, 3, H, W), and the labels (B,) asked for."""
        found = self.features(image)
        self._frechet.update(found.pool, real=False)
        self._num_fake += image.shape[0]
        if self.kind == "reconstruction":
            return
        self._inception.update(found.logits)
        self._manifold.update(found.pool, real=False)
        if label is None:
            self._num_unlabelled += image.shape[0]
        else:
            self._labelled.append((found.pool, label.to(found.pool.device)))

    @_ordinary_tensors
    def finish_real(self, *, images: str = "") -> Reference:
        """Close the real side and return it, for `Reference.save`. All processes call it together.

        Args:
            images: which images these were: a hash of their description, or a name.

        Raises:
            ValueError: fewer than two real images.
        """
        if self.reference is not None:
            return self.reference
        total = self._total(self._num_real)
        if total < 2:
            raise ValueError(f"real statistics need at least 2 images, got {total}")
        with self._manifold.sync_context():
            kept = self._manifold.real
            pool = (torch.cat(kept) if isinstance(kept, list) else kept)[: self.max_pool].clone()
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
        )
        self._use(reference)
        return reference

    @_ordinary_tensors
    def compute(self) -> dict[str, float]:
        """Every metric that these images allow; one that they do not is absent and the reason is logged.

        Closes the real side. All processes call it together.
        """
        real = self.reference.gaussian.n if self.reference else self._total(self._num_real)
        fake = self._total(self._num_fake)
        if self.reference is None and real >= 2:
            self.finish_real()
        values: dict[str, float] = {}
        if self.reference is None or fake < 2:
            log.warning("no FID: needs 2 images a side, got %d real and %d generated", real, fake)
        else:
            smaller = min(real, fake)
            if smaller <= self.features.num_features:
                log.info(
                    "FID of %d images with %d features is biased upwards; compare equal numbers only",
                    smaller,
                    self.features.num_features,
                )
            values["fid" if self.kind == "generation" else "rfid"] = float(self._frechet.compute())
        if self.kind == "generation":
            values |= self._inception_score(fake) | self._precision_recall(fake) | self._class_accuracy(fake)
        broken = [key for key, value in values.items() if not math.isfinite(value)]
        if broken:
            log.warning("not finite, left out: %s", ", ".join(broken))
        return {f"{key}_{self.features.name}": v for key, v in values.items() if key not in broken}

    @_ordinary_tensors
    def reset_fake(self) -> None:
        """Forget the generated images, keep the real side."""
        self._frechet.reset()
        self._inception.reset()
        self._manifold.reset_fake()
        self._labelled = []
        self._num_fake = 0
        self._num_unlabelled = 0
        self.per_class_accuracy = []

    def _use(self, reference: Reference) -> None:
        reference.require(extractor=self.features.name, kind=self.kind)
        classes = reference.classes
        if classes is not None and self.num_classes not in (None, classes.count.numel()):
            raise ValueError(
                f"the reference knows {classes.count.numel()} classes, num_classes is {self.num_classes}; "
                "they describe different image sets"
            )
        self.reference = reference
        self._frechet.set_real(reference.gaussian)
        self._manifold.set_real(reference.pool)

    def _inception_score(self, fake: int) -> dict[str, float]:
        if fake < 2:
            log.warning("no Inception Score: needs 2 images, got %d", fake)
            return {}
        mean, std = self._inception.compute()
        splits = fake // self._inception.split_size
        return {"is": float(mean)} | ({"is_std": float(std)} if splits > 1 else {})

    def _precision_recall(self, fake: int) -> dict[str, float]:
        real = self.reference.pool.shape[0] if self.reference else 0
        if min(real, fake) <= self._manifold.k:
            log.warning(
                "no precision and recall: needs more than %d images a side, kept %d real and %d generated",
                self._manifold.k,
                real,
                fake,
            )
            return {}
        precision, recall = self._manifold.compute()
        return {"precision": float(precision), "recall": float(recall)}

    def _class_accuracy(self, fake: int) -> dict[str, float]:
        classes = self.reference.classes if self.reference else None
        if classes is None:
            log.info("no class accuracy: the real images came without class labels")
            return {}
        if fake == 0 or self._total(self._num_unlabelled):
            log.info("no class accuracy: generated images came without the labels asked for")
            return {}
        # Only now, because the class means are known only when the last real image was seen.
        probe = ClassProbe(means=classes).to(self._frechet.device)
        for pool, label in self._labelled:
            probe.update(pool, label)
        result = probe.compute()
        self.per_class_accuracy = [float(value) for value in result["per_class"]]
        return {"class_accuracy": float(result["accuracy"])}

    def _total(self, count: int) -> int:
        """Sum over processes; every process has to ask."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return count
        total = torch.tensor(count, device=self._frechet.device)
        torch.distributed.all_reduce(total)
        return int(total)
