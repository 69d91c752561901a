"""Code shards in the authors' layout, one small file an image; see ``npy_import`` for it."""

from pathlib import Path

import numpy as np

from smalto.data.codes import CodeReader
from smalto.data.crops import KINDS
from smalto.data.progress import Advance, progress
from smalto.data.shards import CODES, read_meta
from smalto.errors import PathInUse
from smalto.files import commit


def export_npy(path: str | Path, to: str | Path) -> list[Path]:
    """Write the code shards in ``path`` in the authors' layout; the folders begin with ``to``.

    Training images go to ``TO_flip_ten_crop`` and the like, validation images to ``TO_val_flip_ten_crop``.

    Raises:
        FileExistsError: a folder is there already.
    """
    meta = read_meta(path, CODES)
    crops = len(meta["crops"]) // len(meta["crop_range"])
    folders = []
    for split, entry in meta["splits"].items():
        reader = CodeReader(path, meta, split)
        for number, crop_range in enumerate(meta["crop_range"]):
            folder = Path(f"{to}{'_val' if split == 'val' else ''}{_suffix(KINDS[crops], crop_range)}")
            with progress(folder.name, total=entry["num_images"]) as advance:
                _export(folder, reader, f"imagenet{meta['image_size']}", number * crops, crops, advance)
            folders.append(folder)
    return folders


def _export(folder: Path, reader: CodeReader, name: str, first: int, crops: int, advance: Advance) -> None:
    if folder.exists():
        raise PathInUse(f"{folder} exists already; choose another to_npy=")
    unfinished = folder.with_name(folder.name + ".tmp")
    for kind in ("codes", "labels"):
        (unfinished / f"{name}_{kind}").mkdir(parents=True, exist_ok=True)
    for index in range(len(reader)):
        codes = reader.gather(np.full(crops, index), np.arange(first, first + crops))
        np.save(unfinished / f"{name}_codes" / f"{index}.npy", codes[None])
        np.save(unfinished / f"{name}_labels" / f"{index}.npy", reader.labels[index : index + 1].astype(np.int64))
        advance(1)
    commit(unfinished, folder)


def _suffix(kind: str, crop_range: float) -> str:
    if kind != "ten":
        return {"center_flip": "_flip", "center": ""}[kind]
    return "_flip_ten_crop" + ("" if crop_range == 1.1 else f"_{round(crop_range * 100)}")
