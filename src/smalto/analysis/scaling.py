"""Parameters and arithmetic of a GPT, exactly, from its shape: nothing is built."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smalto.errors import InputError
from smalto.nn.mlp import swiglu_hidden_size


@dataclass(frozen=True, kw_only=True)
class GPTShape:
    """What decides the parameters and the arithmetic of :class:`smalto.models.gpt.GPT`; nothing is built.

    Args:
        dim: width.
        num_layers: blocks.
        num_heads: attention heads.
        vocab_size: codes of the tokenizer, V.
        num_codes: codes of an image, L.
        num_kv_heads: heads of keys and values; None means ``num_heads``.
        ffn_multiple_of: the feed-forward width is rounded up to it.
        num_classes: of a class-conditional model; None for a text-conditional one.
        text_dim: width of text features, of a text-conditional model.
        text_tokens: length of the text prefix.
        train_null: whether the null text counts as a parameter (in the authors' code it is a buffer).

    Raises:
        ValueError: sizes that no model can have.
    """

    dim: int
    num_layers: int
    num_heads: int
    vocab_size: int
    num_codes: int
    num_kv_heads: int | None = None
    ffn_multiple_of: int = 256
    num_classes: int | None = None
    text_dim: int | None = None
    text_tokens: int = 120
    train_null: bool = True

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}, must be at least 1"
            for name in ("dim", "num_layers", "num_heads", "vocab_size", "num_codes", "ffn_multiple_of", "text_tokens")
            if getattr(self, name) < 1
        ]
        if not problems and self.dim % self.num_heads:
            problems.append(f"dim ({self.dim}) must be divisible by num_heads ({self.num_heads})")
        if (self.num_classes is None) == (self.text_dim is None):
            problems.append("give num_classes for a class-conditional model, or text_dim for a text-conditional one")
        if problems:
            raise InputError("GPTShape: " + "; ".join(problems))

    @classmethod
    def from_run(cls, run: Mapping[str, Any]) -> "GPTShape":
        """The shape of a training run, a row of :func:`smalto.analysis.runs.runs_table`."""

        def value(name: str) -> Any:
            found = run.get(f"params.model/{name}")
            return None if found is None or found == "None" or found != found else found  # a missing cell is nan

        def number(name: str) -> int | None:
            return None if value(name) is None else int(value(name))

        sizes = {name: number(name) for name in ("dim", "num_layers", "num_heads", "vocab_size")}
        missing = [name for name in (*sizes, "code_shape") if value(name) is None]
        if missing:
            raise InputError(f"the run does not say model/{', model/'.join(missing)}; is it a run of a GPT?")
        return cls(
            **{name: size for name, size in sizes.items() if size is not None},
            num_codes=sum(rows * columns for rows, columns in value("code_shape")),
            num_kv_heads=number("num_kv_heads"),
            ffn_multiple_of=number("ffn_multiple_of") or 256,
            num_classes=number("conditioner/num_classes"),
            text_dim=number("conditioner/text_dim"),
            text_tokens=number("conditioner/num_tokens") or 120,
            train_null=value("conditioner/train_null") is not False,
        )

    @classmethod
    def of(cls, net: Any) -> "GPTShape":
        """The shape of a :class:`smalto.models.gpt.GPT`."""
        text = getattr(net.conditioner, "text_dim", None)
        return cls(
            dim=net.dim,
            num_layers=len(net.blocks),
            num_heads=net.dim // net.head_dim,
            vocab_size=net.vocab_size,
            num_codes=net.num_codes,
            num_kv_heads=net.num_kv_heads,
            ffn_multiple_of=net.blocks[0].ffn.down.in_features,
            num_classes=None if text is not None else net.conditioner.num_classes,
            text_dim=text,
            text_tokens=net.conditioner.num_tokens,
        )

    @property
    def prefix(self) -> int:
        """Condition tokens before the codes, P."""
        return 1 if self.text_dim is None else self.text_tokens

    @property
    def positions(self) -> int:
        """Length of the sequence in training: the last code is predicted, never read."""
        return self.prefix + self.num_codes - 1

    @property
    def block_weights(self) -> int:
        """Entries of all matrices of one block."""
        head_dim = self.dim // self.num_heads
        qkv = self.dim * (self.num_heads + 2 * (self.num_kv_heads or self.num_heads)) * head_dim
        return qkv + self.dim**2 + 3 * self.dim * swiglu_hidden_size(self.dim, self.ffn_multiple_of)

    @property
    def lookup_parameters(self) -> int:
        """Tables that are read by row and never multiplied: codes, classes, the null text."""
        null = self.text_tokens * self.text_dim if self.text_dim and self.train_null else 0
        classes = 0 if self.num_classes is None else (self.num_classes + 1) * self.dim
        return self.vocab_size * self.dim + classes + null

    @property
    def parameters(self) -> int:
        """All that are trained."""
        text = 0 if self.text_dim is None else self.text_dim * self.dim + self.dim**2
        norms = (2 * self.num_layers + 1) * self.dim
        return self.lookup_parameters + text + self.num_layers * self.block_weights + norms + self.vocab_size * self.dim

    @property
    def forward_flops(self) -> int:
        """Of one image in one training forward pass, a multiply-add as two.

        Matrix products only, as ``torch.utils.flop_counter`` counts them: attention as two full T x T products, though
        a causal kernel skips half of them, and no norms, rotations or activations.
        """
        text = 0 if self.text_dim is None else 2 * self.prefix * (self.text_dim * self.dim + self.dim**2)
        attention = 4 * self.positions**2 * self.dim
        blocks = self.num_layers * (2 * self.positions * self.block_weights + attention)
        return text + blocks + 2 * self.num_codes * self.dim * self.vocab_size

    @property
    def training_flops(self) -> int:
        """Of one image, forward and backward: a gradient for inputs and one for weights, so three times forward."""
        return 3 * self.forward_flops

    def sampling_flops(self, *, guided: bool) -> int:
        """Of drawing one image: the condition in one pass, then a code at a time against what the cache holds.

        Args:
            guided: with a second, unconditional row, at every step.
        """
        text = 0 if self.text_dim is None else 2 * self.prefix * (self.text_dim * self.dim + self.dim**2)
        pairs = self.prefix**2 + sum(self.prefix + step for step in range(1, self.num_codes))
        blocks = self.num_layers * (2 * self.positions * self.block_weights + 4 * pairs * self.dim)
        return (2 if guided else 1) * (text + blocks + 2 * self.num_codes * self.dim * self.vocab_size)

    @property
    def six_n_flops(self) -> int:
        """The usual approximation of :attr:`training_flops`: 6 N per position, N without lookup tables."""
        return 6 * (self.parameters - self.lookup_parameters) * self.positions
