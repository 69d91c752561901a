"""Codes for training a generator: packed shards, read in place, gathered a batch at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from smalto.data.annotations import check_range
from smalto.data.code_reader import CodeReader
from smalto.data.health import require_unchanged
from smalto.data.module import StatelessDataModule
from smalto.data.order import sample_uniform
from smalto.data.row_sums import SUMS, row_sums
from smalto.data.shards import CODES, read_meta
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


def add_code_block(shard: TarShard, block: int, codes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Append block number ``block`` of a split to ``shard``; returns its checksums for `add_row_sums`.

    Args:
        shard: being written.
        block: counts from 0 in the split.
        codes: uint16 or uint32 (n, crops, tokens).
        labels: int64 (n,).
    """
    shard.add(f"{block:06d}.codes.npy", npy_bytes(codes))
    shard.add(f"{block:06d}.label.npy", npy_bytes(labels))
    return np.stack([row_sums(codes[:, crop].tobytes(), labels) for crop in range(codes.shape[1])], axis=1)


def add_row_sums(shard: TarShard, blocks: Sequence[np.ndarray]) -> None:
    """Append the checksums of all blocks of ``shard``, in their order, as its last member."""
    shard.add(SUMS, npy_bytes(np.concatenate(blocks)))


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
        verify: stop when codes or labels are not what was written. Shards have a checksum of each row; of older ones
            without, the whole file is compared with meta.json before the first batch.

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
        verify: bool = True,
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
        self._verify = verify
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
        readers = {split: CodeReader(self.path, self.meta, split, verify=self._verify) for split in ("train", "val")}
        if self._verify:
            require_unchanged(self.path, [shard for reader in readers.values() for shard in reader.unverified])
        if self._text_tokens is None and self.num_classes is not None:
            for split, reader in readers.items():
                check_range(reader.labels, self.num_classes, f"{split} in {self.path}")
        self._readers = readers
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
            codes = reader.gather(indices, np.full(len(indices), self._val_crop), distinct=True)
            counts += np.bincount(codes.ravel(), minlength=self._codebook_size)
        return counts

    def _batch(self, split: str, indices: np.ndarray, crops: np.ndarray) -> dict[str, Tensor]:
        reader = self._readers[split]
        codes = torch.from_numpy(reader.gather(indices, crops, distinct=True))
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
