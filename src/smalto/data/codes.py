"""Codes for training a generator: packed shards, read in place, gathered a batch at a time."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from smalto.data.annotations import check_range
from smalto.data.module import StatelessDataModule
from smalto.data.order import sample_uniform
from smalto.data.shards import CODES, Member, ShardFiles, map_member, read_meta, tar_members
from smalto.data.text_blocks import TextReader
from smalto.data.write import TarShard, npy_bytes
from smalto.errors import InputError

_CROP = 1  # stream number of the choice of crop


def code_dtype(codebook_size: int) -> type[np.uint16] | type[np.uint32]:
    """Smallest stored type that holds every code.

    Raises:
        ValueError: no stored type does.
    """
    if not 0 < codebook_size <= 2**32:
        raise InputError(f"codebook_size is {codebook_size}; codes are stored in 32 bits, it must be in 1..{2**32}")
    return np.uint16 if codebook_size <= 2**16 else np.uint32


def add_code_block(shard: TarShard, block: int, codes: np.ndarray, labels: np.ndarray) -> None:
    """Append block number ``block`` of a split to ``shard``.

    Args:
        shard: being written.
        block: counts from 0 in the split.
        codes: uint16 or uint32 (n, crops, tokens).
        labels: int64 (n,).
    """
    shard.add(f"{block:06d}.codes.npy", npy_bytes(codes))
    shard.add(f"{block:06d}.label.npy", npy_bytes(labels))


class CodeReader:
    """Codes of one split by image number; nothing is read before it is asked for.

    What is kept is the place of each block, and the labels; the codes of an image in one crop are one read in the tar.

    Args:
        path: folder of code shards.
        meta: its meta.json.
        split: ``train`` or ``val``; a split that is not there is empty.

    Attributes:
        labels: int32 (N,).

    Raises:
        ValueError: a shard holds other than what meta.json says.
    """

    def __init__(self, path: str | Path, meta: dict[str, Any], split: str) -> None:
        self._num_crops = len(meta["crops"])
        self._num_tokens = sum(height * width for height, width in meta["code_shape"])
        self._dtype = np.dtype(meta["dtype"])
        shards = meta["splits"].get(split, {"shards": []})["shards"]
        self._files = ShardFiles([Path(path) / shard["name"] for shard in shards])
        counts: list[int] = []  # images of each block
        blocks: list[tuple[int, int]] = []  # shard and offset of each
        labels = [np.zeros(0, np.int32)]
        for number, (file, shard) in enumerate(zip(self._files.paths, shards, strict=True)):
            before = sum(counts)
            for member in tar_members(file):
                if member.name.endswith(".label.npy"):
                    labels.append(np.array(map_member(file, member), np.int32))
                elif member.name.endswith(".codes.npy"):
                    block = map_member(file, member)
                    self._check(block, member, file)
                    blocks.append((number, block.offset))
                    counts.append(len(block))
            if sum(counts) - before != shard["num_images"]:
                raise InputError(
                    f"{file} holds codes of {sum(counts) - before} images, meta.json says {shard['num_images']}; "
                    "extract it again with overwrite=true"
                )
        self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])  # image of each block, and the total
        self._shard, self._offset = np.array(blocks, np.int64).reshape(-1, 2).T
        self.labels = np.concatenate(labels)
        if len(self.labels) != len(self):
            raise InputError(f"{path} holds {len(self.labels)} labels for the codes of {len(self)} images of {split}")

    def __len__(self) -> int:
        return int(self._first[-1])

    def _check(self, block: np.memmap, member: Member, file: Path) -> None:
        if block.dtype != self._dtype or block.shape[1:] != (self._num_crops, self._num_tokens):
            raise InputError(
                f"{member.name} in {file} is {block.dtype} {block.shape}, meta.json says {self._dtype} "
                f"(n, {self._num_crops}, {self._num_tokens}); extract it again with overwrite=true"
            )

    def gather(self, indices: np.ndarray, crops: np.ndarray) -> np.ndarray:
        """Codes of images ``indices``, each in its crop: int64 (B, tokens).

        Args:
            indices: (B,) image numbers.
            crops: (B,) numbers of stored crops.

        Raises:
            ValueError: a shard became shorter since it was opened.
        """
        block = np.searchsorted(self._first, indices, side="right") - 1
        size = self._num_tokens * self._dtype.itemsize
        offsets = self._offset[block] + ((indices - self._first[block]) * self._num_crops + crops) * size
        files = [self._files.descriptor(number) for number in range(len(self._files.paths))]
        places = zip(self._shard[block].tolist(), offsets.tolist(), strict=True)
        rows = b"".join([os.pread(files[shard], size, offset) for shard, offset in places])
        if len(rows) != size * len(indices):
            raise InputError(f"a shard of {self._files.paths[0].parent} was cut short while it was in use; restore it")
        return np.frombuffer(rows, self._dtype).reshape(len(indices), self._num_tokens).astype(np.int64)


class CodeShards(StatelessDataModule):
    """Batches ``{"codes": int64 (B, L), "label": int64 (B,)}`` from a folder of code shards.

    With ``condition=text`` they are ``{"codes", "text": float32 (B, T, C), "text_mask": bool (B, T)}``: the first T
    tokens of the stored features, shorter texts after zeros.

    A training image appears in one of its stored crops, chosen by (seed, epoch, image); validation
    always takes the centre, not mirrored.

    Args:
        path: folder that ``smalto extract`` wrote.
        batch_size: global.
        num_workers: processes that gather; 0 is enough for any model, a batch takes under a millisecond.
        seed: of order and crops.
        codebook_size: of the tokenizer the model is built for.
        code_shape: of that tokenizer: [[h, w]], one pair per scale.
        crops: which training draws from: ``all`` stored, ``no_flip`` those not mirrored, ``center`` only.
        tokenizer_fingerprint: weights the codes must come from; None: any with the same codebook and shape.
        val_batch_size: global; None: as ``batch_size``.
        condition: ``label``, or ``text`` if the shards hold text features.
        text_tokens: T, with ``condition=text``.

    Attributes:
        num_train: training images.
        num_val: validation images.
        num_classes: None for images without labels.
        classes: names; may be empty.
        meta: the whole meta.json.

    Raises:
        ValueError: shards of another tokenizer, crops that are not stored, image shards, arguments out
            of range.
        FileNotFoundError: nothing extracted at ``path``.
    """

    def __init__(
        self,
        *,
        path: str | Path,
        batch_size: int,
        seed: int,
        codebook_size: int,
        code_shape: Sequence[Sequence[int]],
        crops: Literal["all", "center", "no_flip"],
        num_workers: int = 0,
        tokenizer_fingerprint: str | None = None,
        val_batch_size: int | None = None,
        condition: Literal["label", "text"] = "label",
        text_tokens: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, val_batch_size=val_batch_size, num_workers=num_workers, seed=seed)
        if condition not in ("label", "text") or (condition == "text") != (text_tokens is not None and text_tokens > 0):
            raise InputError(
                f"condition is {condition!r} and text_tokens is {text_tokens}; condition must be label (with "
                "text_tokens=null) or text (with text_tokens, the length of the model's prefix)"
            )
        if crops not in ("all", "center", "no_flip"):
            raise InputError(f"crops is {crops!r}; it must be all, center or no_flip")
        self.path = Path(path)
        self._codebook_size = codebook_size
        self._code_shape = [list(scale) for scale in code_shape]
        self._crops = crops
        self._fingerprint = tokenizer_fingerprint
        self._text_tokens = text_tokens
        self._readers: dict[str, CodeReader] = {}
        self._texts: dict[str, TextReader] = {}

    def setup(self, stage: str | None = None) -> None:
        """Check the shards against the model and locate the codes; a second call does nothing."""
        if self._readers:
            return
        self.meta = read_meta(self.path, CODES)
        self._check_tokenizer()
        names: list[str] = self.meta["crops"]
        plain = [number for number, name in enumerate(names) if not _is_mirrored(name)]
        centers = [number for number in plain if names[number].partition("@")[0] == "center"]
        if not centers:
            raise InputError(
                f"{self.path} has no centre crop, which validation needs (it has {', '.join(names)}); "
                "run smalto extract again with crops=ten, center_flip or center"
            )
        self._val_crop = centers[0]
        self._train_crops = np.array({"all": range(len(names)), "no_flip": plain, "center": centers}[self._crops])
        self.num_classes: int | None = self.meta["num_classes"]
        self.classes: list[str] = self.meta["classes"]
        if self._text_tokens is not None:
            self._texts = {split: TextReader(self.path, self.meta, split) for split in ("train", "val")}
        self._readers = {split: CodeReader(self.path, self.meta, split) for split in ("train", "val")}
        if self._text_tokens is None and self.num_classes is not None:
            for split, reader in self._readers.items():
                check_range(reader.labels, self.num_classes, f"{split} in {self.path}")
        self.num_train, self.num_val = (len(self._readers[split]) for split in ("train", "val"))

    def fetch_train(self, epoch: int, indices: np.ndarray) -> dict[str, Tensor]:
        """Training codes, each in the crop of this epoch."""
        draws = sample_uniform(self.seed, epoch, indices, _CROP)
        return self._batch("train", indices, self._train_crops[(draws * len(self._train_crops)).astype(np.int64)])

    def fetch_val(self, epoch: int, indices: np.ndarray) -> dict[str, Tensor]:
        """Validation codes of the centre crop."""
        return self._batch("val", indices, np.full(len(indices), self._val_crop))

    def class_frequencies(self) -> np.ndarray:
        """Share of each class among the training images, float64 (num_classes,), sum 1.

        Raises:
            ValueError: the images have no labels.
        """
        if self.num_classes is None:
            raise InputError(f"the images of {self.path} have no labels")
        return np.bincount(self._readers["train"].labels, minlength=self.num_classes) / self.num_train

    def code_histogram(self, split: Literal["train", "val"] = "train") -> np.ndarray:
        """How often each code occurs in the centre crops of ``split``: int64 (codebook_size,)."""
        reader = self._readers[split]
        counts = np.zeros(self._codebook_size, np.int64)
        for start in range(0, len(reader), 4096):
            indices = np.arange(start, min(start + 4096, len(reader)))
            codes = reader.gather(indices, np.full(len(indices), self._val_crop))
            counts += np.bincount(codes.ravel(), minlength=self._codebook_size)
        return counts

    def _batch(self, split: str, indices: np.ndarray, crops: np.ndarray) -> dict[str, Tensor]:
        reader = self._readers[split]
        codes = torch.from_numpy(reader.gather(indices, crops))
        if self._text_tokens is None:
            return {"codes": codes, "label": torch.from_numpy(reader.labels[indices].astype(np.int64))}
        text, mask = self._texts[split].gather(indices, self._text_tokens)
        return {"codes": codes, "text": torch.from_numpy(text), "text_mask": torch.from_numpy(mask)}

    def _check_tokenizer(self) -> None:
        meta, problems = self.meta, []
        if meta["codebook_size"] != self._codebook_size:
            problems.append(f"codebook_size {meta['codebook_size']}, the model expects {self._codebook_size}")
        if meta["code_shape"] != self._code_shape:
            problems.append(f"code_shape {meta['code_shape']}, the model expects {self._code_shape}")
        found = meta["tokenizer"]["fingerprint"]
        if self._fingerprint is not None and found != self._fingerprint:
            problems.append(f"tokenizer weights {found}, the model expects {self._fingerprint}")
        if problems:
            raise InputError(
                f"{self.path} was extracted with {'; '.join(problems)}. It was made by "
                f"{meta['tokenizer']['path']}: "
                "choose the tokenizer options that match it, or run smalto extract with the "
                "tokenizer you train for "
                "and set data.path to its out="
            )


def _is_mirrored(crop: str) -> bool:
    return crop.partition("@")[0].endswith("_flip")
