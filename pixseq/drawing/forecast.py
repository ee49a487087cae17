"""The figure of a forecast: compute needed against resolution."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pixseq.artifacts.forecast import Forecast, StudyForecast
from pixseq.drawing.page import (
    COLORS,
    COLUMN,
    INK,
    flops_label,
    key,
    key_rows,
    legend,
    log_axis,
    picture,
    power,
    save,
    short,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pixseq.drawing.page import Page

MARKERS = ("o", "s", "^", "D", "v", "P")
WIDEST_INTERVAL = 1e3  # times the greatest forecast; an interval that reaches farther is cut off with an arrow


def save_forecast(
    plot: str | Path,
    found: StudyForecast,
    config: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, Any]],
    overwrite: bool = False,
) -> None:
    """The figure of the forecasts of a study, a PNG with its manifest."""
    lines = len({row.metric for row in found.rows})
    image = picture((COLUMN, 3.0 + 0.16 * lines), lambda page: _forecast(page, found))
    save(plot, image, "scaling forecast", config, inputs, overwrite)


def _forecast(page: Page, found: StudyForecast) -> None:
    """Compute needed against resolution, beside what was studied and what growth pays for in how many years."""
    rows, start = found.rows, found.start_flops
    low, high = found.studied_flops
    limits = _limits(rows, [low, high, start])
    axes = page.subplots()
    axes.axhspan(low, high, color="#dddddd", linewidth=0, zorder=0)
    axes.axhline(start, color=INK, linewidth=0.8, linestyle="--")
    metrics = list(dict.fromkeys(row.metric for row in rows))
    keys = []
    for place, metric in enumerate(metrics):
        ours = [row for row in rows if row.metric == metric]
        color, marker = COLORS[place % len(COLORS)], MARKERS[place % len(MARKERS)]
        shift = 1.05 ** (place - (len(metrics) - 1) / 2)  # so that intervals do not hide one another
        _draw_metric(axes, ours, shift, limits, color, marker)
        keys.append(key(_label(metric, ours), marker, color, "-", width=0.8))
    sides = sorted({row.resolution for row in rows})
    axes.set_xscale("log")
    axes.set_xlim(sides[0] / 1.35, sides[-1] * 1.35)
    axes.set_xticks(sides, [f"{side}" for side in sides])
    axes.minorticks_off()
    axes.set_ylim(*limits)
    log_axis(axes, "y", 7, power)
    axes.set_xlabel("resolution (pixels a side)")
    axes.set_ylabel(flops_label(found.counting))
    _years_axis(axes, start, found.growth_per_year, *limits)
    legend(page, *key_rows(keys + _other_keys(rows), COLUMN))


def _limits(rows: Sequence[Forecast], others: Sequence[float]) -> tuple[float, float]:
    """FLOPs around all forecasts and `others`, and around intervals as far as they do not reach too far."""
    needed = [*others, *(row.flops for row in rows if row.flops)]
    ends = [end for row in rows for end in row.flops_ci or [] if end]
    bottom = min(min(needed), *(end for end in ends if end > min(needed) / WIDEST_INTERVAL), math.inf)
    top = max(max(needed), *(end for end in ends if end < max(needed) * WIDEST_INTERVAL), 0)
    return bottom / 10, top * 20


def _draw_metric(
    axes: Axes, rows: Sequence[Forecast], shift: float, limits: Sequence[float], color: str, marker: str
) -> None:
    """The forecasts of one metric, a line with intervals; hollow where nothing was run."""
    known = [(row, row.resolution * shift, row.flops) for row in rows if row.flops]
    axes.plot([at for _, at, _ in known], [flops for _, _, flops in known], color=color, linewidth=0.8)
    for row, at, flops in known:
        if row.flops_ci:
            _whisker(axes, at, [math.inf if end is None else end for end in row.flops_ci], limits, color)
        face = "white" if "extrapolated" in row.status else color
        axes.plot(at, flops, marker, color=color, markerfacecolor=face, markersize=4.5, zorder=3)


def _other_keys(rows: Sequence[Forecast]) -> list:
    from matplotlib.patches import Patch

    guessed = any("extrapolated" in row.status for row in rows)
    keys = [key("no runs at that resolution", "o", INK, hollow=True)] if guessed else []
    keys.append(key("one training run today", None, INK, "--", width=0.8))
    return [*keys, Patch(color="#dddddd", linewidth=0, label="budgets studied")]


def _whisker(axes: Axes, x: float, ends: Sequence[float], limits: Sequence[float], color: str) -> None:
    """An interval; an end beyond the limits becomes an arrow at the limit."""
    from matplotlib.transforms import ScaledTranslation

    shown = np.clip(ends, limits[0], limits[1])
    axes.plot([x, x], shown, color=color, linewidth=0.9, alpha=0.75)
    for end, at, marker, points in zip(ends, shown, ("v", "^"), (2, -2)):
        cut, inward = end != at, ScaledTranslation(0, points / 72, axes.figure.dpi_scale_trans)
        place = axes.transData + inward if cut else axes.transData
        axes.plot(x, at, marker if cut else "_", color=color, markersize=4.5 if cut else 5, transform=place)


def _label(metric: str, rows: Sequence[Forecast]) -> str:
    targets = {row.target for row in rows}
    only = targets.pop() if len(targets) == 1 else None
    label = short(metric, 1.4) + (" (default target)" if only is None else f" = {only:.3g}")
    lost = []
    for status, word in (("unreachable", "unreachable"), ("none", "no forecast")):
        sides = [str(row.resolution) for row in rows if row.status.startswith(status)]
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
