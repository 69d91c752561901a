"""What a network of the LlamaGen authors is, read from the shapes of its tensors: config nodes for ours."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from smalto.errors import InputError
from smalto.nn.mlp import swiglu_hidden_size

HEADS = {
    (768, 12): 12,
    (1024, 24): 16,
    (1280, 36): 20,
    (1536, 48): 24,
    (2560, 48): 40,
    (2048, 22): 32,
    (3200, 24): 32,
    (4096, 32): 32,
}
"""Attention heads by (width, layers): the one number of a published size that its tensors do not show."""
OPTIMIZER = {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.05}


@dataclass(frozen=True)
class Hints:
    """What tensors do not show, from whoever knows it; None where nobody said.

    Args:
        image_size: side of the images in pixels.
        downsample_factor: pixels per code along a side, of a generator.
        num_heads: attention heads, of a generator of no published size.
        l2_norm: whether the codebook lies on the unit sphere, of a tokenizer.
        force: believe these where the file says otherwise.
    """

    image_size: int | None = None
    downsample_factor: int | None = None
    num_heads: int | None = None
    l2_norm: bool | None = None
    force: bool = False


class Shapes:
    """Shapes of tensors by name; looking for one that is not there says which."""

    def __init__(self, weights: Mapping[str, Tensor], path: Path) -> None:
        self.shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        self.path = path

    def size(self, axis: int, *names: str) -> int:
        """Length of ``axis`` of the first of ``names`` that is there and has it."""
        for name in names:
            shape = self.shapes.get(name, ())
            if len(shape) > axis and shape[axis] > 0:
                return shape[axis]
        raise InputError(
            f"{self.path}: missing tensor{'s' * (len(names) > 1)} {' and '.join(names)}, without which the size of the "
            "network cannot be told; the file is incomplete, or of another model"
        )

    def count(self, pattern: str) -> int:
        """One more than the largest number that the group of ``pattern`` matches at the start of a name; 0 if none."""
        found = (re.match(pattern, name) for name in self.shapes)
        count = max((int(match[1][:9]) + 1 for match in found if match), default=0)
        if count > len(self.shapes):
            raise InputError(f"{self.path}: its tensors count to {count - 1} and are {len(self.shapes)}; it is damaged")
        return count


def gpt_node(weights: Mapping[str, Tensor], hints: Hints, path: Path) -> dict[str, Any]:
    """Config of the generator.

    Raises:
        ValueError: a tensor that decides a size is missing, or a hint is; all missing hints in one message.
    """
    shapes = Shapes(weights, path)
    vocabulary = shapes.size(0, "tok_embeddings.weight", "output.weight")
    dim = shapes.size(1, "tok_embeddings.weight", "output.weight")
    layers = shapes.count(r"layers\.(\d+)\.")
    published = HEADS.get((dim, layers))
    num_heads = hints.num_heads or published
    asked = []
    if hints.image_size is None:
        guess = re.search(r"(?<!\d)(256|384|512)(?!\d)", path.name)
        asked.append(f"image_size={guess[1] if guess else 'PIXELS'} (its positions are computed, not stored)")
    if num_heads is None:
        asked.append(f"num_heads=N (width {dim} with {layers} layers is no published size)")
    if asked:
        raise InputError(f"{path}: a generator's tensors do not show everything; give {' and '.join(asked)}")
    assert hints.image_size is not None
    assert num_heads is not None
    factor = hints.downsample_factor or 16
    problems = []
    if published not in (None, num_heads) and not hints.force:
        problems.append(
            f"num_heads is {num_heads}, the published size of width {dim} with {layers} layers has {published}; leave "
            "num_heads out, or give force=true if this is another model"
        )
    if hints.image_size % factor or hints.image_size < factor:
        problems.append(f"image_size is {hints.image_size}, it must be a multiple of downsample_factor ({factor})")
    if dim % num_heads or (dim // num_heads) % 4:
        problems.append(f"num_heads is {num_heads}, {dim} / num_heads must be a multiple of 4")
    if problems:
        raise InputError(f"{path}: {'; '.join(problems)}")
    packed = shapes.size(0, *(f"layers.{i}.attention.wqkv.weight" for i in range(max(layers, 1))))
    hidden = shapes.size(0, *(f"layers.{i}.feed_forward.w{j}.weight" for i in range(max(layers, 1)) for j in (1, 3)))
    kv_heads, rest = divmod(packed * num_heads // dim - num_heads, 2)
    if rest or kv_heads < 1 or num_heads % kv_heads:
        raise InputError(f"{path}: attention.wqkv has {packed} rows, which {num_heads} heads of {dim} do not give")
    side = hints.image_size // factor
    return {
        "_target_": "smalto.models.gpt.GPT",
        "_partial_": True,
        "dim": dim,
        "num_layers": layers,
        "num_heads": num_heads,
        "num_kv_heads": None if kv_heads == num_heads else kv_heads,
        "vocab_size": vocabulary,
        "code_shape": [[side, side]],
        "ffn_multiple_of": _multiple_of(dim, hidden, path),
        "conditioner": _conditioner_node(shapes),
    }


def _multiple_of(dim: int, hidden: int, path: Path) -> int:
    for multiple in (256, 128, 64, 32, 16, 8, 512, 1024, hidden):
        if swiglu_hidden_size(dim, multiple) == hidden:
            return multiple
    raise InputError(f"{path}: a feed-forward width of {hidden} for width {dim} is below two thirds of 4 x {dim}")


def _conditioner_node(shapes: Shapes) -> dict[str, Any]:
    if any(name.startswith(("cls_embedding.cap_proj", "cls_embedding.uncond")) for name in shapes.shapes):
        return {
            "_target_": "smalto.models.conditioner.TextConditioner",
            "_partial_": True,
            "text_dim": shapes.size(1, "cls_embedding.uncond_embedding", "cls_embedding.cap_proj.fc1.weight"),
            "num_tokens": shapes.size(0, "cls_embedding.uncond_embedding"),
            "drop_prob": 0.1,
        }
    return {
        "_target_": "smalto.models.conditioner.ClassConditioner",
        "_partial_": True,
        "num_classes": shapes.size(0, "cls_embedding.embedding_table.weight") - 1,  # the last row is the null class
        "drop_prob": 0.1,
    }


def tokenizer_node(weights: Mapping[str, Tensor], hints: Hints, path: Path) -> dict[str, Any]:
    """Config of the tokenizer; 256-px images and a codebook on the unit sphere unless hinted otherwise.

    Raises:
        ValueError: a tensor that decides a size is missing, or widths that ours cannot have.
    """
    shapes = Shapes(weights, path)
    base = shapes.size(0, "encoder.conv_in.weight", "encoder.conv_in.bias")
    levels = max(shapes.count(r"encoder\.conv_blocks\.(\d+)\."), shapes.count(r"decoder\.conv_blocks\.(\d+)\."))
    widths = [
        shapes.size(0, *(f"encoder.conv_blocks.{i}.res.0.{part}" for part in ("conv1.weight", "conv1.bias")))
        for i in range(levels)
    ]
    if any(width % base for width in widths):
        raise InputError(f"{path}: widths {widths} of the encoder are not multiples of its first, {base}")
    return {
        "_target_": "smalto.tokenizers.vqgan.VQModel",
        "_partial_": True,
        "image_size": hints.image_size or 256,
        "base_channels": base,
        "channel_multipliers": [width // base for width in widths],
        "num_res_blocks": shapes.count(r"encoder\.conv_blocks\.\d+\.res\.(\d+)\."),
        "z_channels": shapes.size(0, "encoder.conv_out.weight", "encoder.conv_out.bias", "post_quant_conv.weight"),
        "quantizer": {
            "_target_": "smalto.tokenizers.quantize.VectorQuantizer",
            "_partial_": True,
            "codebook_size": shapes.size(0, "quantize.embedding.weight"),
            "codebook_dim": shapes.size(1, "quantize.embedding.weight"),
            "l2_norm": True if hints.l2_norm is None else hints.l2_norm,
        },
    }


def discriminator_node(weights: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Config of the discriminator that a tokenizer's training left in its file.

    Raises:
        ValueError: neither of the two that the authors have.
    """
    shapes = Shapes(weights, path)
    if "main.0.weight" in weights:
        convolutions = sum(len(shape) == 4 for shape in shapes.shapes.values())
        return {
            "_target_": "smalto.losses.patchgan.PatchDiscriminator",
            "_partial_": True,
            "base_channels": shapes.size(0, "main.0.weight"),
            "num_layers": convolutions - 2,
        }
    if "final_linear.0.weight" in weights:
        blocks = shapes.count(r"blocks\.(\d+)\.") - 2
        return {
            "_target_": "smalto.losses.stylegan.StyleGANDiscriminator",
            "_partial_": True,
            "image_size": 4 * 2**blocks,
        }
    raise InputError(f"{path}: its discriminator is neither PatchGAN nor StyleGAN; remove that entry from the file")


def task_node(kind: str, net: dict[str, Any], discriminator: dict[str, Any] | None) -> dict[str, Any]:
    """Config of the task around a network, as in a run of ``smalto train``."""
    if kind == "gpt":
        return {"_target_": "smalto.tasks.gpt.GPTTask", "net": net, "optimizer": OPTIMIZER, "tokenizer_ckpt": None}
    return {
        "_target_": "smalto.tasks.tokenizer.TokenizerTask",
        "net": net,
        "optimizer": OPTIMIZER,
        "discriminator": discriminator,
    }
