"""Images of one split by number: members located once, then one read and one decode each."""

import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from smalto.data.annotations import class_number, read_labels
from smalto.data.folder_scan import told
from smalto.data.foreign import one_line
from smalto.data.pictures import check_file_size
from smalto.data.shards import Member, ShardFiles, split_key, tar_members
from smalto.data.tar_records import is_image, record_key, roles
from smalto.data.transforms import decode_image
from smalto.errors import InputError

log = logging.getLogger(__name__)


class ImageReader:
    """Random access to the images of a split.

    Args:
        path: folder of image shards.
        meta: its meta.json, or what ``scan_foreign`` says instead.
        split: ``train`` or ``val``; a split that is not there is empty.

    Attributes:
        labels: int64 (N,); -1 where the images have no labels.
        paths: the shards.

    Raises:
        ValueError: a shard holds other than what meta.json says.
    """

    def __init__(self, path: str | Path, meta: dict[str, Any], split: str) -> None:
        shards = meta["splits"].get(split, {"shards": []})["shards"]
        self.paths = [Path(path) / shard["name"] for shard in shards]
        self._files = ShardFiles(self.paths)
        places: list[tuple[int, int, int]] = []
        labels: list[int] = []
        self._encoding = meta["encoding"]
        for number, (file, shard) in enumerate(zip(self.paths, shards, strict=True)):
            found = _locate_images(file, self._encoding)
            if len(found) != shard.get("num_images", len(found)):
                raise InputError(
                    f"{file} holds {len(found)} images, meta.json says {shard['num_images']}; prepare it again"
                )
            places += [(number, offset, size) for offset, size, _, _ in found]
            labels += [label for _, _, label, _ in found]
        self._places = np.array(places, np.int64).reshape(-1, 3)
        self.labels = np.array(labels, np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def keys(self) -> list[str]:
        """Member name of each image without its suffix; walks the shards again."""
        return [key for file in self.paths for _, _, _, key in _locate_images(file, self._encoding)]

    def read(self, index: int) -> Image.Image:
        """Image ``index``, RGB.

        Raises:
            ValueError: damaged.
        """
        number, offset, size = map(int, self._places[index])
        try:
            check_file_size(size)
            return decode_image(self._files.read(number, size, offset))
        except ValueError as error:
            raise InputError(f"image {index} in {self.paths[number]} is damaged: {error}") from error

    def pixels(self, indices: np.ndarray) -> np.ndarray:
        """Images of equal size as uint8 (len(indices), 3, H, W)."""
        return stack_pixels([self.read(int(index)) for index in indices])


def stack_pixels(images: list[Image.Image]) -> np.ndarray:
    """RGB pictures of equal size as one fresh uint8 (B, 3, H, W)."""
    stacked = np.empty((len(images), 3, images[0].height, images[0].width), np.uint8)
    for planes, image in zip(stacked, images, strict=True):
        for plane, band in zip(planes, image.split(), strict=True):  # a third of the time of stacking and transposing
            plane[:] = np.asarray(band)
    return stacked


def _locate_images(path: Path, encoding: str | None) -> list[tuple[int, int, int, str]]:
    """Offset, size, label (-1: none) and key of every image of a shard, in order; ``encoding`` None: of any kind."""
    found = _foreign_pairs(path) if encoding is None else _own_pairs(path, encoding)
    with path.open("rb") as file:
        return [
            (image.offset, image.size, -1 if cls is None else _label(file.fileno(), cls, path), key)
            for key, (image, cls) in found.items()
        ]


def _own_pairs(path: Path, encoding: str) -> dict[str, tuple[Member, Member | None]]:
    """Image and label of each key of a shard that ``smalto`` wrote."""
    images: dict[str, Member] = {}
    labels: dict[str, Member] = {}
    for member in tar_members(path):
        key, suffix = split_key(member.name)
        if suffix == encoding:
            if key in images:
                raise InputError(f"{path} holds two images with the key {key}; write the shard with unique keys")
            images[key] = member
        elif suffix == "cls":
            labels[key] = member
    return {key: (image, labels.get(key)) for key, image in images.items()}


def _foreign_pairs(path: Path) -> dict[str, tuple[Member, Member | None]]:
    """Image and label of each key of a shard of others; what is left out is told."""
    found: dict[str, dict[str, Member]] = {}
    skipped: Counter[str] = Counter()
    for member in tar_members(path, skipped):
        place = record_key(member.name)
        if place is None:
            skipped["hidden or system"] += 1
            continue
        key, suffix = place
        if suffix in found.setdefault(key, {}):
            twice = f"two images with the key {one_line(key)}" if is_image(suffix) else f"{one_line(member.name)} twice"
            raise InputError(f"{path} holds {twice}; write the shard with unique keys")
        found[key][suffix] = member
    pairs: dict[str, tuple[Member, Member | None]] = {}
    for key, members in found.items():
        parts = roles(key, members, path)
        if parts is None:
            skipped["keys without an image"] += 1
        else:
            pairs[key] = members[parts.image], None if parts.label is None else members[parts.label]
    if skipped:
        log.warning("%s: %s", path, told(skipped))
    return pairs


def _label(file: int, cls: Member, path: Path) -> int:
    """A ``cls`` member as a number; -1: none, or said to be none."""
    text = os.pread(file, min(cls.size, _LABEL), cls.offset).strip()
    if (text.isdigit() and len(text) < 10) or text == b"-1":
        return int(text)
    place = f"{one_line(cls.name)} in {path}"
    try:
        label = read_labels([text.decode("utf-8-sig", errors="replace")], lambda _: place)[0]
        if isinstance(label, str):
            raise InputError(f"{place} is the word {label!r}, which has no number here")
        return -1 if label is None else class_number(label, {}, place) or 0
    except InputError as error:
        raise InputError(f"{error}. smalto prepare source=tar counts and names what cannot be used") from error


_LABEL = 1024  # bytes of a cls member that are looked at
