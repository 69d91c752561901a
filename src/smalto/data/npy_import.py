"""Code shards from the authors' layout of codes, one small file an image.

``FOLDER/NAME_codes/I.npy`` is int64 (1, crops, tokens), ``FOLDER/NAME_labels/I.npy`` int64 (1,). The name of the folder
says what the crops are: ``..._flip_ten_crop`` (ten, range 1.1), ``..._flip_ten_crop_105`` (ten, range 1.05),
``..._flip`` (centre and its mirror).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smalto import __version__
from smalto.arrays import npy_array
from smalto.data.annotations import MAX_LABEL
from smalto.data.codes import add_code_block, add_row_sums, code_dtype
from smalto.data.crops import CROPS, KINDS, codes_summary, crop_names
from smalto.data.foreign import reading
from smalto.data.output import OutputFolder
from smalto.data.progress import progress
from smalto.data.shards import CODES
from smalto.data.write import TarShard
from smalto.errors import InputError, MissingFile
from smalto.types import ReadyTokenizer


def import_codes(
    tokenizer: ReadyTokenizer,
    sources: Mapping[str, str | Path],
    *,
    out: str | Path,
    block_size: int,
    shard_size: int,
    overwrite: bool,
) -> dict[str, Any]:
    """Turn codes in the authors' layout into code shards in ``out``.

    Args:
        tokenizer: that wrote the codes; they are taken as its own.
        sources: folder with ``*_codes`` and ``*_labels`` for ``train`` and, if there is one, ``val``.
        out: folder of the code shards.
        block_size: images in a block.
        shard_size: images in a shard, rounded up to whole blocks.
        overwrite: remove what an earlier job left in ``out``.

    Returns:
        As ``extract_codes``.
    """
    if not set(sources) <= {"train", "val"} or "train" not in sources:
        raise InputError(f"from_npy has {', '.join(sources)}; give a folder, or {{train: FOLDER, val: FOLDER}}")
    code_shape = [list(grid) for grid in tokenizer.code_shape]
    num_tokens = sum(height * width for height, width in code_shape)
    codes = {
        split: NpyCodes(path, codebook_size=tokenizer.codebook_size, num_tokens=num_tokens)
        for split, path in sources.items()
    }
    layouts = {(c.kind, tuple(c.ranges)) for c in codes.values()}
    if len(layouts) > 1:
        raise InputError(f"training and validation codes have different crops: {sorted(layouts)}")
    kind, ranges = layouts.pop()
    names = crop_names(kind, ranges)
    described = {
        "codebook_size": tokenizer.codebook_size,
        "code_shape": code_shape,
        "crops": names,
        "crop_range": list(ranges),
        "image_size": tokenizer.image_size,
    }
    shard_size = -(-shard_size // block_size) * block_size
    settings = {
        **described,
        "tokenizer": tokenizer.fingerprint,
        "from_npy": {split: str(path) for split, path in sources.items()},
        "block_size": block_size,
        "shard_size": shard_size,
    }
    folder = OutputFolder(
        out,
        format=CODES,
        settings=settings,
        command="smalto extract",
        overwrite=overwrite,
        reads=list(sources.values()),
    )
    with folder:
        if folder.finished is not None:
            return codes_summary(folder, "reused", names)
        folder.begin()
        splits, num_classes = _import_npy(folder, codes, block_size=block_size, shard_size=shard_size)
        folder.finish(
            {
                "splits": splits,
                "num_classes": num_classes,
                "classes": [],
                **described,
                "tokenizer": {"path": str(tokenizer.path), "fingerprint": tokenizer.fingerprint},
                "images": {"path": str(sources["train"]), "sha256": None},
                "text": None,
                "dtype": code_dtype(tokenizer.codebook_size).__name__,
                "smalto_version": __version__,
            }
        )
        return codes_summary(folder, "written", names)


class NpyCodes:
    """Codes of a split in the authors' layout; folders of several crop ranges are put side by side.

    A folder ``X_ten_crop`` takes its sibling ``X_ten_crop_105`` along, as the authors' loader does.

    Args:
        path: the folder that holds ``*_codes`` and ``*_labels``.
        codebook_size: all codes must be below.
        num_tokens: of an image.

    Attributes:
        ranges: crop range of each folder, by its name.
        kind: ``ten``, ``center_flip`` or ``center``, by the number of crops.

    Raises:
        FileNotFoundError: not the layout, or no file for an image.
        ValueError: arrays of another shape, codes beyond the codebook.
    """

    def __init__(self, path: str | Path, *, codebook_size: int, num_tokens: int) -> None:
        path = Path(path)
        sibling = path.with_name(path.name + "_105")
        paths = [path, sibling] if path.name.endswith("ten_crop") and sibling.is_dir() else [path]
        self._codebook_size, self._num_tokens = codebook_size, num_tokens
        self._codes, labels = zip(*map(_subfolders, paths), strict=True)
        self._labels = labels[0]
        self._numbers = sorted(int(p.stem) for p in self._codes[0].glob("*.npy") if p.stem.isdigit())
        if not self._numbers:
            raise MissingFile(f"no NUMBER.npy in {self._codes[0]}")
        code_dtype(codebook_size)  # or it cannot be stored
        first = _load(self._codes[0] / f"{self._numbers[0]}.npy", None)
        if first.ndim != 3 or first.shape[1] not in KINDS:
            raise InputError(f"{self._codes[0]} holds arrays of shape {first.shape}, must be (1, 1 or 2 or 10, tokens)")
        self.kind = KINDS[first.shape[1]]
        self.ranges = [_range(p.name) if self.kind == "ten" else 1.0 for p in paths]

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Images ``start`` to ``stop`` in the order of their numbers: codes (n, crops, tokens), labels int64 (n,)."""
        shape = (1, len(CROPS[self.kind]), self._num_tokens)
        rows = []
        for number in self._numbers[start:stop]:
            parts = [_load(folder / f"{number}.npy", shape) for folder in self._codes]
            codes = np.concatenate(parts, axis=1)[0]
            if codes.min() < 0 or codes.max() >= self._codebook_size:
                raise InputError(
                    f"image {number} in {self._codes[0].parent} has codes from {codes.min()} to {codes.max()}, the "
                    f"tokenizer's codebook has {self._codebook_size}; give the tokenizer_ckpt that wrote them"
                )
            rows.append(codes.astype(code_dtype(self._codebook_size)))
        labels = [_load(self._labels / f"{number}.npy", (1,))[0] for number in self._numbers[start:stop]]
        for number, label in zip(self._numbers[start:stop], labels, strict=True):
            if not 0 <= label <= MAX_LABEL:
                raise InputError(f"image {number} in {self._labels} has the label {label}; labels count from 0")
        return np.stack(rows), np.array(labels, np.int64)


def _import_npy(
    folder: OutputFolder, sources: Mapping[str, NpyCodes], *, block_size: int, shard_size: int
) -> tuple[dict[str, Any], int]:
    """Write the shards that ``folder`` has not got yet.

    Returns:
        ``splits`` of meta.json, and the number of classes.
    """
    splits: dict[str, Any] = {}
    with progress("import", total=sum(map(len, sources.values()))) as advance:
        for split, codes in sources.items():
            names = []
            for number, start in enumerate(range(0, len(codes), shard_size)):
                names.append(f"{split}-{number:05d}.tar")
                stop = min(start + shard_size, len(codes))
                if names[-1] not in folder.done:
                    blocks = range(start, stop, block_size)
                    _write_shard(folder, names[-1], codes, blocks, stop, block_size)
                advance(stop - start)
            shards = [folder.done[name] for name in names]
            splits[split] = {"num_images": len(codes), "shards": [_without(s, "max_label") for s in shards]}
    return splits, 1 + max(shard["max_label"] for shard in folder.done.values())


def _without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}


def _write_shard(
    folder: OutputFolder, name: str, codes: NpyCodes, blocks: Iterable[int], stop: int, block_size: int
) -> None:
    images, highest, sums = 0, -1, []
    with TarShard(folder.path / name) as tar:
        for start in blocks:
            array, labels = codes.read(start, min(start + block_size, stop))
            sums.append(add_code_block(tar, start // block_size, array, labels))
            images, highest = images + len(labels), max(highest, int(labels.max()))
        add_row_sums(tar, sums)
        folder.record({**tar.close(), "num_images": images, "max_label": highest})


def _range(name: str) -> float:
    """What a folder's name says: ``ten_crop`` is 1.1, ``ten_crop_105`` 1.05."""
    found = re.search(r"ten_crop(?:_(\d{3}))?$", name)
    return int(found[1]) / 100 if found and found[1] else 1.1


def _subfolders(path: Path) -> tuple[Path, Path]:
    found: list[Sequence[Path]] = [sorted(path.glob(f"*_{kind}")) for kind in ("codes", "labels")]
    if [len(paths) for paths in found] != [1, 1]:
        raise MissingFile(f"{path} must hold one folder *_codes and one *_labels, as the authors' scripts write")
    return found[0][0], found[1][0]


def _load(path: Path, shape: tuple[int, ...] | None) -> np.ndarray:
    """An array of whole numbers; ``shape`` None: any."""
    if not path.is_file():
        raise MissingFile(f"{path} is missing; every image needs its codes in each range, and a label")
    with reading(f"{path} is not a whole .npy file"):
        array = npy_array(path)
    if array.dtype.kind not in "iu":
        raise InputError(f"{path} holds {array.dtype}; codes and labels are whole numbers")
    if shape is not None and array.shape != shape:
        raise InputError(f"{path} has shape {array.shape}, must be {shape} for this tokenizer")
    return np.array(array)
