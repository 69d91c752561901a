"""Files as the LlamaGen authors write them: names and shapes by the description of their layout, not by our code."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from golden_weights import official_tensor

Shapes = dict[str, list[int]]


def conv(name: str, out: int, into: int, kernel: int) -> Shapes:
    return {f"{name}.weight": [out, into, kernel, kernel], f"{name}.bias": [out]}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": [width], f"{name}.bias": [width]}


def res_block(name: str, into: int, out: int) -> Shapes:
    shapes = norm(f"{name}.norm1", into) | conv(f"{name}.conv1", out, into, 3)
    shapes |= norm(f"{name}.norm2", out) | conv(f"{name}.conv2", out, out, 3)
    return shapes | (conv(f"{name}.nin_shortcut", out, into, 1) if into != out else {})


def attention(name: str, width: int) -> Shapes:
    shapes = norm(f"{name}.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= conv(f"{name}.{part}", width, width, 1)
    return shapes


def middle(name: str, width: int) -> Shapes:
    return (
        res_block(f"{name}.mid.0", width, width)
        | attention(f"{name}.mid.1", width)
        | res_block(f"{name}.mid.2", width, width)
    )


def tokenizer_shapes(*, base: int, multipliers: list[int], blocks: int, z: int, codes: int, dim: int) -> Shapes:
    widths = [base * m for m in multipliers]
    last = len(widths) - 1
    shapes = conv("encoder.conv_in", base, 3, 3)
    into = base
    for level, width in enumerate(widths):
        for block in range(blocks):
            shapes |= res_block(f"encoder.conv_blocks.{level}.res.{block}", into, width)
            shapes |= attention(f"encoder.conv_blocks.{level}.attn.{block}", width) if level == last else {}
            into = width
        shapes |= conv(f"encoder.conv_blocks.{level}.downsample.conv", width, width, 3) if level < last else {}
    shapes |= middle("encoder", into) | norm("encoder.norm_out", into) | conv("encoder.conv_out", z, into, 3)
    shapes |= conv("decoder.conv_in", into, z, 3) | middle("decoder", into)
    for level, width in enumerate(reversed(widths)):
        for block in range(blocks + 1):
            shapes |= res_block(f"decoder.conv_blocks.{level}.res.{block}", into, width)
            shapes |= attention(f"decoder.conv_blocks.{level}.attn.{block}", width) if level == 0 else {}
            into = width
        shapes |= conv(f"decoder.conv_blocks.{level}.upsample.conv", width, width, 3) if level < last else {}
    shapes |= norm("decoder.norm_out", into) | conv("decoder.conv_out", 3, into, 3)
    shapes |= {"quantize.embedding.weight": [codes, dim], "quantize.codebook_used": [65536]}
    return shapes | conv("quant_conv", dim, z, 1) | conv("post_quant_conv", z, dim, 1)


def gpt_shapes(
    *, dim: int, layers: int, hidden: int, vocab: int, classes: int | None = None, text_dim: int = 0, qkv: int = 0
) -> Shapes:
    if classes is None:
        shapes = {
            "cls_embedding.uncond_embedding": [120, text_dim],
            "cls_embedding.cap_proj.fc1.weight": [dim, text_dim],
            "cls_embedding.cap_proj.fc2.weight": [dim, dim],
        }
    else:
        shapes = {"cls_embedding.embedding_table.weight": [classes + 1, dim]}
    shapes |= {"tok_embeddings.weight": [vocab, dim], "norm.weight": [dim], "output.weight": [vocab, dim]}
    for i in range(layers):
        shapes |= {
            f"layers.{i}.attention.wqkv.weight": [qkv or 3 * dim, dim],
            f"layers.{i}.attention.wo.weight": [dim, dim],
            f"layers.{i}.feed_forward.w1.weight": [hidden, dim],
            f"layers.{i}.feed_forward.w3.weight": [hidden, dim],
            f"layers.{i}.feed_forward.w2.weight": [dim, hidden],
            f"layers.{i}.attention_norm.weight": [dim],
            f"layers.{i}.ffn_norm.weight": [dim],
        }
    return shapes


TINY_TOKENIZER = {"base": 32, "multipliers": [1, 2], "blocks": 1, "z": 32, "codes": 64, "dim": 4}
TINY_GPT = {"dim": 32, "layers": 2, "hidden": 256, "vocab": 64, "classes": 5}
TINY_TEXT_GPT = {"dim": 32, "layers": 2, "hidden": 256, "vocab": 64, "text_dim": 6}


def filled(shapes: Shapes) -> dict[str, Tensor]:
    return {name: official_tensor(name, shape) for name, shape in shapes.items()}


def tiny_tokenizer(**changes: Any) -> dict[str, Tensor]:
    return filled(tokenizer_shapes(**TINY_TOKENIZER | changes))


def tiny_gpt(**changes: Any) -> dict[str, Tensor]:
    return filled(gpt_shapes(**TINY_GPT | changes))


def tiny_text_gpt(**changes: Any) -> dict[str, Tensor]:
    return filled(gpt_shapes(**TINY_TEXT_GPT | changes))


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path
