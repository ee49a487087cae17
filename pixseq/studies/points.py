"""What a fit is made of: the runs of one resolution and one metric, as arrays, and the resamples that metrics share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pixseq.artifacts.fit import Fit, Floor, Optimum, Run
from pixseq.errors import UsageError
from pixseq.numerics import isoflop
from pixseq.numerics.replicates import by_seed, seed_weights
from pixseq.streams import Stream
from pixseq.studies.fits import finite, measure
from pixseq.studies.run_table import MEASURED_WITH

NEAR = 1.5  # times the floor of a metric, below which the noise of measuring it is much of what is seen


@dataclass(frozen=True)
class Direction:
    """Which way a metric is better, and how it becomes something to be small: itself, or `ceiling` minus it."""

    metric: str
    ceiling: float | None

    @classmethod
    def of(cls, metric: str, runs: Sequence[Run], maximize: bool) -> Direction:
        if not maximize and measure(metric) != "classification":
            return cls(metric, None)
        values = [value for run in runs if (value := run.values[metric]) is not None]
        for ceiling in (1.0, 100.0):
            if all(0 <= value <= ceiling for value in values):
                return cls(metric, ceiling)
        raise UsageError(
            f"{metric} is to be large, but lies between {min(values):.4g} and {max(values):.4g}",
            "a metric to be large is a share from 0 to 1 or a percentage; give another as a loss, to be small",
        )

    @property
    def text(self) -> str | None:
        return None if self.ceiling is None else f"{self.ceiling:.0f} - {self.metric}"

    def flipped(self, values: np.ndarray) -> np.ndarray:
        """There and back."""
        return values if self.ceiling is None else self.ceiling - values


@dataclass(frozen=True)
class Resampled:
    """The runs of one resolution, and the resamples [S, n] that all metrics share, so that they can be compared.

    A group is a run, or the runs of several seeds that are the same in all else.
    """

    resolution: int | None
    groups: list[list[Run]]
    ratio: isoflop.Ratio
    counts: np.ndarray  # how often a resample holds each group
    picks: np.ndarray  # in [0, 1): which residual a resample gives each group

    @classmethod
    def of(cls, runs: Sequence[Run], resolution: int | None, resamples: int, seed: int) -> Resampled:
        """Groups are resampled within their budget; budgets of too few for that are resampled together."""
        groups = by_seed(runs)
        params, tokens, flops, budgets = (
            np.array([getattr(group[0], key) for group in groups]) for key in ("params", "tokens", "flops", "budget")
        )
        rng = np.random.default_rng([seed, resolution or 0, Stream.BOOTSTRAP])
        _, stratum, sizes = np.unique(budgets, return_inverse=True, return_counts=True)
        stratum = np.where(sizes[stratum] < isoflop.MIN_RUNS, -1, stratum)
        counts = np.empty((resamples, len(groups)))
        for one in np.unique(stratum):
            members = np.flatnonzero(stratum == one)
            shares = np.full(len(members), 1 / len(members))
            counts[:, members] = rng.multinomial(len(members), shares, size=resamples)
        picks = rng.random((resamples, len(groups)))
        return cls(resolution, groups, isoflop.flops_ratio(params, tokens, flops), counts, picks)

    def points(self, direction: Direction) -> Points:
        """Those that have a metric."""
        metric = direction.metric
        measured = [[run for run in group if run.values[metric] is not None] for group in self.groups]
        has = np.array([bool(group) for group in measured], bool)
        groups = list(filter(None, measured))
        table = np.array([[runs[0].params, runs[0].tokens, runs[0].budget] for runs in groups]).reshape(-1, 3)
        budgets, index = np.unique(table[:, 2], return_inverse=True)
        values = [direction.flipped(np.array([run.values[metric] for run in group])) for group in groups]
        y = np.array([value.mean() for value in values])
        weight, spread = seed_weights(values)
        counts, picks = self.counts[:, has], self.picks[:, has]
        sizes = (table[:, 0], table[:, 1], budgets, index)
        return Points(direction, self, groups, *sizes, y, weight, spread, counts, picks)


@dataclass(frozen=True)
class Points:
    """The groups of one resolution that have one metric. `y` is to be small; `index` is each one's place in `budgets`.

    `weight` [n] is the inverse variance of `y`, relatively; `spread` the deviation of one seed, None without several.
    """

    direction: Direction
    of: Resampled
    groups: list[list[Run]]
    params: np.ndarray
    tokens: np.ndarray
    budgets: np.ndarray
    index: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    spread: float | None
    counts: np.ndarray
    picks: np.ndarray

    def name(self, i: int) -> str:
        """What people call a run."""
        id = self.groups[i][0].id
        return "a run" if id is None else str(id)

    def floor(self) -> Floor | None:
        """What the metric is where nothing is left to gain; None: nothing is known of how it was measured."""
        metric = self.direction.metric
        if metric not in MEASURED_WITH:
            return None
        runs = [run for group in self.groups for run in group]
        known = [run for run in runs if run.beside.get("frechet_floor") is not None]
        n, floor_n, extractors = (
            tuple(sorted({run.beside[key] for run in runs if run.beside.get(key) is not None}))
            for key in ("frechet_n", "frechet_floor_n", "frechet_extractor")
        )
        if not known and not (n or floor_n or extractors):
            return None
        floors = np.array([run.beside["frechet_floor"] for run in known], float)
        values = np.array([run.values[metric] for run in known], float)
        within, near = int((values <= floors).sum()), int((values < NEAR * floors).sum())
        median = float(np.median(floors)) if known else None
        return Floor(median, within, near, len(runs), n, floor_n, extractors)

    def blank(self, method: str) -> Fit:
        """A fit without numbers."""
        direction = self.direction
        names = (direction.metric, "minimize" if direction.ceiling is None else "maximize")
        return Fit(*names, self.of.resolution, direction.text, method, seed_spread=self.spread, floor=self.floor())

    def optimum(
        self,
        k: int,
        status: str,
        log_n: float | None = None,
        value: float | None = None,
        curvature: float | None = None,
    ) -> Optimum:
        """That of a budget; `log_n` and `value` None where there is none to name."""
        runs, budget = int((self.index == k).sum()), float(self.budgets[k])
        if log_n is None or value is None:
            return Optimum(budget, None, None, None, None, finite(curvature), runs, status)
        log_d = float(self.of.ratio.log_tokens(np.log(self.budgets[k]), np.array(log_n)))
        best = float(self.direction.flipped(np.array(value)))
        sizes = (finite(np.exp(log_n)), finite(np.exp(log_d)), finite(np.exp(log_d - log_n)))
        return Optimum(budget, *sizes, finite(best), finite(curvature), runs, status)

    def sizes(self, k: int) -> tuple[float, float]:
        ours = self.params[self.index == k]
        return float(ours.min()), float(ours.max())


# ---- numbers


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def exp(value: float) -> float | None:
    with np.errstate(over="ignore"):
        return finite(np.exp(value))
