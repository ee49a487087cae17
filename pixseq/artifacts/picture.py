"""Pictures: PNG files that carry their manifest in the text chunk `pixseq`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pixseq.artifacts import manifest
from pixseq.artifacts.owning import writing
from pixseq.errors import PixseqError, UsageError

MOST_PIXELS = 64_000_000


def check_png(*targets: str | Path | None) -> None:
    """Called before any work. Raises UsageError for a picture whose name ends as that of another format."""
    for target in targets:
        if not target:
            continue
        suffix = Path(target).suffix
        if suffix.lower() not in ("", ".png"):
            raise UsageError(
                f"{target} ends in {suffix}, but pictures are written as PNG, which carries how they were made",
                f"name it {Path(target).with_suffix('.png')}",
            )


def save_png(
    path: str | Path,
    image: np.ndarray,
    stage: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, Any]],
    summary: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> manifest.Manifest:
    """Write `image` (uint8 [H, W, 3]) as PNG with its manifest; returns the manifest."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    check_png(path)
    id = manifest.content_id("picture", {"image": manifest.whole(image)}, {})
    size = {"height": image.shape[0], "width": image.shape[1]}
    record = manifest.build("picture", id, stage, config, inputs, {**size, **(summary or {})})
    text = PngInfo()
    text.add_text(manifest.KEY, json.dumps(record, ensure_ascii=True))
    with writing(path, overwrite, stage) as partial:
        Image.fromarray(image).save(partial, format="PNG", pnginfo=text)
    return record


def save_pngs(
    folder: str | Path, images: Iterable[np.ndarray], rows: Iterable[int], stage: str, overwrite: bool = False
) -> None:
    """A folder of single pictures, uint8 [N, H, W, 3], named by their rows, for tools that want files."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text(manifest.KEY, stage)  # no manifest: it tells them from other pictures, see layout.kind_of
    with writing(folder, overwrite, stage) as partial:
        partial.mkdir()
        for row, image in zip(rows, images):
            Image.fromarray(image).save(partial / f"{row:06}.png", format="PNG", pnginfo=text)


def picture_id(path: str | Path) -> str:
    """The content id of a PNG's pixels. Raises PixseqError if they cannot be read."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels")
            pixels = np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow raises nearly anything on damaged bytes
        raise PixseqError(f"{path} is damaged: {error}", "make the picture again") from None
    return manifest.content_id("picture", {"image": manifest.whole(pixels)}, {})
