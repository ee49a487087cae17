"""palette: cluster the colours of a source, and look at the result (section 3.2)."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixseq import progress
from pixseq.artifacts.manifest import Manifest
from pixseq.artifacts.owning import owns
from pixseq.artifacts.targets import check_apart
from pixseq.choices import OnError, SquareResize
from pixseq.cores import usable_cores
from pixseq.engine.parts import part_of_source
from pixseq.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from pixseq.data.preparation import Preparation
    from pixseq.data.sources import Source
    from pixseq.numerics.kmeans import PaletteFit

MOST_FITTED = 4096  # beyond it the start takes minutes


@owns("palette fit", "out")
def run_fit(
    source: str,
    out: str | Path,
    split: str = "train",
    colors: int = 512,
    size: int = 32,
    resize: SquareResize = "crop",
    max_images: int | None = None,
    seed: int = 0,
    refine_steps: int | None = None,
    background: str = "white",
    on_error: OnError = "fail",
    workers: int | None = None,
    overwrite: bool = False,
    label_column: str | None = None,
    bit_depth: int | None = None,
    max_pixels: int | None = None,
) -> Manifest:
    """Count every pixel of `source` at `size`, cluster the counted colours, write the palette; returns its manifest.

    Where the source has fewer distinct colours than `colors`, the palette is these colours.
    """
    from pixseq.artifacts.palette import save_palette
    from pixseq.data.described import describe, files_of
    from pixseq.data.preparation import Preparation
    from pixseq.data.records import MAX_PIXELS
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
    check_apart([out], files_of(opened))
    for note in opened.notes:
        progress.note(note)
    part = part_of_source(opened, max_images)
    histogram, counts = _count_colours(opened, part.rows, prep, usable_cores() if workers is None else workers)
    progress.say(f"palette fit: clustering {counts['images'] * size * size:,} pixels")
    fit = fit_palette(histogram, colors, seed, refine_steps)
    if len(fit.colors) < colors:
        progress.note(
            f"{source} has only {fit.distinct} distinct colours at size {size}, so the palette has "
            f"{len(fit.colors)} instead of {colors}"
        )
    asked = {"colors": colors, "max_images": max_images, "refine_steps": refine_steps, "seed": seed}
    config = {**asdict(prep), "split": opened.split, **asked}
    summary = {**counts, **({"part": part.record} if part.record else {}), **_numbers(fit)}
    return save_palette(out, fit.colors, "palette fit", config, {"source": describe(opened)}, summary, overwrite)


def _numbers(fit: PaletteFit) -> dict[str, Any]:
    """What a summary says of a fit."""
    return {
        "pixels": fit.pixels,
        "distinct_colors": fit.distinct,
        "colors": len(fit.colors),
        "mse": fit.mse,
        "psnr_db": fit.psnr_db,
    }


def _check_ranges(colors: int, refine_steps: int, max_images: int | None, seed: int) -> None:
    for name, value, low, high in (
        ("colors", colors, 1, MOST_FITTED),
        ("refine-steps", refine_steps, 0, 1_000_000),
        ("max-images", max_images if max_images is not None else 1, 1, 2**62),
        ("seed", seed, 0, 2**32 - 1),
    ):
        if not low <= value <= high:
            raise UsageError(f"--{name} {value} is not between {low} and {high}")


@owns("palette show", "out")
def run_show(palette: str | Path, out: str | Path, columns: int = 32, overwrite: bool = False) -> Manifest:
    """Draw the colours in order. `palette` may also be tokens or a checkpoint: the palette that travels inside."""
    from pixseq.artifacts.palette import load_palette
    from pixseq.artifacts.picture import check_png, save_png
    from pixseq.drawing.grids import swatch
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
    from pixseq.data.described import labels_line, say_narrow, say_skipped, source_line
    from pixseq.data.images import Reader
    from pixseq.numerics.quantize import add_to_histogram, empty_histogram

    histogram = empty_histogram()
    reader, narrow = Reader(source, prep, workers=workers, rows=rows), False
    total = source.count if rows is None else len(rows)
    with progress.track("palette fit", total, "images") as bar, closing(iter(reader)) as batches:
        for batch in batches:
            add_to_histogram(histogram, batch.images)
            bar.advance(batch.stop - bar.done)
            narrow = narrow or say_narrow(reader.counts)
    progress.say(source_line(source, None if rows is None else len(rows)))
    if source.class_names or not source.has_labels:
        progress.say(labels_line(source, len(source.class_names or ())))
    say_skipped(reader.problems, reader.counts.get("skipped", 0), source)
    return histogram, reader.counts
