"""The line chart of one measurement: accuracy by layer, loss over steps. Numbers in, uint8 [H, W, 3] out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pixseq.drawing.page import COLORS, FAINT, INK, key, key_rows, legend, picture, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pixseq.drawing.page import Page

SIZE = (5.0, 3.2)  # inches
MARKERS = ("o", "s", "^", "D")
MARKERS_UP_TO = 40  # points in a series; more of them would hide the line
STYLES = ("-", "--", "-.", ":")  # of the lines that share a colour
DASHES = ((0, (6, 3)), (0, (2.5, 2)), (0, (1, 1.5)))  # of levels

Series = tuple[str, Sequence[float], Sequence[float]]  # name, xs, ys; a y may be NaN, where the line breaks


def line_chart(
    series: Sequence[Series],
    title: str,
    x_label: str,
    y_label: str,
    levels: Sequence[tuple[str, float]] = (),
) -> np.ndarray:
    """Lines over common axes. `levels` are named heights (a baseline), drawn dashed.

    Points that are not finite are left out and break their line. Names are shown as they are, cut to their place.
    """
    lines = [(name, _points(xs, ys), _style(i)) for i, (name, xs, ys) in enumerate(series)]
    heights = [(name, float(y), _level_style(i)) for i, (name, y) in enumerate(levels) if math.isfinite(y)]

    def draw(page: Page) -> None:
        axes = page.subplots()
        keys = []
        for name, points, style in lines:
            _draw_line(axes, points, style)
            marker = style["marker"] if len(points) <= MARKERS_UP_TO else None
            keys += [key(name, marker, style["color"], style["linestyle"])] if name else []
        for name, y, style in heights:
            axes.axhline(y, linewidth=1, **style)
            keys.append(key(name, None, style["color"], style["linestyle"], width=1))
        _set_axes(axes, np.concatenate([np.empty(0), *(points[:, 0] for _, points, _ in lines)]))
        page.suptitle(short(title, 0.96 * SIZE[0], 9), fontsize=9)
        axes.set_xlabel(short(x_label, 0.8 * SIZE[0]))
        axes.set_ylabel(short(y_label, 0.4 * SIZE[1]))
        if len(keys) > 1 or heights:  # one line needs no key: the title and the axis say what it is
            legend(page, *key_rows(keys, SIZE[0]))

    return picture(SIZE, draw)


def _points(xs: Sequence[float], ys: Sequence[float]) -> np.ndarray:
    """[n, 2], NaN where either is not finite."""
    points = np.stack([np.asarray(xs, float), np.asarray(ys, float)], axis=1).reshape(-1, 2)
    points[~np.isfinite(points).all(axis=1)] = np.nan
    return points


def _style(i: int) -> dict[str, Any]:
    return {
        "color": COLORS[i % len(COLORS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": STYLES[i // len(COLORS) % len(STYLES)],
    }


def _level_style(i: int) -> dict[str, Any]:
    return {"color": (INK, FAINT)[i % 2], "linestyle": DASHES[i % 3]}


def _draw_line(axes: Axes, points: np.ndarray, style: dict[str, Any]) -> None:
    rim: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.5, "markersize": 4.5}
    if len(points) <= MARKERS_UP_TO:
        axes.plot(*points.T, **style, **rim)
        return
    axes.plot(*points.T, color=style["color"], linestyle=style["linestyle"])
    known = np.pad(np.isfinite(points[:, 0]), 1)
    alone = points[known[1:-1] & ~known[:-2] & ~known[2:]]  # no line goes through these
    axes.plot(*alone.T, color=style["color"], marker=style["marker"], linestyle="none", **rim)


def _set_axes(axes: Axes, xs: np.ndarray) -> None:
    """Few round ticks; only whole numbers get one where all x are whole (layers, steps)."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    xs = xs[np.isfinite(xs)]
    whole = bool((xs == np.round(xs)).all())
    axes.margins(x=0.025, y=0.06)
    if len(xs) and np.ptp(xs) == 0 and whole:
        axes.set_xlim(xs[0] - 0.5, xs[0] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 5, 10], integer=whole))
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    if whole and np.abs(xs).max(initial=0) < 1e9:
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(False, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
