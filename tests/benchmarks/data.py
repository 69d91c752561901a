"""Speed of the loaders: ``PYTHONPATH=src:tests python -m benchmarks.data [rounds=9]``. One process, one thread.

Codes from packed shards against one .npy file of codes and one of the label per image, through torch's DataLoader;
JPEGs of 256 px against Pillow and torchvision's transforms. Files are in the page cache. Both sides end in the batch
their training gets: int64 codes; float images in [-1, 1].

Tried, predicted, measured (one core of a Zen 3 EPYC), milliseconds per 256-px JPEG of 28 kB: decoding 0.49 by Pillow,
0.58 by torchvision (same pixels); random crop resized by Pillow 1.6, by torch 0.5, by Pillow inside the crop's box only
1.15 (not kept: 1 value in 1000 differs); floats in [-1, 1] 0.1 to 0.3; stacking 0.14. Pillow and torchvision's
transforms need 1.5 to 2.7 (nothing to resize) and 3.3 to 4 (random crop).
"""

import io
import json
import math
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.paired import interleave
from benchmarks.rows import Row, arguments, time_row
from smalto.data.codes import CodeShards, add_code_block
from smalto.data.images import ImageShards
from smalto.data.transforms import TEN_CROPS, to_float
from smalto.data.write import TarShard
from smalto.files import write_json

SIZE, ENTRIES, BATCH = 256, 16_384, 64


def jpeg(number: int, *, height: int, width: int) -> bytes:
    """A photograph's worth of JPEG, quality 92: coarse colours, smoothly enlarged, with noise."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int64)
    pixels = (smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=92)
    return file.getvalue()


def their_resize(image: Image.Image, size: int) -> np.ndarray:
    """Short side to ``size`` by Pillow: BOX halvings, then BICUBIC."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    return np.array(
        image.resize((round(image.size[0] * scale), round(image.size[1] * scale)), Image.Resampling.BICUBIC)
    )


def their_center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square of it."""
    pixels = their_resize(image, size)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return Image.fromarray(pixels[top : top + size, left : left + size])


def their_random_crop(image: Image.Image, size: int) -> Image.Image:
    """A square at a random scale and place."""
    pixels = their_resize(image, random.randint(size, math.ceil(size / 0.8)))
    top, left = (random.randint(0, room - size) for room in pixels.shape[:2])
    return Image.fromarray(pixels[top : top + size, left : left + size])


class NpyCodes(Dataset):
    """One file of the codes of ten crops and one of the label per image."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        codes = np.load(self.folder / f"codes/{index}.npy")
        crop = int(torch.randint(codes.shape[1], (1,)))
        return torch.from_numpy(codes[:, crop]), torch.from_numpy(np.load(self.folder / f"labels/{index}.npy"))


def code_rows(*, count: int = 2048, rounds: int = 9) -> list[Row]:
    """An epoch over codes."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, ENTRIES, (count, 10, 256)).astype(np.uint16)
    labels = rng.integers(0, 1000, count)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in ("codes", "labels"):
            (folder / kind).mkdir()
        for index in range(count):
            np.save(folder / f"codes/{index}.npy", codes[index : index + 1].astype(np.int64))
            np.save(folder / f"labels/{index}.npy", labels[index : index + 1])
        data = packed_codes(folder, codes, labels)
        loader = data.train_dataloader()
        files = DataLoader(NpyCodes(folder, count), batch_size=BATCH, shuffle=True, drop_last=True)
        seconds = interleave({"shards": lambda _: drain(loader), "files": lambda _: drain(files)}, rounds=rounds)
        return [
            time_row(
                "codes from shards / from .npy files, per image",
                seconds,
                "shards",
                "files",
                items=count,
                goal="<= 0.02",
            )
        ]


def packed_codes(folder: Path, codes: np.ndarray, labels: np.ndarray) -> CodeShards:
    """The same codes as ``smalto extract`` writes them."""
    with TarShard(folder / "train-00000.tar") as shard:
        add_code_block(shard, 0, codes, labels)
        record = shard.close() | {"num_images": len(codes)}
    meta = {
        "format": "smalto-codes",
        "version": 1,
        "splits": {"train": {"num_images": len(codes), "shards": [record]}},
        "num_classes": 1000,
        "classes": [],
        "codebook_size": ENTRIES,
        "code_shape": [[16, 16]],
        "crops": list(TEN_CROPS),
        "dtype": "uint16",
        "tokenizer": {"path": "none", "fingerprint": "none"},
    }
    write_json(folder / "meta.json", meta)
    data = CodeShards(path=folder, batch_size=BATCH, seed=0, codebook_size=ENTRIES, code_shape=[[16, 16]], crops="all")
    data.setup()
    return data


class Pictures(Dataset):
    """JPEG files through Pillow and torchvision's transforms."""

    def __init__(self, files: list[Path], crop: Callable[[Image.Image, int], Image.Image]) -> None:
        self.files = files
        self.transform = transforms.Compose(
            [
                transforms.Lambda(lambda image: crop(image, SIZE)),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5] * 3, [0.5] * 3, inplace=True),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        with self.files[index].open("rb") as file:
            return self.transform(Image.open(file).convert("RGB"))


def image_rows(*, count: int = 128, rounds: int = 9) -> list[Row]:
    """An epoch over JPEGs of 256 px, cropped in the centre (nothing to resize) or at random, and mirrored."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [folder / f"{number:08d}.jpg" for number in range(count)]
        with TarShard(folder / "train-00000.tar") as shard:
            for number, file in enumerate(files):
                file.write_bytes(jpeg(number, height=SIZE, width=SIZE))
                shard.add(file.name, file.read_bytes())
                shard.add(f"{number:08d}.cls", b"0")
            record = shard.close() | {"num_images": count}
        meta = {"format": "smalto-images", "version": 1, "num_classes": 1, "classes": [], "encoding": "jpg"}
        splits = {"train": {"num_images": count, "shards": [record]}}
        write_json(folder / "meta.json", meta | {"splits": splits, "image_size": [SIZE, SIZE]})
        for augment, crop in (("center_crop", their_center_crop), ("random_crop", their_random_crop)):
            theirs = DataLoader(Pictures(files, crop), batch_size=BATCH, shuffle=True, drop_last=True)
            contestants: dict[str, Callable[[int], object]] = {"theirs": lambda _, theirs=theirs: drain(theirs)}
            kinds = ("pillow",) if augment == "center_crop" else ("pillow", "torch")  # the first resizes nothing here
            for resize in kinds:
                ours = image_shards(folder, augment, resize)
                contestants[resize] = lambda _, ours=ours: drain(ours.train_dataloader(), "image")
            seconds = interleave(contestants, rounds=rounds)
            rows += [
                time_row(
                    f"images, {augment}, resize={kind} / Pillow + torchvision, per image",
                    seconds,
                    kind,
                    "theirs",
                    items=count,
                    goal="<= 0.4",
                )
                for kind in kinds
            ]
    return rows


def image_shards(folder: Path, augment: str, resize: str) -> ImageShards:
    """Our loader, without its memory."""
    data = ImageShards(
        path=folder,
        image_size=SIZE,
        batch_size=BATCH,
        augment=augment,
        flip_prob=0.5,
        num_workers=0,
        seed=0,
        cache_mb=0,
        resize=resize,
    )
    data.setup()
    return data


def drain(loader: object, image: str | None = None) -> None:
    """Every batch of an epoch; our uint8 images become floats as in the training step."""
    for batch in loader:
        if image is not None:
            to_float(batch[image])


def main(given: list[str]) -> None:
    """Print the rows as JSON lines."""
    options = arguments(given)
    torch.set_num_threads(1)
    rounds = int(options.get("rounds", 9))
    for row in [*code_rows(rounds=rounds), *image_rows(rounds=rounds)]:
        print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
