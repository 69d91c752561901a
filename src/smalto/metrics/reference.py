"""What is remembered of the real images, so that they need not be looked at again."""

import hashlib
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from smalto.arrays import npz_array
from smalto.errors import InputError, MissingFile, PathInUse
from smalto.files import replacing
from smalto.metrics.distribution import Gaussian
from smalto.metrics.metric_state import mapped
from smalto.metrics.probe import ClassMeans

FORMAT = "smalto-reference"
VERSION = 2
Kind = Literal["generation", "reconstruction"]
KINDS = ("generation", "reconstruction")
_MOMENTS = ("n", "mean", "cov")
_ARRAYS = {
    *("format", "version", "extractor", "kind", "images", "content", "protocol", "pool"),
    *("class_mean", "class_std", "class_count", *_MOMENTS, *(f"spatial_{name}" for name in _MOMENTS)),
}
"""All that a file holds."""


@dataclass(frozen=True)
class Reference:
    """Statistics of a set of real images under one feature extractor.

    Args:
        extractor: name of the extractor; numbers against another one mean nothing.
        kind: ``generation`` (the training distribution a generator is compared with) or ``reconstruction``
            (the held-out images that were encoded and decoded). Mixing the two up is the best known way to
            irreproducible FID.
        images: which images: a name, or where they lay.
        gaussian: moments over all images.
        pool: (M, D) float32 features of the first M images, for precision and recall; M may be 0.
        classes: fitted class probe, None for images without labels.
        spatial: moments of the spatial features, for sFID; None where they are not known.
        content: chained hash of the pixels of all images in order, see `chain_hash`; empty where they were not seen.
        protocol: how the images were made: size, crop, split; plain values.
    """

    extractor: str
    kind: Kind
    images: str
    gaussian: Gaussian
    pool: Tensor
    classes: ClassMeans | None
    spatial: Gaussian | None = None
    content: str = ""
    protocol: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"kind of reference is {self.kind!r}, must be one of {', '.join(KINDS)}")

    def to(self, device: torch.device | str) -> "Reference":
        """The same, with all tensors on ``device``: processes that compare notes over NCCL need them there."""
        moved: Reference = mapped(self, lambda tensor: tensor.to(device))
        return moved

    def require(self, *, extractor: str, kind: Kind, where: str = "the reference") -> None:
        """Refuse to be compared with features of another kind.

        Raises:
            ValueError: another extractor or kind.
        """
        if self.extractor != extractor:
            raise InputError(
                f"{where} was measured with features {self.extractor}, this run uses {extractor}; numbers of "
                "different extractors cannot be compared: choose its features, or measure it again"
            )
        if self.kind != kind:
            raise InputError(
                f"{where} is for {self.kind}, asked for was {kind}; generated images are compared with the training "
                "distribution, reconstructions with the very images they were made from, in the same crop: the wrong "
                "one has doubled an rFID before (4.28 for 2.19)"
            )

    def save(self, path: str | Path) -> None:
        """Write one .npz file; it appears under its name only when complete.

        Raises:
            FileExistsError: there is a file already.
        """
        path = Path(path)
        if path.exists():
            raise PathInUse(f"{path} exists; remove it or choose another name for the reference")
        arrays: dict[str, np.ndarray] = {
            "format": np.array(FORMAT),
            "version": np.array(VERSION),
            "extractor": np.array(self.extractor),
            "kind": np.array(self.kind),
            "images": np.array(self.images),
            "content": np.array(self.content),
            "protocol": np.array(json.dumps(self.protocol)),
            "pool": self.pool.float().cpu().numpy(),
            **_gaussian_arrays(self.gaussian, ""),
        }
        if self.spatial is not None:
            arrays |= _gaussian_arrays(self.spatial, "spatial_")
        if self.classes is not None:
            arrays["class_mean"] = self.classes.mean.float().cpu().numpy()
            arrays["class_std"] = self.classes.std.float().cpu().numpy()
            arrays["class_count"] = self.classes.count.cpu().numpy()
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # stubs take the names for allow_pickle

    @classmethod
    def load(cls, path: str | Path, *, extractor: str, kind: Kind) -> "Reference":
        """Read a file written by `save`, only if it fits.

        Args:
            path: the file.
            extractor: name of the extractor that will be compared with it.
            kind: what will be compared with it.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no reference file, or made with another extractor, or of another kind.
        """
        path = Path(path)
        if not path.is_file():
            raise MissingFile(f"no reference at {path}; measure the real images first")
        try:
            with zipfile.ZipFile(path) as archive:
                names = {name.removesuffix(".npy") for name in archive.namelist()}
            arrays = {
                key: np.array(npz_array(path, key, mapped=False, packed=False)) for key in _ARRAYS if key in names
            }
            found, version = str(arrays["format"]), int(arrays["version"])
        except Exception as error:  # a damaged file fails in ways that are nobody's list
            raise InputError(f"{path} is not a reference written by smalto, or damaged: {error}") from error
        if found != FORMAT or version != VERSION:
            raise InputError(f"{path} is not a reference of format {FORMAT} {VERSION}; measure it again")
        try:
            reference = cls._from_arrays(arrays)
        except Exception as error:
            raise InputError(f"{path} is damaged ({type(error).__name__}: {error}); measure it again") from error
        reference.require(extractor=extractor, kind=kind, where=str(path))
        return reference

    @classmethod
    def _from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Reference":
        classes = None
        if "class_mean" in arrays:
            classes = ClassMeans(
                mean=torch.from_numpy(arrays["class_mean"]),
                std=torch.from_numpy(arrays["class_std"]),
                count=torch.from_numpy(arrays["class_count"]),
            )
        return cls(
            extractor=str(arrays["extractor"]),
            kind="reconstruction" if str(arrays["kind"]) == "reconstruction" else "generation",
            images=str(arrays["images"]),
            gaussian=_gaussian(arrays, ""),
            pool=torch.from_numpy(arrays["pool"]),
            classes=classes,
            spatial=_gaussian(arrays, "spatial_") if "spatial_mean" in arrays else None,
            content=str(arrays["content"]),
            protocol=json.loads(str(arrays["protocol"])),
        )


def is_reference_file(path: Path) -> bool:
    """Whether ``path`` is a file that `Reference.save` wrote (of any version), not an ``.npz`` of something else."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {"format.npy", "extractor.npy", "kind.npy"} <= set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def chain_hash(content: str, image: Tensor) -> str:
    """Continue the hash ``content`` (empty at the start) by images uint8 (B, 3, H, W), one after the other.

    The batches in which they come make no difference; their order does.
    """
    for pixels in image.cpu().contiguous().numpy():
        shape = ",".join(map(str, pixels.shape)).encode()
        content = hashlib.sha256(content.encode() + shape + pixels.tobytes()).hexdigest()
    return content


def _gaussian_arrays(gaussian: Gaussian, prefix: str) -> dict[str, np.ndarray]:
    return {
        f"{prefix}n": np.array(-1 if gaussian.n is None else gaussian.n),
        f"{prefix}mean": gaussian.mean.double().cpu().numpy(),
        f"{prefix}cov": gaussian.cov.double().cpu().numpy(),
    }


def _gaussian(arrays: dict[str, np.ndarray], prefix: str) -> Gaussian:
    n = int(arrays[f"{prefix}n"])
    mean, cov = (torch.from_numpy(arrays[f"{prefix}{name}"]) for name in ("mean", "cov"))
    return Gaussian(mean=mean, cov=cov, n=None if n < 0 else n)
