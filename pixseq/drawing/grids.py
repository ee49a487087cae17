"""Pictures of images: grids and palette swatches, drawn with Pillow. Arrays in, uint8 [H, W, 3] out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pixseq.text import one_line

INK, PAPER = (38, 38, 38), (255, 255, 255)
TILE_PIXELS = 96  # an image of a grid is enlarged to about this side


def font(pixels: int) -> ImageFont.FreeTypeFont:
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(pixels))  # of a size there is one alone


def grid(
    images: np.ndarray,
    columns: int,
    scale: int | None = None,
    gap: int = 2,
    column_labels: Sequence[str] | None = None,
) -> np.ndarray:
    """Images uint8 [N, h, w, 3], row by row in `columns` columns, each pixel a crisp square of `scale` pixels.

    `scale` None enlarges small images to about TILE_PIXELS. `gap` is in output pixels. Labels stand above the
    columns. Raises ValueError where there are no images or a label is missing.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise ValueError(f"grid draws images [N, h, w, 3] with N > 0, not {images.shape}")
    N, h, w, _ = images.shape
    columns = min(columns, N)
    rows = -(-N // columns)
    if column_labels is not None and len(column_labels) != columns:
        raise ValueError(f"{columns} labels are needed, {len(column_labels)} given")
    scale = scale or max(1, round(TILE_PIXELS / max(h, w)))
    high, wide = h * scale, w * scale
    tiles = images.repeat(scale, axis=1).repeat(scale, axis=2)

    letters = font(min(15, max(10, high // 3)))
    top = letters.size + 8 if column_labels else 0
    out = np.full((top + rows * (high + gap) + gap, columns * (wide + gap) + gap, 3), PAPER, np.uint8)
    corners = [(top + gap + r * (high + gap), gap + c * (wide + gap)) for r in range(rows) for c in range(columns)]
    for tile, (y, x) in zip(tiles, corners):
        out[y : y + high, x : x + wide] = tile
    if not column_labels:
        return out
    page = Image.fromarray(out)
    pen = ImageDraw.Draw(page)
    for (_, x), label in zip(corners, column_labels):
        pen.text((x + wide / 2, top - 2), fitted(label, letters, wide + gap), INK, letters, anchor="md")
    return np.asarray(page)


def swatch(colors: np.ndarray, columns: int = 32, cell: int = 24) -> np.ndarray:
    """Colours uint8 [K, 3] as squares of `cell` pixels, in order, row by row; cells past the last stay white."""
    colors = np.asarray(colors, np.uint8)
    K = len(colors)
    columns = min(columns, K)
    cells = np.full((-(-K // columns) * columns, 3), PAPER, np.uint8)
    cells[:K] = colors
    return cells.reshape(-1, columns, 3).repeat(cell, axis=0).repeat(cell, axis=1)


def fitted(text: str, letters: ImageFont.FreeTypeFont, width: float) -> str:
    """`text` on one line of at most `width` pixels, its end replaced by dots where it is too long."""
    text = one_line(text, " ")
    if letters.getlength(text) <= width:
        return text
    while text and letters.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
