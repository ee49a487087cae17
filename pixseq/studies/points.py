"""What a fit is made of: the runs of one resolution and one metric, as arrays, and the resamples that metrics share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixseq.errors import UsageError
from pixseq.numerics import isoflop
from pixseq.numerics.replicates import cells_of, seed_weights
from pixseq.streams import Stream
from pixseq.studies import table as reading
from pixseq.studies.fits import role

NEAR = 1.5  # times the floor of a metric, below which the noise of measuring it is much of what is seen
FLOOR_KEYS = {"n": "frechet_n", "floor_n": "frechet_floor_n", "extractors": "frechet_extractor"}
GROWING = ("params", "tokens", "tokens_per_param")

Fit = dict[str, Any]
Run = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """A metric as something to be small: itself, or `ceiling` minus it."""

    metric: str
    ceiling: float | None

    @classmethod
    def of(cls, metric: str, runs: Sequence[dict[str, Any]], maximize: bool) -> Turn:
        if not maximize and role(metric) != "classification":
            return cls(metric, None)
        values = [run[metric] for run in runs if run[metric] is not None]
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

    def turn(self, values: np.ndarray) -> np.ndarray:
        """There and back."""
        return values if self.ceiling is None else self.ceiling - values


@dataclass(frozen=True)
class Study:
    """The cells [n] of one resolution, and the resamples [S, n] that all metrics share, so that they can be compared.

    A cell is a run, or the runs of several seeds that are the same in all else.
    """

    resolution: int | None
    cells: list[list[Run]]
    ratio: isoflop.Ratio
    counts: np.ndarray  # how often a resample holds each cell
    picks: np.ndarray  # in [0, 1): which residual a resample gives each cell

    @classmethod
    def of(cls, runs: Sequence[Run], resolution: int | None, resamples: int, seed: int) -> Study:
        """Cells are resampled within their budget; budgets of too few cells for that are resampled together."""
        cells = cells_of(runs)
        params, tokens, flops, budgets = (
            np.array([cell[0][key] for cell in cells]) for key in ("params", "tokens", "flops", "budget")
        )
        rng = np.random.default_rng([seed, resolution or 0, Stream.BOOTSTRAP])
        _, stratum, sizes = np.unique(budgets, return_inverse=True, return_counts=True)
        stratum = np.where(sizes[stratum] < isoflop.MIN_RUNS, -1, stratum)
        counts = np.empty((resamples, len(cells)))
        for one in np.unique(stratum):
            members = np.flatnonzero(stratum == one)
            shares = np.full(len(members), 1 / len(members))
            counts[:, members] = rng.multinomial(len(members), shares, size=resamples)
        picks = rng.random((resamples, len(cells)))
        return cls(resolution, cells, isoflop.flops_ratio(params, tokens, flops), counts, picks)

    def points(self, turn: Turn) -> Points:
        has = np.array([any(run[turn.metric] is not None for run in cell) for cell in self.cells], bool)
        cells = [[run for run in cell if run[turn.metric] is not None] for cell in itertools.compress(self.cells, has)]
        table = np.array([[cell[0][key] for key in ("params", "tokens", "budget")] for cell in cells]).reshape(-1, 3)
        budgets, index = np.unique(table[:, 2], return_inverse=True)
        values = [turn.turn(np.array([run[turn.metric] for run in cell])) for cell in cells]
        y = np.array([value.mean() for value in values])
        weight, spread = seed_weights(values)
        counts, picks = self.counts[:, has], self.picks[:, has]
        return Points(turn, self, cells, table[:, 0], table[:, 1], budgets, index, y, weight, spread, counts, picks)


@dataclass(frozen=True)
class Points:
    """The cells of one resolution that have one metric. `y` is to be small; `index` is each one's place in `budgets`.

    `weight` [n] is the inverse variance of `y`, relatively; `spread` the deviation of one seed, None without several.
    """

    turn: Turn
    study: Study
    cells: list[list[Run]]
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
        """What people call a cell."""
        id = self.cells[i][0]["id"]
        return "a run" if id is None else str(id)

    def floor(self) -> Fit | None:
        """What the metric is where nothing is left to gain: of real pictures against real ones. None: not known.

        "floor" is its median over the cells, "within" how many cells lie at or below their own, "near" how many below
        NEAR times it; "n" and "extractors" are all that were used.
        """
        if self.turn.metric not in reading.MEASURED_WITH:
            return None
        rows = [run for cell in self.cells for run in cell]
        floors = np.array([run["frechet_floor"] for run in rows if run.get("frechet_floor") is not None], float)
        used = {key: sorted({run[key] for run in rows if run.get(key) is not None}) for key in FLOOR_KEYS.values()}
        if not len(floors) and not any(used.values()):
            return None
        values = np.array([run[self.turn.metric] for run in rows if run.get("frechet_floor") is not None], float)
        found = {name: used[key] for name, key in FLOOR_KEYS.items()}
        counts = {"within": int((values <= floors).sum()), "near": int((values < NEAR * floors).sum())}
        return {"floor": float(np.median(floors)) if len(floors) else None, **counts, "runs": len(rows), **found}

    def blank(self, method: str) -> Fit:
        """A fit without numbers."""
        growth = [f"{what}_{part}" for what in GROWING for part in ("exponent", "exponent_ci", "coefficient")]
        names = (*growth, "E", "E_ci", "A", "alpha", "alpha_ci", "B", "beta", "beta_ci", "residual")
        return {
            "metric": self.turn.metric,
            "direction": "minimize" if self.turn.ceiling is None else "maximize",
            "resolution": self.study.resolution,
            "transform": self.turn.text,
            "method": method,
            **dict.fromkeys(names),
            "seed_spread": self.spread,
            "floor": self.floor(),
            "outliers": [],
            "budgets": [],
            "draws": {},
            "refused": None,
            "flags": [],
        }

    def budget(self, k: int, status: str, log_n: float | None, value: float | None, curvature: float | None) -> Fit:
        """One entry of "budgets"; `log_n` and `value` None where there is no optimum to name."""
        row: Fit = {"flops": float(self.budgets[k])}
        row |= dict.fromkeys(("params_opt", "tokens_opt", "tokens_per_param", "value_opt"))
        if log_n is not None:
            log_d = float(self.study.ratio.log_tokens(np.log(self.budgets[k]), np.array(log_n)))
            row |= {"params_opt": number(np.exp(log_n)), "tokens_opt": number(np.exp(log_d))}
            row |= {"tokens_per_param": number(np.exp(log_d - log_n)), "value_opt": number(self.turn.turn(value))}
        runs = int((self.index == k).sum())
        return row | {"curvature": number(curvature), "runs": runs, "status": status}

    def sizes(self, k: int) -> tuple[float, float]:
        ours = self.params[self.index == k]
        return float(ours.min()), float(ours.max())


# ---- numbers


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def number(value: float | None) -> float | None:
    """For JSON, which knows no infinity."""
    return float(value) if value is not None and np.isfinite(value) else None


def exp(value: float) -> float | None:
    with np.errstate(over="ignore"):
        return number(np.exp(value))
