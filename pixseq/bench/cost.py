"""Cost against size: time and memory of each stage while one size grows, and the powers that they grow by."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from pixseq import progress
from pixseq.artifacts.owning import owns
from pixseq.artifacts.targets import check_target
from pixseq.bench import alone, ceilings, rounds
from pixseq.bench.run import ROUNDS, SECONDS, chosen_stages, concluded, opened
from pixseq.bench.settings import US, Settings

LINEAR = 1.15  # the greatest power that still counts as linear: times are a few hundredths off
HEAD = 32  # numbers of a head, whatever the width

Row = dict[str, Any]


class Size(NamedTuple):
    """What grows: the multiples of its value in the settings that are tried, and how settings have it."""

    name: str
    multiples: tuple[float, ...]
    read: Callable[[Settings], int]
    of: Callable[[Settings, int], Settings]

    def values(self, settings: Settings) -> list[int]:
        now = self.read(settings)
        return sorted({max(round(now * multiple), 1) for multiple in self.multiples})


def _model(settings: Settings, **keys: int) -> Settings:
    return replace(settings, sets=(*settings.sets, *(f"model.{key}={value}" for key, value in keys.items())))


def _sided(settings: Settings, positions: int) -> Settings:
    """The pictures have so many pixels."""
    return replace(settings, size=math.isqrt(positions))


IMAGES = Size("images", (0.5, 2, 8), lambda s: s.count, lambda s, n: replace(s, count=n))
COLORS = Size("colors", (0.125, 0.5, 2), lambda s: s.colors, lambda s, n: replace(s, colors=n))
CLASSES = Size("classes", (1, 4, 16), lambda s: s.classes, lambda s, n: replace(s, classes=n))
BATCH = Size("batch", (0.5, 2, 8), lambda s: s.batch_size, lambda s, n: replace(s, batch_size=n))
PIXELS = Size("pixels", (0.25, 1, 4, 9), lambda s: s.size**2, _sided)
LAYERS = Size("layers", (0.25, 0.5, 1, 2), lambda s: s.shape().n_layer, lambda s, n: _model(s, n_layer=n))
WIDTH = Size(
    "width",
    (0.25, 0.5, 1, 2),
    lambda s: s.shape().d_model,
    lambda s, n: _model(s, d_model=n, n_head=max(n // HEAD, 1)),
)

SIZES: dict[str, tuple[Size, ...]] = {
    "palette": (IMAGES, PIXELS, COLORS),
    "encode": (IMAGES, PIXELS, COLORS),
    "read": (IMAGES, PIXELS),
    "pretrain": (BATCH, PIXELS, LAYERS, WIDTH),
    "features": (BATCH, PIXELS, LAYERS, WIDTH),
    "probe": (IMAGES, WIDTH, CLASSES),
    "sample": (BATCH, PIXELS, LAYERS, WIDTH),
}
# Why a stage grows faster than one of its sizes.
REASONS = {
    ("pretrain", "pixels"): "every position attends to all before it",
    ("features", "pixels"): "every position attends to all before it",
    ("sample", "pixels"): "every step reads the keys and values of all before it",
    ("pretrain", "width"): "matrices are width by width",
    ("features", "width"): "matrices are width by width",
    ("sample", "width"): "matrices are width by width",
    ("probe", "width"): "the Gram matrix is width by width, and its eigenvectors take its cube",
    ("probe", "classes"): "more classes take more evaluations, each of them longer",
}


@owns("bench", "out")
def run(
    stages: Sequence[str] = (),
    settings: Settings | None = None,
    most_rounds: int = ROUNDS,
    seconds: float = SECONDS,
    out: str | Path | None = None,
    overwrite: bool = False,
    sizes: dict[str, tuple[Size, ...]] = SIZES,
) -> dict[str, Any]:
    """Every stage at each value of each of its sizes, the others as in `settings`, each in a process of its own: rows
    of median seconds and peak bytes, and of each size the powers that both grow by.
    """
    settings = settings or Settings()
    stages = chosen_stages(stages, settings)
    if out is not None:
        check_target(out, overwrite)
    with opened(settings, ()) as bench:
        described, precision = ceilings.described(bench.where), bench.where.precision
    rows: list[Row] = []
    laws: list[Row] = []
    points = sum(len(size.values(settings)) for stage in stages for size in sizes[stage])
    with progress.track("bench", points, "sizes") as bar:
        for stage in stages:
            model = precision if stage in ("pretrain", "features", "sample") else None
            for size in sizes[stage]:
                bar.note(f"{stage} against {size.name}")
                found: list[Row] = []
                for value in size.values(settings):
                    taken = alone.measured(size.of(settings, value), stage, US, model, most_rounds, seconds)
                    found.append({"stage": stage, "size": size.name, "value": value, **_figures(taken)})
                    bar.advance()
                rows += found
                laws.append(law(stage, size.name, found))
    numbers = {"machine": described, "settings": asdict(settings), "precision": precision, "rows": rows, "laws": laws}
    spreads = {f"{row['stage']} at {row['value']} {row['size']}": row["spread"] for row in rows}
    return concluded(numbers, spreads, out, overwrite)


def _figures(taken: dict[str, Any]) -> Row:
    times = taken["seconds"]
    return {
        "median_seconds": statistics.median(times),
        "spread": rounds.spread(times),
        "peak_bytes": taken["peak_bytes"],
    }


def law(stage: str, size: str, rows: Sequence[Row]) -> Row:
    """The powers of a size that time and memory grow by at its large end, where what does not grow is out of sight;
    `said` where time grows faster than linearly, and why, as far as is known.
    """
    time = power(rows, "median_seconds")
    why = REASONS.get((stage, size))
    said = "" if time <= LINEAR else "more than linear" + (f": {why}" if why else "")
    memory = power(rows, "peak_bytes")
    return {"stage": stage, "size": size, "time_power": time, "memory_power": memory, "said": said}


def power(rows: Sequence[Row], of: str) -> float:
    """The slope in logarithms between the last two values."""
    (a, b) = rows[-2:]
    return math.log(max(b[of], 1e-9) / max(a[of], 1e-9)) / math.log(b["value"] / a["value"])
