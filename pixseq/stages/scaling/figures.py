"""The figures of a scaling study, as a paper prints them, drawn with matplotlib (the extra `plot`).

A page column is 3.5 inches wide. No letter is smaller than 7 points, colours are told apart under every common colour
blindness, and what colour says, a marker or a line style says too.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pixseq import drawing
from pixseq.artifacts import atomic
from pixseq.errors import PixseqError
from pixseq.stages.scaling.panels import (
    COLUMN,
    DPI,
    FAINT,
    INK,
    few_ticks,
    key,
    legend,
    log_axis,
    log_ticks,
    picture,
    power,
    say,
    short,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    Page = Figure | SubFigure

ROW, LONE_ROW = 1.45, 1.9  # inches, of one row of panels; of the only one
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = (f"#{r:02x}{g:02x}{b:02x}" for r, g, b in drawing.COLORS)
METHODS = {"isoflop": (":", GREEN), "direct": ("--", ORANGE), "varpro": ("-", BLUE)}
HOLLOW = {"edge": "s", "not convex": "^", "too few runs": "v", "outside": "o"}  # markers of optima that do not count
MARKERS = ("o", "s", "^", "D", "v", "P")
BAND = 0.13  # opacity
LANGUAGE, PIXELS = 20, (200, 400)  # tokens per parameter: of language, and of pixels by later (secondary) sources
WIDEST_INTERVAL = 1e3  # times the greatest forecast; an interval that reaches farther is cut off with an arrow

Fit = dict[str, Any]


def require() -> None:
    """Raises PixseqError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PixseqError("figures need matplotlib, which is not installed", "pip install 'pixseq[plot]'") from None


def fit_targets(plot: str | Path) -> list[Path]:
    """The sheet, and beside it the figures that it shows together."""
    plot = Path(plot)
    stem = plot.stem if plot.suffix.lower() == ".png" else plot.name
    return [plot, *(plot.with_name(f"{stem}.{name}.png") for name in ("isoflop", "optimum", "tokens-per-parameter"))]


def check_fit(plot: str | Path, overwrite: bool) -> None:
    """Called before any work. Raises PixseqError where matplotlib is missing or a target cannot be written."""
    require()
    for target in fit_targets(plot):
        atomic.check_target(target, overwrite)


def save_fit(
    plot: str | Path,
    numbers: Mapping[str, Any],
    config: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, Any]],
    overwrite: bool = False,
) -> None:
    """The figures of the numbers of a fit: PNGs at `fit_targets(plot)`, each with its manifest."""
    check_fit(plot, overwrite)
    study = Study(numbers)
    width = max(COLUMN, COLUMN / 2 * len(study.resolutions))
    height = 1.15 + (ROW * len(study.metrics) if len(study.metrics) > 1 else LONE_ROW)
    draws = {"IsoFLOP profiles": _isoflop, "Compute-optimal sizes": _optimum, "Tokens per parameter": _per_param}

    def sheet(page: Page) -> None:
        across = width <= COLUMN
        parts = page.subfigures(1 if across else 3, 3 if across else 1)
        for part, (title, draw) in zip(parts, draws.items()):
            part.suptitle(title, fontsize=9)
            draw(part, study)

    size = (3 * width, height + 0.2) if width <= COLUMN else (width, 3 * height + 0.6)
    images = [picture(size, sheet)]
    images += [picture((width, height), lambda page, draw=draw: draw(page, study)) for draw in draws.values()]
    for target, image in zip(fit_targets(plot), images):
        _save(target, image, "scaling fit", config, inputs, overwrite)


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
    _save(plot, image, "scaling forecast", config, inputs, overwrite)


def _save(target: str | Path, image: np.ndarray, stage: str, config, inputs, overwrite: bool) -> None:
    from pixseq.artifacts.picture import save_png

    save_png(target, image, stage, config, inputs, {"dpi": DPI}, overwrite)


def _flops(numbers: Mapping[str, Any]) -> str:
    """An axis' label: how they are counted, where that is known."""
    counting = numbers.get("counting")
    return f"training FLOPs ({counting})" if counting else "training FLOPs"


class Study:
    """The numbers of a fit, found by metric and resolution."""

    def __init__(self, numbers: Mapping[str, Any]):
        self.level = numbers["bootstrap"]["level"]
        self.flops = _flops(numbers)
        self.fits: list[Fit] = numbers["fits"]
        self.metrics = list(dict.fromkeys(fit["metric"] for fit in self.fits))
        self.resolutions = list(dict.fromkeys(fit["resolution"] for fit in self.fits))
        self.all_runs = numbers["runs"]

    def of(self, metric: str, resolution: int | None) -> dict[str, Fit]:
        """The fits by their methods, in a fixed order."""
        ours = [fit for fit in self.fits if (fit["metric"], fit["resolution"]) == (metric, resolution)]
        return {method: fit for method in METHODS for fit in ours if fit["method"] == method}

    def runs(self, metric: str, resolution: int | None) -> np.ndarray:
        """Budget, params and value of the runs that have the metric, [n, 3]."""
        ours = [run for run in self.all_runs if run["resolution"] == resolution and run.get(metric) is not None]
        return np.array([[run["budget"], run["params"], run[metric]] for run in ours]).reshape(-1, 3)

    def budgets(self) -> np.ndarray:
        return np.unique([run["budget"] for run in self.all_runs])

    def panels(self, page: Page, **shared: Any) -> list[tuple[Axes, str, int | None]]:
        """A panel for each metric (rows) and resolution (columns), titled."""
        grid = page.subplots(len(self.metrics), len(self.resolutions), squeeze=False, **shared)
        found = []
        for row, metric in zip(grid, self.metrics):
            for axes, resolution in zip(row, self.resolutions):
                title = short(metric, 26)
                axes.set_title(title if resolution is None else f"{title}, {resolution}×{resolution}")
                found.append((axes, metric, resolution))
        return found

    def letters(self) -> int:
        """How many letters of the smallest size a panel is wide."""
        return 58 if len(self.resolutions) == 1 else 27


# ---- IsoFLOP profiles


def _isoflop(page: Page, study: Study) -> None:
    """Runs by size, a parabola for each budget, its optimum; hollow where a budget has none, by its reason."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    budgets = study.budgets()
    norm = LogNorm(budgets[0], budgets[-1] if len(budgets) > 1 else budgets[0] * 10)
    colors = ScalarMappable(norm, LinearSegmentedColormap.from_list("budgets", _viridis()))
    panels = study.panels(page, sharex=True)
    seen: set[str] = set()
    for axes, metric, resolution in panels:
        runs = study.runs(metric, resolution)
        if not len(runs):
            say(axes, "no run has this metric")
            axes.set_yticks([])
            continue
        axes.scatter(runs[:, 1], runs[:, 2], s=7, c=colors.to_rgba(runs[:, 0]), linewidths=0)
        fit = study.of(metric, resolution).get("isoflop")
        if fit is not None:
            for row in fit["budgets"]:
                seen.add(_profile(axes, fit, row, runs[np.isclose(runs[:, 0], row["flops"])], colors))
            _title_refusal(axes, fit, study)
        log_axis(axes, "y") if runs[:, 2].min() > 0 and np.ptp(np.log(runs[:, 2])) > math.log(4) else few_ticks(axes)
        if resolution == study.resolutions[0]:
            axes.set_ylabel(short(metric, 22))
    sizes = np.array([run["params"] for run in study.all_runs])
    for axes, _, _ in panels:
        axes.set_xlim(sizes.min() / 1.5, sizes.max() * 1.5)
        log_axis(axes, "x", 6 if len(study.resolutions) == 1 else 3)
    for axes, _, _ in panels[-len(study.resolutions) :]:
        axes.set_xlabel("parameters")
    bar = page.colorbar(colors, ax=[axes for axes, _, _ in panels], location="top", aspect=45, pad=0.02, shrink=0.9)
    bar.ax.minorticks_off()
    few = len(budgets) <= 6
    ticks = list(budgets) if few else log_ticks(budgets[0], budgets[-1], 6)
    bar.set_ticks(ticks, labels=[power(tick) for tick in ticks])
    bar.set_label(study.flops, labelpad=3)
    keys = [key("run", "o", INK, size=2.6), *([key("optimum", "D", INK)] if "ok" in seen else [])]
    hollow = {status: marker for status, marker in HOLLOW.items() if status in seen}
    keys += [key(f"best run ({status})", marker, INK, hollow=True) for status, marker in hollow.items()]
    legend(page, keys, 2 if len(keys) == 4 else 3)


def _profile(axes: Axes, fit: Fit, row: Fit, runs: np.ndarray, colors) -> str:
    """One budget; returns its status."""
    color = colors.to_rgba(row["flops"])
    if row["params_opt"] is not None and row["value_opt"] is not None:
        reach = [*runs[:, 1], row["params_opt"]]
        sizes = np.geomspace(min(reach) / 1.15, max(reach) * 1.15, 100)
        # The parabola is of the metric, or of its ceiling minus it: then it opens downwards.
        bend = (row["curvature"] or 0) * (-1 if fit["transform"] else 1)
        axes.plot(sizes, row["value_opt"] + bend * np.log(sizes / row["params_opt"]) ** 2, color=color)
        axes.plot(row["params_opt"], row["value_opt"], "D", color=color, markeredgecolor=INK, markeredgewidth=0.6)
    elif len(runs):
        best = runs[runs[:, 2].argmax() if fit["direction"] == "maximize" else runs[:, 2].argmin()]
        marker = HOLLOW.get(row["status"], "o")
        axes.plot(best[1], best[2], marker, markersize=6, markerfacecolor="none", color=color)
    return row["status"]


def _viridis() -> list:
    """Without its last fifth, which is too pale for thin lines on white."""
    import matplotlib

    return [matplotlib.colormaps["viridis"](share) for share in np.linspace(0, 0.82, 9)]


# ---- optimum lines


def _optimum(page: Page, study: Study) -> None:
    """N_opt and D_opt against compute: a line style for each method, bands of resamples, the optima of parabolas."""
    panels = study.panels(page, sharex=True, sharey=True)
    for axes, metric, resolution in panels:
        _lines(
            axes, study, metric, resolution, [("params", BLUE), ("tokens", ORANGE)], lambda numbers, what: numbers[what]
        )
    _finish_lines(panels, study, page, "parameters, tokens")
    keys = [key("parameters", None, BLUE, "-"), key("tokens", None, ORANGE, "-")]
    keys += [key(method, None, INK, style) for method, (style, _) in METHODS.items()]
    legend(page, keys + _line_keys(study), 3)


def _per_param(page: Page, study: Study) -> None:
    """Tokens for each parameter at the optimum, beside what is known of language and of pixels."""
    panels = study.panels(page, sharex=True, sharey=True)
    for axes, metric, resolution in panels:
        if any(not fit["refused"] for fit in study.of(metric, resolution).values()):
            axes.axhspan(*PIXELS, color="#dddddd", linewidth=0, zorder=0)
            axes.axhline(LANGUAGE, color=FAINT, linewidth=0.8, linestyle=(0, (1, 1)))
        _lines(
            axes, study, metric, resolution, [("ratio", None)], lambda numbers, _: numbers["tokens"] - numbers["params"]
        )
    _finish_lines(panels, study, page, "tokens per parameter")
    from matplotlib.patches import Patch

    keys = [key(method, None, color, style) for method, (style, color) in METHODS.items()]
    keys += _line_keys(study)
    keys += [key(f"language, {LANGUAGE}", None, FAINT, (0, (1, 1)), width=0.8)]
    keys += [Patch(color="#dddddd", linewidth=0, label="pixels, {}–{} (secondary)".format(*PIXELS))]
    legend(page, keys, 2)


def _lines(axes: Axes, study: Study, metric: str, resolution: int | None, quantities, of) -> None:
    """Lines of one panel. `of` maps logs of {"params", "tokens"} and a quantity's name to the log of that quantity."""
    fits = study.of(metric, resolution)
    standing = [fit for fit in fits.values() if not fit["refused"]]
    if not standing:
        say(axes, next((f"no fit: {fit['refused']}" for fit in fits.values()), "no fit"), study.letters())
        return
    for fit in reversed(standing):  # the solid line first: a dashed one on it shows both
        style, own = METHODS[fit["method"]]
        budgets = [row["flops"] for row in fit["budgets"]]
        log_c = np.linspace(np.log(min(budgets) / 1.3), np.log(max(budgets) * 1.3), 40)
        drawn = _grown(fit["draws"], log_c) if fit["draws"] else None
        optima = [row for row in fit["budgets"] if row["params_opt"] and row["tokens_opt"]]
        shown = [row for row in optima if fit["method"] == "isoflop" or row["status"] != "ok"]
        for what, color in quantities:
            color = color or own
            if drawn is not None and len(drawn["params"]) > 1:
                tail = 50 * (1 - study.level)
                low, high = np.exp(np.percentile(of(drawn, what), [tail, 100 - tail], axis=0))
                axes.fill_between(np.exp(log_c), low, high, color=color, alpha=BAND, linewidth=0)
            axes.plot(np.exp(log_c), np.exp(of(_grown(fit, log_c), what))[0], color=color, linestyle=style)
            for row in shown:
                value = math.exp(of({name: math.log(row[f"{name}_opt"]) for name in ("params", "tokens")}, what))
                inside = row["status"] == "ok"
                marker = "D" if inside else HOLLOW.get(row["status"], "o")
                face = color if inside else "white"
                axes.plot(
                    row["flops"],
                    value,
                    marker,
                    color=color,
                    markerfacecolor=face,
                    markeredgewidth=0.7,
                    zorder=3 if inside else 4,
                )


def _grown(numbers: Mapping[str, Any], log_c: np.ndarray) -> dict[str, np.ndarray]:
    """log N_opt and log D_opt at log C [K], of a fit (S = 1) or of its draws: [S, K] each."""
    return {
        what: np.log(np.atleast_1d(numbers[f"{what}_coefficient"]))[:, None]
        + np.atleast_1d(numbers[f"{what}_exponent"])[:, None] * log_c
        for what in ("params", "tokens")
    }


def _finish_lines(panels, study: Study, page: Page, quantity: str) -> None:
    budgets = study.budgets()
    for axes, metric, resolution in panels:
        axes.set_xlim(budgets[0] / 1.6, budgets[-1] * 1.6)
        log_axis(axes, "x", 5 if len(study.resolutions) == 1 else 3, power)
        if any(not fit["refused"] for fit in study.of(metric, resolution).values()):
            for fit in study.of(metric, resolution).values():
                _title_refusal(axes, fit, study)
    standing = any(not fit["refused"] for fit in study.fits)
    for axes, _, _ in panels:
        log_axis(axes, "y", 5) if standing else axes.set_yticks([])
    for axes, _, _ in panels[-len(study.resolutions) :]:
        axes.set_xlabel(study.flops)
    page.supylabel(quantity, fontsize=7.5)


def _line_keys(study: Study) -> list:
    statuses = {row["status"] for fit in study.fits if not fit["refused"] for row in fit["budgets"]}
    keys = [key("parabola's optimum", "D", INK)] if any(_has_parabolas(fit) for fit in study.fits) else []
    return keys + ([key("beyond the sizes run", "o", INK, hollow=True)] if "outside" in statuses else [])


def _has_parabolas(fit: Fit) -> bool:
    return fit["method"] == "isoflop" and not fit["refused"]


def _title_refusal(axes: Axes, fit: Fit, study: Study) -> None:
    """Below a panel's title, where it hides nothing."""
    if fit["refused"]:
        text = textwrap.shorten(
            f"no {fit['method']} fit: {drawing.plain(fit['refused'])}", 2 * study.letters(), placeholder=" …"
        )
        axes.set_title(f"{axes.get_title()}\n{textwrap.fill(text, study.letters())}", fontsize=7)


# ---- forecast


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
    axes.set_ylabel(_flops(numbers))
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
