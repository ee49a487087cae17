"""palette: cluster the colours of a source, and look at the result (section 3.2)."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixseq import progress
from pixseq.artifacts import atomic
from pixseq.artifacts.manifest import Manifest
from pixseq.errors import UsageError
from pixseq.stages.parts import part_of_source

if TYPE_CHECKING:
    import numpy as np

    from pixseq.data.images import Preparation
    from pixseq.data.sources import Source, TokenSource

COUNTED_LABELS = 65_536  # larger numbers are not told apart where classes are counted
MAX_COLORS = 4096  # beyond it scikit-learn's start takes minutes


@atomic.owns("palette fit", "out")
def run_fit(
    source: str,
    out: str | Path,
    split: str = "train",
    colors: int = 512,
    size: int = 32,
    resize: str = "crop",
    max_images: int | None = None,
    seed: int = 0,
    refine_steps: int | None = None,
    background: str = "white",
    on_error: str = "fail",
    workers: int = 0,
    overwrite: bool = False,
    label_column: str | None = None,
    bit_depth: int | None = None,
    max_pixels: int | None = None,
) -> Manifest:
    """Count every pixel of `source` at `size`, cluster the counted colours, write the palette; returns its manifest.

    Where the source has fewer distinct colours than `colors`, the palette is these colours.
    """
    from pixseq.artifacts.palette import save_palette
    from pixseq.data.images import MAX_PIXELS, Preparation
    from pixseq.data.sources import open_source
    from pixseq.numerics.kmeans import REFINE_STEPS, fit_palette

    refine_steps = REFINE_STEPS if refine_steps is None else refine_steps
    _check_ranges(colors, refine_steps, max_images, seed)
    if resize == "whole":
        raise UsageError("--resize whole is of encode --scheme pixels", "palettes are of squares: --resize crop")
    prep = Preparation(
        size=size,
        resize=resize,
        background=background,
        on_error=on_error,
        max_pixels=max_pixels or MAX_PIXELS,
        bit_depth=bit_depth,
    )
    opened = open_source(source, split, label_column, bit_depth, on_error, prep.max_pixels)
    for note in opened.notes:
        progress.say(f"note: {note}")
    part = part_of_source(opened, max_images)
    histogram, counts = _count_colours(opened, part.rows, prep, workers)
    progress.say(f"palette fit: clustering {counts['images'] * size * size:,} pixels")
    fit = fit_palette(histogram, colors, seed, refine_steps)
    if len(fit.colors) < colors:
        progress.say(
            f"note: {source} has only {fit.distinct} distinct colours at size {size}, so the palette has "
            f"{len(fit.colors)} instead of {colors}"
        )
    config = {
        **asdict(prep),
        "split": opened.split,
        "colors": colors,
        "max_images": max_images,
        "refine_steps": refine_steps,
        "seed": seed,
    }
    summary = {
        **counts,
        **({"part": part.record} if part.record else {}),
        "pixels": fit.pixels,
        "distinct_colors": fit.distinct,
        "colors": len(fit.colors),
        "mse": fit.mse,
        "psnr_db": fit.psnr_db,
    }
    return save_palette(out, fit.colors, "palette fit", config, {"source": describe(opened)}, summary, overwrite)


def _check_ranges(colors: int, refine_steps: int, max_images: int | None, seed: int) -> None:
    for name, value, low, high in (
        ("colors", colors, 1, MAX_COLORS),
        ("refine-steps", refine_steps, 0, 1_000_000),
        ("max-images", max_images if max_images is not None else 1, 1, 2**62),
        ("seed", seed, 0, 2**32 - 1),
    ):
        if not low <= value <= high:
            raise UsageError(f"--{name} {value} is not between {low} and {high}")


def labels_line(source: Source | TokenSource, classes: int, more: bool = False) -> str:
    """What is said of the labels of a source, whatever they are."""
    if not source.has_labels:
        return f"labels: none ({source.labels_from})"
    return f"labels: {'at least ' * more}{classes} class{'es' * (classes != 1)}, from {source.labels_from}"


def say_narrow(counts: dict[str, int]) -> bool:
    """Say it where 16-bit pictures leave upper bits unused, since they come out dark; whether there was anything to say
    or to hear.
    """
    from pixseq.data.decode import narrow_bits

    if not counts.get("sixteen_bit"):
        return False
    bits = narrow_bits(counts)
    if bits is not None:
        progress.say(
            f"note: the 16-bit pictures stay below {1 << bits:,} and come out dark: if they have {bits} bits, "
            f"--bit-depth {bits} scales them right"
        )
    return True


def describe(source: Source) -> dict[str, Any]:
    """How a manifest names a source of images.

    The id is cheap: over the names and sizes of its files and the first bytes of a single file, not over every byte.
    """
    listing = hashlib.sha256()
    path = Path(source.path)
    if path.is_dir():
        for folder, folders, names in os.walk(path):
            folders.sort()
            for name in sorted(names):
                file = Path(folder, name)
                size = file.stat().st_size if file.exists() else 0
                listing.update(os.fsencode(file.relative_to(path)) + f" {size}\n".encode())
    elif path.is_file():
        with path.open("rb") as file:
            listing.update(f"{path.stat().st_size}\n".encode() + file.read(1 << 20))
    found = f"{source.name}:{source.split}:{source.count or 'stream'}"
    return {"path": source.path, "id": f"{found}:{listing.hexdigest()[:16]}"}


@atomic.owns("palette show", "out")
def run_show(palette: str | Path, out: str | Path, columns: int = 32, overwrite: bool = False) -> Manifest:
    """Draw the colours in order. `palette` may also be tokens or a checkpoint: the palette that travels inside."""
    from pixseq.artifacts.palette import load_palette
    from pixseq.artifacts.picture import check_png, save_png
    from pixseq.drawing import swatch
    from pixseq.numerics.quantize import palette_bytes

    check_png(out)
    loaded = load_palette(palette, inside=True)
    inputs = {"palette": {"path": str(palette), "id": loaded.id}}
    image = swatch(palette_bytes(loaded.colors), columns)
    return save_png(out, image, "palette show", {"columns": columns}, inputs, {"colors": loaded.size}, overwrite)


def _count_colours(
    source: Source, rows: np.ndarray | None, prep: Preparation, workers: int
) -> tuple[np.ndarray, dict[str, int]]:
    """The histogram of the pixels of some images of a source (None: all), and what was met on the way."""
    from pixseq.data.images import Reader
    from pixseq.numerics.quantize import add_to_histogram, empty_histogram

    histogram = empty_histogram()
    reader, narrow = Reader(source, prep, workers=workers, rows=rows), False
    with progress.track("palette fit", source.count if rows is None else len(rows), "images") as bar:
        for batch in reader:
            add_to_histogram(histogram, batch.images)
            bar.advance(batch.stop - bar.done)
            narrow = narrow or say_narrow(reader.counts)
    for problem in reader.problems:
        progress.say(f"skipped {problem}")
    return histogram, reader.counts
