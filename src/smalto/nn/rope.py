"""Rotary position embedding on a plane: half of each head turns with the row, half with the column.

Legend: T positions, D head size, H heads.
"""

import torch
from torch import Tensor

from smalto.errors import InputError


def axial_rope(
    grid: tuple[int, int], head_dim: int, *, base: float = 10000.0, prefix: int = 0, prefix_mode: str = "zero"
) -> Tensor:
    """Rotation table of a raster-ordered grid with condition tokens in front.

    Args:
        grid: (rows, columns); position p has row ``p // columns`` and column ``p % columns``.
        head_dim: must be divisible by 4: pairs of channels turn together, half of the pairs per axis.
        base: wavelength base of the frequencies ``base ** (-2i / (head_dim / 2))``.
        prefix: number of condition tokens before the first code.
        prefix_mode: ``zero`` writes (0, 0) for them, which is what the released LlamaGen weights were trained
            with: rotated q and k of condition tokens vanish, so every code gives each of them the attention
            logit 0. ``identity`` writes (1, 0): condition tokens attend by content.

    Returns:
        float32 (prefix + rows * columns, head_dim / 2, 2) holding (cos, sin), row frequencies first.
    """
    if head_dim % 4:
        raise InputError(f"head_dim is {head_dim}; 2-D rotary embedding needs a multiple of 4 (dim / num_heads)")
    if prefix_mode not in ("zero", "identity"):
        raise InputError(f"condition_rope is {prefix_mode!r}, must be 'zero' (as LlamaGen) or 'identity'")
    half = head_dim // 2
    frequencies = base ** -(torch.arange(0, half, 2).float() / half)
    rows, columns = grid
    row = torch.arange(rows).repeat_interleave(columns)
    column = torch.arange(columns).repeat(rows)
    angles = torch.cat([torch.outer(row.float(), frequencies), torch.outer(column.float(), frequencies)], dim=-1)
    codes = torch.stack([angles.cos(), angles.sin()], dim=-1)
    condition = torch.zeros(prefix, half, 2)
    if prefix_mode == "identity":
        condition[..., 0] = 1
    return torch.cat([condition, codes])


def apply_rope(x_BTHD: Tensor, table: Tensor) -> Tensor:
    """Rotate adjacent channel pairs (x0, x1), (x2, x3), ... by the angles of ``table`` (T, D / 2, 2).

    Computed in float32 (float64 stays) and cast back.
    """
    pairs = x_BTHD.to(torch.promote_types(x_BTHD.dtype, torch.float32)).unflatten(-1, (-1, 2))
    cos, sin = table[None, :, None, :, 0], table[None, :, None, :, 1]
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rotated.flatten(-2).to(x_BTHD.dtype)
