"""Code shards in the authors' layout, one small file an image; see ``npy_import`` for it."""

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smalto.data.codes import CodeReader
from smalto.data.crops import KINDS
from smalto.data.progress import Advance, progress
from smalto.data.shards import CODES, read_meta
from smalto.errors import PathInUse
from smalto.files import TEMPORARY, FileLock, commit, temporary_name


class _Export(NamedTuple):
    """Crops of a split that become one folder."""

    folder: Path
    unfinished: Path
    reader: CodeReader
    first: int


def export_npy(path: str | Path, to: str | Path) -> list[Path]:
    """Write the code shards in ``path`` in the authors' layout; the folders begin with ``to``.

    Training images go to ``TO_flip_ten_crop`` and the like, validation images to ``TO_val_flip_ten_crop``. All folders
    appear together, when all is written; what a killed export began is removed by the next one.

    Raises:
        FileExistsError: a folder is there already, or another process writes it.
    """
    meta = read_meta(path, CODES)
    crops = len(meta["crops"]) // len(meta["crop_range"])
    exports = []
    for split in meta["splits"]:
        reader = CodeReader(path, meta, split)
        for number, crop_range in enumerate(meta["crop_range"]):
            folder = Path(f"{to}{'_val' if split == 'val' else ''}{_suffix(KINDS[crops], crop_range)}")
            exports.append(_Export(folder, temporary_name(folder), reader, number * crops))
    parent = exports[0].folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(parent / f"{Path(to).name}.lock"):
        for export in exports:
            if export.folder.exists():
                raise PathInUse(f"{export.folder} exists already; choose another to_npy=")
        try:
            for export in exports:
                _remove_begun(export.folder)
                with progress(export.folder.name, total=len(export.reader)) as advance:
                    _write(export, f"imagenet{meta['image_size']}", crops, advance)
            for export in exports:
                commit(export.unfinished, export.folder)
        finally:
            for export in exports:
                shutil.rmtree(export.unfinished, ignore_errors=True)
    return [export.folder for export in exports]


def _write(export: _Export, name: str, crops: int, advance: Advance) -> None:
    codes_folder, labels_folder = (export.unfinished / f"{name}_{kind}" for kind in ("codes", "labels"))
    for place in (codes_folder, labels_folder):
        place.mkdir(parents=True)
    for index in range(len(export.reader)):
        codes = export.reader.gather(np.full(crops, index), np.arange(export.first, export.first + crops))
        np.save(codes_folder / f"{index}.npy", codes[None])
        np.save(labels_folder / f"{index}.npy", export.reader.labels[index : index + 1].astype(np.int64))
        advance(1)


def _remove_begun(folder: Path) -> None:
    """What killed exports left; nobody else is at it, by the lock."""
    for other in folder.parent.iterdir():
        if TEMPORARY.fullmatch(other.name) and other.name.rsplit(".", 2)[0] == folder.name and not other.is_symlink():
            shutil.rmtree(other, ignore_errors=True)


def _suffix(kind: str, crop_range: float) -> str:
    if kind != "ten":
        return {"center_flip": "_flip", "center": ""}[kind]
    return "_flip_ten_crop" + ("" if crop_range == 1.1 else f"_{round(crop_range * 100)}")
