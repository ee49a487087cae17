"""decode: tokens back into pictures, and pixels as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pixseq.artifacts.manifest import Manifest
from pixseq.artifacts.owning import owns
from pixseq.errors import UsageError
from pixseq.streams import Stream

if TYPE_CHECKING:
    import numpy as np


@owns("decode", "out", "images_dir")
def run(
    tokens: str | Path,
    out: str | Path,
    count: int = 64,
    first: int | None = None,
    seed: int | None = None,
    columns: int | None = None,
    scale: int | None = None,
    images_dir: str | Path | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Draw `count` rows of a store of tokens or pixels as a grid: from all over it, of every class its share.

    `first`: those from this row on instead; `seed`: random ones.
    `images_dir`: also a folder of single PNGs, in the same order. Returns the manifest of the grid.
    """
    import numpy as np

    from pixseq.artifacts.manifest import reference
    from pixseq.artifacts.picture import check_png, save_png, save_pngs
    from pixseq.drawing.grids import grid
    from pixseq.engine.image_store import open_images, some_images
    from pixseq.engine.parts import part_of_store

    check_png(out)
    store = open_images(tokens, "tokens", "pixels")
    total = len(store)
    store.codec.must_have_colours(tokens)
    if first is not None and not 0 <= first < total:
        raise UsageError(f"--first {first}, but {tokens} has the rows 0 to {total - 1}")
    for flag, value in (("count", count), ("columns", columns), ("scale", scale)):
        if value is not None and value < 1:
            raise UsageError(f"--{flag} is {value}, it must be at least 1")
    if first is not None and seed is not None:
        raise UsageError("--first and --seed were both given", "keep one of them")
    part = None
    if first is not None:
        rows = np.arange(first, min(first + count, total))
    elif seed is not None:
        rng = np.random.default_rng([seed, 0, Stream.SHOWN_ROWS])
        rows = np.sort(rng.choice(total, min(count, total), replace=False))
    else:
        rows, part = part_of_store(store, count)
    found = some_images(store, rows)
    images: Sequence[np.ndarray] = list(found)
    if not store.whole:
        images = list(store.codec.to_images(np.stack(images)))
    columns = columns or min(round(len(images) ** 0.5) or 1, 16)
    config = {"count": count, "first": first, "seed": seed, "columns": columns, "scale": scale}
    inputs = {"tokens": reference(tokens, store.manifest)}
    if images_dir is not None:
        save_pngs(images_dir, images, rows, "decode", overwrite)
    drawn = grid(_framed(images), columns, scale)
    summary = {"images": len(images), **({"part": part} if part else {})}
    return save_png(out, drawn, "decode", config, inputs, summary, overwrite)


def _framed(images: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures [h, w, 3] of any sizes in the middle of white frames of one size, uint8 [N, H, W, 3]."""
    import numpy as np

    height, width = np.max([image.shape[:2] for image in images], axis=0)
    frames = np.full((len(images), height, width, 3), 255, np.uint8)
    for frame, image in zip(frames, images):
        h, w = image.shape[:2]
        top, left = (height - h) // 2, (width - w) // 2
        frame[top : top + h, left : left + w] = image
    return frames
