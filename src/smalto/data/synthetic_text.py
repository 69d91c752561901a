"""Made-up text features with the code sequences they describe, for tests and dry runs of text conditioning."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from smalto.data.order import sample_rng
from smalto.data.synthetic import SyntheticCodes
from smalto.errors import InputError


class SyntheticText(SyntheticCodes):
    """The sequences of :class:`SyntheticCodes`; instead of a label, features of a text that says its class.

    A text is one to ``num_tokens`` copies of the class's random vector with a little noise, at the end of a field of
    zeros: padded on the left, as texts are for LlamaGen.

    Args:
        codebook_size: number of codes.
        code_shape: [[h, w]].
        num_classes: class c steps by c + 1.
        num_tokens: length of the field.
        text_dim: width of the features.
        num_train: training sequences.
        num_val: validation sequences.
        batch_size: global.
        seed: of texts, sequences and their order.
        noise: probability that a code is random.
        num_workers: processes that draw.
        val_batch_size: global; None: as ``batch_size``.
    """

    def __init__(
        self,
        *,
        codebook_size: int,
        code_shape: Sequence[Sequence[int]],
        num_classes: int,
        num_tokens: int,
        text_dim: int,
        num_train: int,
        num_val: int,
        batch_size: int,
        seed: int,
        noise: float = 0.05,
        num_workers: int = 0,
        val_batch_size: int | None = None,
    ) -> None:
        super().__init__(
            codebook_size=codebook_size,
            code_shape=code_shape,
            num_classes=num_classes,
            num_train=num_train,
            num_val=num_val,
            batch_size=batch_size,
            seed=seed,
            noise=noise,
            num_workers=num_workers,
            val_batch_size=val_batch_size,
        )
        if min(num_tokens, text_dim) < 1:
            raise InputError(f"data: num_tokens is {num_tokens}, text_dim is {text_dim}, both must be at least 1")
        self.num_tokens, self.text_dim = num_tokens, text_dim

    def _draw(self, part: int, indices: np.ndarray) -> dict[str, Tensor]:
        batch = super()._draw(part, indices)
        text = np.zeros((len(indices), self.num_tokens, self.text_dim), np.float32)
        mask = np.zeros((len(indices), self.num_tokens), bool)
        for row, (index, label) in enumerate(zip(indices, batch["label"].tolist(), strict=True)):
            meaning = sample_rng(self.seed, 2, label).normal(size=self.text_dim)
            rng = sample_rng(self.seed, 3 + part, int(index))
            length = int(rng.integers(1, self.num_tokens + 1))
            text[row, -length:] = meaning + 0.1 * rng.normal(size=(length, self.text_dim))
            mask[row, -length:] = True
        return {"codes": batch["codes"], "text": torch.from_numpy(text), "text_mask": torch.from_numpy(mask)}
