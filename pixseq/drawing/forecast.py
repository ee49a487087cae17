"""The figure of a forecast: compute needed against resolution, drawn with matplotlib (the extra `plot`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pixseq.artifacts import atomic
from pixseq.drawing.page import (
    BLUE,
    COLUMN,
    GREEN,
    INK,
    ORANGE,
    PINK,
    SKY,
    YELLOW,
    flops_label,
    key,
    legend,
    log_axis,
    picture,
    power,
    require,
    save,
    short,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    Page = Figure | SubFigure

MARKERS = ("o", "s", "^", "D", "v", "P")
WIDEST_INTERVAL = 1e3  # times the greatest forecast; an interval that reaches farther is cut off with an arrow


def save_forecast(
    plot: str | Path,
    numbers: Mapping[str, Any],
    config: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, Any]],
    overwrite: bool = False,
) -> None:
    """The figure of the numbers of a forecast, a PNG with its manifest."""
    require()
    atomic.check_target(plot, overwrite)
    lines = len({row["metric"] for row in numbers["rows"]})
    image = picture((COLUMN, 3.0 + 0.16 * lines), lambda page: _forecast(page, numbers))
    save(plot, image, "scaling forecast", config, inputs, overwrite)


def _forecast(page: Page, numbers: Mapping[str, Any]) -> None:
    """Compute needed against resolution, beside what was studied and what growth pays for in how many years."""
    rows, growth, start = numbers["rows"], numbers["growth_per_year"], numbers["start_flops"]
    low, high = numbers["studied_flops"]
    axes = page.subplots()
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    needed = [row["flops"] for row in rows if row["flops"]]
    floor, ceiling = min([low, start, *needed]), max([high, start, *needed])
    reach = [end for row in rows for end in row["flops_ci"] or [] if end]
    bottom = min([floor, *(end for end in reach if end > floor / WIDEST_INTERVAL)]) / 10
    top = max([ceiling, *(end for end in reach if end < ceiling * WIDEST_INTERVAL)]) * 20
    axes.axhspan(low, high, color="#dddddd", linewidth=0, zorder=0)
    axes.axhline(start, color=INK, linewidth=0.8, linestyle="--")
    keys = []
    for place, metric in enumerate(metrics):
        ours = [row for row in rows if row["metric"] == metric]
        color = (BLUE, ORANGE, GREEN, PINK, YELLOW, SKY)[place % 6]
        marker = MARKERS[place % 6]
        shift = 1.05 ** (place - (len(metrics) - 1) / 2)  # so that intervals do not hide one another
        known = [row for row in ours if row["flops"]]
        axes.plot(
            [row["resolution"] * shift for row in known], [row["flops"] for row in known], color=color, linewidth=0.8
        )
        for row in known:
            x = row["resolution"] * shift
            if row["flops_ci"]:
                ends = [math.inf if end is None else end for end in row["flops_ci"]]
                _whisker(axes, x, ends, (bottom, top), color)
            face = "white" if "extrapolated" in row["status"] else color
            axes.plot(x, row["flops"], marker, color=color, markerfacecolor=face, markersize=4.5, zorder=3)
        keys.append(key(_forecast_label(metric, ours), marker, color, "-", width=0.8))
    if any("extrapolated" in row["status"] for row in rows):
        keys.append(key("no runs at that resolution", "o", INK, hollow=True))
    from matplotlib.patches import Patch

    keys.append(key("one training run today", None, INK, "--", width=0.8))
    keys.append(Patch(color="#dddddd", linewidth=0, label="budgets studied"))
    sides = sorted({row["resolution"] for row in rows})
    axes.set_xscale("log")
    axes.set_xlim(sides[0] / 1.35, sides[-1] * 1.35)
    axes.set_xticks(sides, [f"{side}" for side in sides])
    axes.minorticks_off()
    axes.set_ylim(bottom, top)
    log_axis(axes, "y", 7, power)
    axes.set_xlabel("resolution (pixels a side)")
    axes.set_ylabel(flops_label(numbers))
    _years_axis(axes, start, growth, bottom, top)
    legend(page, keys, 1 if max(len(key.get_label()) for key in keys) > 28 else 2)


def _whisker(axes: Axes, x: float, ends: Sequence[float], limits: Sequence[float], color: str) -> None:
    """An interval; an end beyond the limits becomes an arrow at the limit."""
    from matplotlib.transforms import ScaledTranslation

    shown = np.clip(ends, *limits)
    axes.plot([x, x], shown, color=color, linewidth=0.9, alpha=0.75)
    for end, at, marker, points in zip(ends, shown, ("v", "^"), (2, -2)):
        cut, inward = end != at, ScaledTranslation(0, points / 72, axes.figure.dpi_scale_trans)
        style = {"markersize": 4.5 if cut else 5, "transform": axes.transData + inward if cut else axes.transData}
        axes.plot(x, at, marker if cut else "_", color=color, **style)


def _forecast_label(metric: str, rows: Sequence[Mapping[str, Any]]) -> str:
    targets = {row["target"] for row in rows}
    only = targets.pop() if len(targets) == 1 else None
    label = short(metric, 24) + (" (default target)" if only is None else f" = {only:.3g}")
    lost = []
    for status, word in (("unreachable", "unreachable"), ("none", "no forecast")):
        sides = [str(row["resolution"]) for row in rows if row["status"].startswith(status)]
        lost += [f"{word} at {', '.join(sides)}"] if sides else []
    return f"{label}: {'; '.join(lost)}" if lost else label


def _years_axis(axes: Axes, start: float, growth: float, bottom: float, top: float) -> None:
    """Ticks on the right where compute arrives after whole years."""
    right = axes.twinx()
    right.set_yscale("log")
    right.set_ylim(bottom, top)
    right.grid(False)
    most = math.log(top / start) / math.log(growth)
    step = next((step for step in (1, 2, 5, 10, 20, 50, 100) if most / step <= 7), 200)
    ticks = [years for years in range(0, max(int(most), 0) + 1, step) if start * growth**years >= bottom]
    right.set_yticks(
        [start * growth**years for years in ticks], ["today" if not years else f"{years}" for years in ticks]
    )
    right.minorticks_off()
    right.set_ylabel(f"years, at {growth:g} times a year")
