"""The figures of a scaling study, as a paper prints them.

A page column is 3.5 inches wide. No letter is smaller than 7 points, colours are told apart under every common colour
blindness, and what colour says, a marker or a line style says too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pixseq.artifacts.fit import Fit, Optimum, Run, StudyFit
from pixseq.artifacts.targets import check_target
from pixseq.drawing.page import (
    BLUE,
    COLUMN,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    few_ticks,
    flops_label,
    key,
    legend,
    log_axis,
    log_ticks,
    picture,
    power,
    save,
    say,
    short,
    wrapped,
)
from pixseq.numerics.forecast import Frontier
from pixseq.numerics.replicates import by_seed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable

    from pixseq.drawing.page import Key, Page

    Panel = tuple[Axes, str, int | None]  # of a metric and a resolution

ROW, LONE_ROW = 1.45, 1.9  # inches, of one row of panels; of the only one
METHODS = {"isoflop": (":", GREEN), "direct": ("--", ORANGE), "varpro": ("-", BLUE)}
HOLLOW = {
    "edge": "s",
    "not convex": "^",
    "too few runs": "v",
    "scattered": "P",
    "outside": "o",
}  # markers of optima that do not count
LEFT_OUT, FLOOR = "left out", "floor"  # what else a key explains
# Lines to draw: their colour, and how the log of what they show follows from log N and log D.
Quantity = tuple[str | None, Callable[[Any, Any], Any]]
SIZES: tuple[Quantity, ...] = ((BLUE, lambda log_n, log_d: log_n), (ORANGE, lambda log_n, log_d: log_d))
RATIO: tuple[Quantity, ...] = ((None, lambda log_n, log_d: log_d - log_n),)
BAND = 0.13  # opacity
LANGUAGE, PIXELS = 20, (200, 400)  # tokens per parameter: of language, and of pixels by later (secondary) sources


def fit_targets(plot: str | Path) -> list[Path]:
    """The sheet, and beside it the figures that it shows together."""
    plot = Path(plot)
    stem = plot.stem if plot.suffix.lower() == ".png" else plot.name
    return [plot, *(plot.with_name(f"{stem}.{name}.png") for name in ("isoflop", "optimum", "tokens-per-parameter"))]


def check_fit(plot: str | Path, overwrite: bool) -> None:
    """Called before any work. Raises PixseqError where a target cannot be written."""
    for target in fit_targets(plot):
        check_target(target, overwrite)


def save_fit(
    plot: str | Path,
    found: StudyFit,
    config: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, Any]],
    overwrite: bool = False,
) -> None:
    """The figures of the fits of a study: PNGs at `fit_targets(plot)`, each with its manifest."""
    check_fit(plot, overwrite)
    study = Panels(found)
    width = max(COLUMN, COLUMN / 2 * len(study.resolutions))
    height = 1.15 + (ROW * len(study.metrics) if len(study.metrics) > 1 else LONE_ROW)
    draws = {"IsoFLOP profiles": _isoflop, "Compute-optimal sizes": _optimum, "Tokens per parameter": _per_param}

    def sheet(page: Page) -> None:
        across = width <= COLUMN
        parts = page.subfigures(1 if across else 3, 3 if across else 1)
        for part, (title, draw) in zip(np.atleast_1d(np.asarray(parts)), draws.items()):
            part.suptitle(title, fontsize=9)
            draw(part, study)

    size = (3 * width, height + 0.2) if width <= COLUMN else (width, 3 * height + 0.6)
    images = [picture(size, sheet)]
    images += [picture((width, height), functools.partial(draw, study=study)) for draw in draws.values()]
    for target, image in zip(fit_targets(plot), images):
        save(target, image, "scaling fit", config, inputs, overwrite)


class Panels:
    """The fits and runs of a study by metric and resolution, which are the rows and columns of its panels."""

    def __init__(self, found: StudyFit):
        self.level = found.bootstrap.level
        self.flops = flops_label(found.counting)
        self.fits, self.all_runs = found.fits, found.runs
        self.metrics, self.resolutions = found.metrics, found.resolutions

    def of(self, metric: str, resolution: int | None) -> dict[str, Fit]:
        """The fits by their methods, in a fixed order."""
        ours = [fit for fit in self.fits if (fit.metric, fit.resolution) == (metric, resolution)]
        return {method: fit for method in METHODS for fit in ours if fit.method == method}

    def runs(self, metric: str, resolution: int | None) -> np.ndarray:
        """Budget, params, mean and deviation (0: of one seed) of the runs that have the metric, [n, 4]."""
        rows = []
        for seeds in by_seed([run for run in self._at(resolution) if run.values.get(metric) is not None]):
            values = np.array([run.values[metric] for run in seeds], float)
            spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
            rows.append([seeds[0].budget, seeds[0].params, np.mean(values), spread])
        return np.array(rows).reshape(-1, 4)

    def replicated(self) -> bool:
        return any(len(seeds) > 1 for side in self.resolutions for seeds in by_seed(self._at(side)))

    def _at(self, resolution: int | None) -> list[Run]:
        return [run for run in self.all_runs if run.resolution == resolution]

    def budgets(self) -> np.ndarray:
        return np.unique([run.budget for run in self.all_runs])

    def panels(self, page: Page, **shared: Any) -> list[tuple[Axes, str, int | None]]:
        """A panel for each metric (rows) and resolution (columns), titled."""
        grid = page.subplots(len(self.metrics), len(self.resolutions), squeeze=False, **shared)
        found = []
        for row, metric in zip(grid, self.metrics):
            for axes, resolution in zip(row, self.resolutions):
                at = "" if resolution is None else f", {resolution}×{resolution}"
                axes.set_title(short(metric, self.inches() - 0.07 * len(at)) + at)
                found.append((axes, metric, resolution))
        return found

    def inches(self) -> float:
        """How wide the text over a panel may be."""
        return 2.9 if len(self.resolutions) == 1 else 1.4


# ---- IsoFLOP profiles


def _isoflop(page: Page, study: Panels) -> None:
    """Runs by size, a parabola for each budget, its optimum; hollow where a budget has none, by its reason."""
    colors = _budget_colors(study.budgets())
    panels = study.panels(page, sharex=True)
    seen: set[str] = set()
    for axes, metric, resolution in panels:
        seen |= _isoflop_panel(axes, study, metric, resolution, colors)
        if resolution == study.resolutions[0]:
            axes.set_ylabel(short(metric, 1.2))
    sizes = np.array([run.params for run in study.all_runs])
    for axes, _, _ in panels:
        axes.set_xlim(sizes.min() / 1.5, sizes.max() * 1.5)
        log_axis(axes, "x", 6 if len(study.resolutions) == 1 else 3)
    for axes, _, _ in panels[-len(study.resolutions) :]:
        axes.set_xlabel("parameters")
    _budget_bar(page, [axes for axes, _, _ in panels], study, colors)
    keys = [key("run", "o", INK, size=2.6), *([key("optimum", "D", INK)] if "ok" in seen else [])]
    hollow = {status: marker for status, marker in HOLLOW.items() if status in seen}
    keys += [key(f"best run ({status})", marker, INK, hollow=True) for status, marker in hollow.items()]
    keys += [key("deviation of seeds", "|", INK)] if study.replicated() else []
    keys += [key("left out", "x", INK)] if LEFT_OUT in seen else []
    keys += [key("real against real", None, FAINT, (0, (1, 1)), width=0.8)] if FLOOR in seen else []
    legend(page, keys, 2 if len(keys) == 4 else 3)


def _isoflop_panel(axes: Axes, study: Panels, metric: str, resolution: int | None, colors: ScalarMappable) -> set[str]:
    """What a key must explain: statuses of budgets, LEFT_OUT, FLOOR."""
    runs = study.runs(metric, resolution)
    if not len(runs):
        say(axes, "no run has this metric", study.inches())
        axes.set_yticks([])
        return set()
    axes.scatter(runs[:, 1], runs[:, 2], s=7, c=colors.to_rgba(runs[:, 0]), linewidths=0)
    several = runs[runs[:, 3] > 0]
    if len(several):
        bars = several[:, 2] + several[:, 3] * np.array([[-1], [1]])
        axes.vlines(several[:, 1], bars[0], bars[1], colors=list(colors.to_rgba(several[:, 0])), linewidth=0.8)
    fit, seen = study.of(metric, resolution).get("isoflop"), set()
    if fit is not None:
        if _floor_line(axes, fit):
            seen.add(FLOOR)
        if fit.outliers:
            places = np.array([(run.params, run.value) for run in fit.outliers], float)
            axes.plot(*places.T, "x", color=INK, markersize=5)
            seen.add(LEFT_OUT)
        for row in fit.optima:
            seen.add(_profile(axes, fit, row, runs[np.isclose(runs[:, 0], row.flops)], colors))
        _title_refusal(axes, fit, study)
    wide = runs[:, 2].min() > 0 and np.ptp(np.log(runs[:, 2])) > math.log(4)
    log_axis(axes, "y") if wide else few_ticks(axes)
    return seen


def _budget_colors(budgets: np.ndarray) -> ScalarMappable:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    norm = LogNorm(budgets[0], budgets[-1] if len(budgets) > 1 else budgets[0] * 10)
    return ScalarMappable(norm, LinearSegmentedColormap.from_list("budgets", _viridis()))


def _budget_bar(page: Page, axes: Sequence[Axes], study: Panels, colors: ScalarMappable) -> None:
    bar = page.colorbar(colors, ax=axes, location="top", aspect=45, pad=0.02, shrink=0.9)
    bar.ax.minorticks_off()
    budgets = study.budgets()
    ticks = list(budgets) if len(budgets) <= 6 else log_ticks(budgets[0], budgets[-1], 6)
    bar.set_ticks(ticks, labels=[power(tick) for tick in ticks])
    bar.set_label(study.flops, labelpad=3)


def _floor_line(axes: Axes, fit: Fit) -> bool:
    """What real pictures score against real ones; whether that is known."""
    if fit.floor is None or fit.floor.floor is None:
        return False
    axes.axhline(fit.floor.floor, color=FAINT, linewidth=0.8, linestyle=(0, (1, 1)))
    return True


def _profile(axes: Axes, fit: Fit, row: Optimum, runs: np.ndarray, colors: ScalarMappable) -> str:
    """One budget; returns its status."""
    color = colors.to_rgba(np.array([row.flops]))[0]
    if row.params is not None and row.value is not None:
        reach = [*runs[:, 1], row.params]
        sizes = np.geomspace(min(reach) / 1.15, max(reach) * 1.15, 100)
        # The parabola is of the metric, or of its ceiling minus it: then it opens downwards.
        bend = (row.curvature or 0) * (-1 if fit.transform else 1)
        axes.plot(sizes, row.value + bend * np.log(sizes / row.params) ** 2, color=color)
        axes.plot(row.params, row.value, "D", color=color, markeredgecolor=INK, markeredgewidth=0.6)
    elif len(runs):
        best = runs[runs[:, 2].argmax() if fit.direction == "maximize" else runs[:, 2].argmin()]
        marker = HOLLOW.get(row.status, "o")
        axes.plot(best[1], best[2], marker, markersize=6, markerfacecolor="none", color=color)
    return row.status


def _viridis() -> list:
    """Without its last fifth, which is too pale for thin lines on white."""
    import matplotlib

    return [matplotlib.colormaps["viridis"](share) for share in np.linspace(0, 0.82, 9)]


# ---- optimum lines


def _optimum(page: Page, study: Panels) -> None:
    """N_opt and D_opt against compute: a line style for each method, bands of resamples, the optima of parabolas."""
    panels = study.panels(page, sharex=True, sharey=True)
    for axes, metric, resolution in panels:
        _lines(axes, study, metric, resolution, SIZES)
    _finish_lines(panels, study, page, "parameters, tokens")
    keys = [key("parameters", None, BLUE, "-"), key("tokens", None, ORANGE, "-")]
    keys += [key(method, None, INK, style) for method, (style, _) in METHODS.items()]
    legend(page, keys + _line_keys(study), 3)


def _per_param(page: Page, study: Panels) -> None:
    """Tokens for each parameter at the optimum, beside what is known of language and of pixels."""
    panels = study.panels(page, sharex=True, sharey=True)
    for axes, metric, resolution in panels:
        if any(not fit.refused for fit in study.of(metric, resolution).values()):
            axes.axhspan(*PIXELS, color="#dddddd", linewidth=0, zorder=0)
            axes.axhline(LANGUAGE, color=FAINT, linewidth=0.8, linestyle=(0, (1, 1)))
        _lines(axes, study, metric, resolution, RATIO)
    _finish_lines(panels, study, page, "tokens per parameter")
    from matplotlib.patches import Patch

    keys: list[Key] = [key(method, None, color, style) for method, (style, color) in METHODS.items()]
    keys += _line_keys(study)
    keys += [key(f"language, {LANGUAGE}", None, FAINT, (0, (1, 1)), width=0.8)]
    keys += [Patch(color="#dddddd", linewidth=0, label="pixels, {}–{} (secondary)".format(*PIXELS))]
    legend(page, keys, 2)


def _lines(axes: Axes, study: Panels, metric: str, resolution: int | None, quantities: Sequence[Quantity]) -> None:
    """Lines of one panel, a line style for each method; a quantity without a colour has the method's."""
    fits = study.of(metric, resolution)
    standing = [fit for fit in fits.values() if not fit.refused]
    if not standing:
        say(axes, next((f"no fit: {fit.refused}" for fit in fits.values()), "no fit"), study.inches())
        return
    for fit in reversed(standing):  # the solid line first: a dashed one on it shows both
        style, own = METHODS[fit.method]
        budgets = [row.flops for row in fit.optima]
        log_c = np.linspace(np.log(min(budgets) / 1.3), np.log(max(budgets) * 1.3), 40)
        optima = [(row, row.params, row.tokens) for row in fit.optima if row.params and row.tokens]
        shown = [one for one in optima if fit.method == "isoflop" or one[0].status != "ok"]
        for color, of in quantities:
            color = color or own
            if fit.draws is not None and len(fit.draws) > 1:
                tail = 50 * (1 - study.level)
                low, high = np.exp(np.percentile(of(*_grown(fit.draws, log_c)), [tail, 100 - tail], axis=0))
                axes.fill_between(np.exp(log_c), low, high, color=color, alpha=BAND, linewidth=0)
            axes.plot(np.exp(log_c), np.exp(of(*_grown(fit.frontier, log_c)))[0], color=color, linestyle=style)
            for row, params, tokens in shown:
                _mark_optimum(axes, row, math.exp(of(math.log(params), math.log(tokens))), color)


def _mark_optimum(axes: Axes, row: Optimum, value: float, color: str) -> None:
    """Hollow where it lies outside of the sizes run."""
    inside = row.status == "ok"
    marker = "D" if inside else HOLLOW.get(row.status, "o")
    face, zorder = (color, 3) if inside else ("white", 4)
    axes.plot(row.flops, value, marker, color=color, markerfacecolor=face, markeredgewidth=0.7, zorder=zorder)


def _grown(frontier: Frontier, log_c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log N_opt and log D_opt at log C [K]: [S, K] each."""
    sizes, data = (np.stack([law.log(at) for at in log_c], axis=1) for law in (frontier.params, frontier.tokens))
    return sizes, data


def _finish_lines(panels: Sequence[Panel], study: Panels, page: Page, quantity: str) -> None:
    budgets = study.budgets()
    for axes, metric, resolution in panels:
        axes.set_xlim(budgets[0] / 1.6, budgets[-1] * 1.6)
        log_axis(axes, "x", 5 if len(study.resolutions) == 1 else 3, power)
        if any(not fit.refused for fit in study.of(metric, resolution).values()):
            for fit in study.of(metric, resolution).values():
                _title_refusal(axes, fit, study)
    standing = any(not fit.refused for fit in study.fits)
    for axes, _, _ in panels:
        log_axis(axes, "y", 5) if standing else axes.set_yticks([])
    for axes, _, _ in panels[-len(study.resolutions) :]:
        axes.set_xlabel(study.flops)
    page.supylabel(quantity, fontsize=7.5)


def _line_keys(study: Panels) -> list:
    statuses = {row.status for fit in study.fits if not fit.refused for row in fit.optima}
    keys = [key("parabola's optimum", "D", INK)] if any(_has_parabolas(fit) for fit in study.fits) else []
    return keys + ([key("beyond the sizes run", "o", INK, hollow=True)] if "outside" in statuses else [])


def _has_parabolas(fit: Fit) -> bool:
    return fit.method == "isoflop" and not fit.refused


def _title_refusal(axes: Axes, fit: Fit, study: Panels) -> None:
    """Below a panel's title, where it hides nothing."""
    if fit.refused:
        text = wrapped(f"no {fit.method} fit: {fit.refused}", study.inches(), 2)
        axes.set_title(f"{axes.get_title()}\n{text}", fontsize=7)
