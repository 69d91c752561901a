"""Sheets of images: rows with a name in front, for people to look at."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN = 2


def image_sheet(
    images: Tensor, *, columns: int, row_names: Sequence[str] = (), scale: int | None = None
) -> Image.Image:
    """One picture of many, row by row.

    Args:
        images: uint8 (N, 3, H, W).
        columns: images per row.
        row_names: written in front of the rows; missing ones stay empty.
        scale: integer enlargement, nearest neighbour; None enlarges small images to at least 48 px.
    """
    count, _, height, width = images.shape
    scale = scale or max(1, -(-48 // height))
    cell_h, cell_w = height * scale + MARGIN, width * scale + MARGIN
    rows = -(-count // columns)
    font = ImageFont.load_default(size=max(10, min(16, cell_h // 3)))
    left = max((int(font.getlength(name)) + 10 for name in row_names), default=MARGIN)
    sheet = Image.new("RGB", (left + columns * cell_w, rows * cell_h + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(row_names[:rows]):
        pen.text((left - 6, MARGIN + row * cell_h + cell_h // 2), name, fill="black", font=font, anchor="rm")
    for i, pixels in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        tile = Image.fromarray(np.ascontiguousarray(pixels)).resize(
            (width * scale, height * scale), Image.Resampling.NEAREST
        )
        sheet.paste(tile, (left + (i % columns) * cell_w, MARGIN + (i // columns) * cell_h))
    return sheet


def class_sheet(
    read: Callable[[Sequence[int]], Tensor],
    *,
    count: int,
    classes: Sequence[int],
    names: Sequence[str],
    max_rows: int,
    max_columns: int,
) -> Image.Image:
    """The first images of the first classes, a class per row.

    Args:
        read: image numbers to uint8 (B, 3, H, W).
        count: of the images; image i shows class ``classes[i % len(classes)]``.
        classes: their numbers.
        names: of all classes; may be empty.
        max_rows: classes on the sheet.
        max_columns: images of a class.
    """
    rows, columns = classes[:max_rows], min(max_columns, -(-count // len(classes)))
    shown = [r + c * len(classes) for r in range(len(rows)) for c in range(columns)]
    row_names = [names[c] if c < len(names) else str(c) for c in rows]
    return image_sheet(read([i for i in shown if i < count]), columns=columns, row_names=row_names)
