"""The authors' networks from a recipe: weights rebuilt by name, renamed, loaded into ours (golden/README.md)."""

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smalto.models.conditioner import ClassConditioner, TextConditioner
from smalto.models.gpt import GPT
from smalto.tokenizers.quantize import VectorQuantizer
from smalto.tokenizers.vqgan import VQModel

FOLDER = Path(__file__).parent / "golden"

GPT_NAMES = (
    ("cls_embedding.embedding_table", "conditioner.embedding"),
    ("cls_embedding.uncond_embedding", "conditioner.null_features"),
    ("cls_embedding.cap_proj.", "conditioner."),
    ("tok_embeddings", "token_embedding"),
    ("layers.", "blocks."),
    ("attention.wqkv", "attention.qkv"),
    ("attention.wo", "attention.proj"),
    ("feed_forward.w1", "ffn.gate"),
    ("feed_forward.w3", "ffn.up"),
    ("feed_forward.w2", "ffn.down"),
)
TOKENIZER_NAMES = (
    ("quantize.embedding", "quantizer.codebook"),
    (".conv_blocks.", ".levels."),
    (".nin_shortcut.", ".shortcut."),
    (".attn.", ".attention."),
    (".proj_out.", ".proj."),
    (".downsample.", ".resample."),
    (".upsample.", ".resample."),
    (".mid.", ".middle."),
)


def renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for theirs, ours in table:
        name = name.replace(theirs, ours)
    return name


gpt_name = partial(renamed, table=GPT_NAMES)
tokenizer_name = partial(renamed, table=TOKENIZER_NAMES)


def official_tensor(name: str, shape: list[int]) -> Tensor:
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(math.prod(shape))
    z = z.astype(np.float32).reshape(shape)
    z = (1 + 0.1 * z if name.endswith("weight") else 0.02 * z) if len(shape) == 1 else z / np.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(z.astype(np.float32))


@dataclass(frozen=True)
class Golden:
    """One case: what the authors' code was given and what it gave."""

    description: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def config(self) -> dict[str, Any]:
        return self.description["config"]

    def tensor(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key])

    def weights(self, rename: Callable[[str], str]) -> dict[str, Tensor]:
        shapes = self.description["state_dict"].items()
        return {rename(name): official_tensor(name, shape) for name, shape in shapes if "codebook_used" not in name}

    def gradient_norms(self, rename: Callable[[str], str]) -> dict[str, float]:
        names = map(rename, self.description["grad_names"])
        return dict(zip(names, self.arrays["grad_norms"].tolist(), strict=True))


def load_golden(name: str) -> Golden:
    with np.load(FOLDER / f"{name}.npz") as archive:
        arrays = dict(archive)
    return Golden(json.loads((FOLDER / f"{name}.json").read_text()), arrays)


def golden_gpt(golden: Golden) -> GPT:
    """Strictly loaded, in eval mode, without dropout."""
    config = golden.config
    side = math.isqrt(config["block_size"])
    conditioner: Callable[..., nn.Module]
    if "caption_dim" in config:
        conditioner = partial(
            TextConditioner, text_dim=config["caption_dim"], num_tokens=config["cls_token_num"], drop_prob=0.1
        )
    else:
        conditioner = partial(ClassConditioner, num_classes=config["num_classes"], drop_prob=0.1)
    net = GPT(
        dim=config["dim"],
        num_layers=config["n_layer"],
        num_heads=config["n_head"],
        vocab_size=config["vocab_size"],
        code_shape=((side, side),),
        conditioner=conditioner,
        token_dropout=0.0,
        resid_dropout=0.0,
        ffn_dropout=0.0,
    )
    net.load_state_dict(golden.weights(gpt_name))
    return net.eval()


def golden_tokenizer(golden: Golden) -> VQModel:
    """Strictly loaded, in eval mode."""
    config = golden.config
    net = VQModel(
        image_size=golden.description["image_size"],
        base_channels=128,
        channel_multipliers=config["ch_mult"],
        quantizer=partial(
            VectorQuantizer,
            codebook_size=config["codebook_size"],
            codebook_dim=config["codebook_dim"],
            l2_norm=config["l2_norm"],
            entropy_weight=config["entropy_loss_ratio"],
        ),
    )
    net.load_state_dict(golden.weights(tokenizer_name))
    return net.eval()


def golden_image(golden: Golden) -> Tensor:
    side = golden.description["image_size"]
    rng = np.random.RandomState(golden.description["image_seed"])
    return torch.from_numpy(rng.uniform(-1, 1, (1, 3, side, side)).astype(np.float32))
