"""Sets of finished images, as evaluation meets them: a folder, an ``.npz`` in ADM's layout, or image shards."""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from smalto.arrays import npz_array
from smalto.data.content import content_hash
from smalto.data.folder_scan import find_pictures, told
from smalto.data.foreign import reading
from smalto.data.npz_images import npz_names, open_npz_images
from smalto.data.patterns import is_foreign, scan_foreign
from smalto.data.pictures import open_picture, read_picture_file
from smalto.data.reader import ImageReader, stack_pixels
from smalto.data.shards import IMAGES, META, read_meta
from smalto.data.transforms import center_crop, decode_image
from smalto.errors import InputError, MissingFile

log = logging.getLogger(__name__)

Split = Literal["train", "val"]
INDEX_KEY = "index"
"""Array of an ``.npz`` file that says the number of each image."""


class PictureSet(ABC):
    """A number of images of one size, read by number.

    Attributes:
        path: where they are.
        num_classes: of the labels; None for images without.
        labels: int64 (N,); None for images without.
        settings: what decides the pixels, for protocols and cache keys; plain values.
    """

    path: Path
    num_classes: int | None = None
    labels: Tensor | None = None
    settings: dict[str, Any]

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Tensor:
        """Images uint8 (B, 3, H, W).

        Raises:
            ValueError: an image that cannot be used: damaged, 16-bit, of another size than the others.
        """

    @abstractmethod
    def fingerprint(self, memory: Path | None = None) -> str:
        """Hash of what the files hold; ``memory`` see `content_hash`."""

    @property
    def named(self) -> bool:
        """Whether images have names of their own, not only places."""
        return False

    def name(self, index: int) -> str:
        """Of one image, by which pairs of two sets are matched; its place where it has no name."""
        return f"{index:06d}"


class FolderPictures(PictureSet):
    """Image files below a folder, in the order of their paths; the first says the size unless ``image_size`` does.

    Args:
        path: the folder.
        image_size: side to which images are cropped as ADM does; None takes them as they are.

    Raises:
        FileNotFoundError: no folder, or no images in it.
    """

    def __init__(self, path: Path, *, image_size: int | None) -> None:
        self.path, self._image_size = path, image_size
        found = find_pictures(path)
        self._names = ["/".join(parts) for parts in found.files]
        if found.skipped:
            log.info("%s: %d images, %s", path, len(self._names), told(found.skipped))
        self._size = (image_size, image_size) if image_size else self._open(0).size
        self.settings = {"path": str(path), "image_size": image_size, "crop": "center" if image_size else "none"}

    def __len__(self) -> int:
        return len(self._names)

    @property
    def named(self) -> bool:
        """See the base class."""
        return True

    def name(self, index: int) -> str:
        """Path below the folder without its suffix: a PNG and a JPEG of one image are a pair."""
        return str(Path(self._names[index]).with_suffix(""))

    def read(self, indices: Sequence[int]) -> Tensor:
        """See the base class; decodes in threads."""
        with ThreadPoolExecutor(4) as pool:
            pixels = list(pool.map(self._pixels, indices))
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()

    def fingerprint(self, memory: Path | None = None) -> str:
        """Of the names and bytes of the files."""
        content = content_hash([self.path / name for name in self._names], memory=memory)
        return _digest([self._names, content])

    def _pixels(self, index: int) -> np.ndarray:
        image = self._open(index)
        if self._image_size and image.size != self._size:
            image = center_crop(image, self._image_size)
        if image.size != self._size:
            raise InputError(
                f"{self.path} holds images of several sizes: {self._names[0]} has {self._size[0]}x{self._size[1]} "
                f"pixels, {self._names[index]} has {image.width}x{image.height}; give image_size=SIDE to crop them all"
            )
        return np.asarray(image)

    def _open(self, index: int) -> Image.Image:
        try:
            data = read_picture_file(self.path / self._names[index])
            mode = open_picture(data).mode
            if mode.startswith(("I", "F")):
                raise InputError(f"its pixels have more than 8 bits (mode {mode}); convert it to 8-bit RGB")
            return decode_image(data)
        except (ValueError, OSError) as error:
            raise InputError(f"{self.path / self._names[index]}: {error}") from error


class NpzPictures(PictureSet):
    """The images ``arr_0`` of an ``.npz`` file, in place; labels are ``labels``, or ADM's ``arr_1``.

    ``index`` says the number of each image, as ``smalto sample`` writes it: the images are stored shuffled.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no ``arr_0``, or not uint8 (N, H, W, 3); an ``index`` that does not number them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._images, labels = open_npz_images(path)
        self.settings = {"path": str(path), "image_size": self._images.shape[1], "crop": "none"}
        if labels is not None:
            self.labels = torch.from_numpy(labels.astype(np.int64))
            self.num_classes = int(labels.max()) + 1
        self._index = _npz_index(path, len(self._images))

    def __len__(self) -> int:
        return len(self._images)

    @property
    def named(self) -> bool:
        """See the base class."""
        return self._index is not None

    def name(self, index: int) -> str:
        """By ``index`` of the file."""
        return super().name(index if self._index is None else int(self._index[index]))

    def read(self, indices: Sequence[int]) -> Tensor:
        """See the base class."""
        pixels = np.ascontiguousarray(self._images[np.asarray(indices)])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def fingerprint(self, memory: Path | None = None) -> str:
        """Of the file."""
        return _digest([content_hash([self.path], memory=memory)])


class ShardPictures(PictureSet):
    """One split of image shards, centre-cropped where they do not have ``image_size``, never mirrored.

    ``split`` None is val where there are such images, else train: samples as ``smalto sample`` writes them.

    Raises:
        ValueError: no images in the split, or no ``image_size`` where the images have several.
    """

    def __init__(self, path: Path, *, image_size: int | None, split: Split | None) -> None:
        meta = scan_foreign(path) if is_foreign(path) else read_meta(path, IMAGES)
        if split is None:
            split = "val" if meta["splits"].get("val", {}).get("shards") else "train"
        stored = meta["image_size"]
        if image_size is None and (stored is None or stored[0] != stored[1]):
            raise InputError(f"{path} holds images of several shapes; give image_size=SIDE to crop them all")
        self._side = image_size or stored[0]
        self._reader = ImageReader(path, meta, split)
        if not len(self._reader):
            raise InputError(
                f"{path} has no {split} images; choose the other with reference_split=, or prepare with "
                "val_fraction > 0"
            )
        self._crop = stored is None or tuple(stored) != (self._side, self._side)
        self.path = path
        self.settings = {
            "path": str(path),
            "split": split,
            "image_size": self._side,
            "crop": "center" if self._crop else "none",
        }
        if self._reader.labels.min() >= 0:
            self.labels = torch.from_numpy(self._reader.labels)
            self.num_classes = meta["num_classes"] or int(self._reader.labels.max()) + 1

    def __len__(self) -> int:
        return len(self._reader)

    def read(self, indices: Sequence[int]) -> Tensor:
        """See the base class."""
        if not self._crop:
            return torch.from_numpy(self._reader.pixels(np.asarray(indices)))
        return torch.from_numpy(stack_pixels([center_crop(self._reader.read(int(i)), self._side) for i in indices]))

    def fingerprint(self, memory: Path | None = None) -> str:
        """Of the shards of the split, and of meta.json where there is one."""
        meta = self.path / META
        return _digest([content_hash([*([meta] if meta.is_file() else []), *self._reader.paths], memory=memory)])


def open_pictures(path: str | Path, *, image_size: int | None = None, split: Split | None = "val") -> PictureSet:
    """The images at ``path``, whatever holds them.

    Args:
        path: a folder of images, an ``.npz`` file with ``arr_0``, or image shards (a folder, a tar, a pattern).
        image_size: crop images to this side, as ADM does; None takes them as they are.
        split: of image shards; None: val where there are such images, else train.

    Raises:
        FileNotFoundError: nothing there, or no images.
        ValueError: images that cannot be used.
    """
    path = Path(path)
    if path.suffix == ".npz":
        pictures = NpzPictures(path)
        if image_size not in (None, pictures.settings["image_size"]):
            raise InputError(
                f"{path} has images of {pictures.settings['image_size']} px, image_size is {image_size}; resize them "
                "before they are packed: how they are resized is part of a protocol"
            )
        return pictures
    if (path / META).is_file() or is_foreign(path):
        return ShardPictures(path, image_size=image_size, split=split)
    if not path.is_dir():
        raise MissingFile(f"no folder, .npz file or image shards at {path}; check the path")
    return FolderPictures(path, image_size=image_size)


def _npz_index(path: Path, count: int) -> np.ndarray | None:
    """Number of each image, int64 (count,); None when the file does not tell."""
    if INDEX_KEY not in npz_names(path):
        return None
    with reading(f"{path}: {INDEX_KEY} cannot be read"):
        index = np.array(npz_array(path, INDEX_KEY, mapped=False))
    if index.shape != (count,) or index.dtype.kind not in "iu" or len(np.unique(index)) != count or index.min() < 0:
        raise InputError(
            f"{path}: {INDEX_KEY} must hold the number of each of its {count} images, none twice; it is {index.dtype} "
            f"{index.shape}. Remove it to count the images in their order"
        )
    return index


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
