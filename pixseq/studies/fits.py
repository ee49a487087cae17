"""A fit.json that is open: its fits by one method, and what its metrics are called and play."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pixseq.artifacts import manifest
from pixseq.artifacts.metrics import read_metrics
from pixseq.errors import PixseqError, UsageError

METHODS = ("isoflop", "direct", "varpro")
# In the words of a metric's name. Generation first: a name may speak of both ("frechet_loss").
ROLES = {
    "generation": r"frechet|\b(fid|fd|kid)",
    "classification": r"accuracy|\b(acc|top) ?\d*\b",
    "loss": r"loss|nats|\bmse\b|bits",
}
BEYOND = 1.01  # budgets of a study agree to a percent: a run has whole steps

Fit = dict[str, Any]


@dataclass(frozen=True)
class Opened:
    """A fit.json: all its numbers, and of its fits those of one method."""

    path: Path
    numbers: dict[str, Any]
    fits: list[Fit]
    reference: dict[str, str]

    @property
    def level(self) -> float:
        return self.numbers["bootstrap"]["level"]

    @property
    def resampled(self) -> bool:
        return any(values for one in self.fits for values in one["draws"].values())

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(one["metric"] for one in self.fits))

    @property
    def resolutions(self) -> list[int | None]:
        return list(dict.fromkeys(one["resolution"] for one in self.fits))

    def flops(self, value: float) -> str:
        """So many, with the name of their counting where it is known."""
        counting = self.numbers["counting"]
        return f"{value:.3g} FLOPs ({counting})" if counting else f"{value:.3g} FLOPs"

    def studied(self, resolution: int | None = None) -> tuple[float, float]:
        """The smallest and the largest budget run, of one resolution or of all."""
        runs = self.numbers["runs"]
        budgets = [one["budget"] for one in runs if resolution is None or one["resolution"] == resolution]
        return min(budgets), max(budgets)


def open_fit(fit: str | Path, method: str) -> Opened:
    """Raises UsageError for an unknown method, PixseqError where `fit` holds no scaling fit or none of that method."""
    if method not in METHODS:
        raise UsageError(f"--method is {method!r}", f"one of: {', '.join(METHODS)}")
    record, numbers = read_metrics(fit)
    if not numbers.keys() >= {"fits", "runs", "bootstrap"} or not numbers["runs"]:
        raise PixseqError(
            f"{fit} holds the numbers of {record['stage']}, not of a scaling fit",
            "make one with: pixseq scaling fit PLAN-or-CSV -o fit.json",
        )
    fits = [one for one in numbers["fits"] if one["method"] == method]
    if not fits:
        found = ", ".join(dict.fromkeys(one["method"] for one in numbers["fits"])) or "none"
        raise PixseqError(f"{fit} holds no fits by {method}", f"it has: {found}")
    return Opened(Path(fit), numbers, fits, manifest.reference(fit, record))


def place(metric: str, resolution: int | None) -> str:
    """What people call a fit."""
    return metric if resolution is None else f"{metric} at {resolution}x{resolution}"


def role(metric: str) -> str | None:
    """Which of the paper's three measures a metric is, by its name."""
    words = re.sub(r"[^a-z0-9]+", " ", metric.lower())
    return next((name for name, pattern in ROLES.items() if re.search(pattern, words)), None)


def finite(value: float | None) -> float | None:
    """For JSON, which knows no infinity."""
    return float(value) if value is not None and math.isfinite(value) else None


def paired(fits: Sequence[Fit], key: str) -> np.ndarray:
    """Draws of several fits side by side, [fits, S]: a resample is of the same runs for all metrics of a resolution.

    Where resamples failed for one fit, or resolutions differ, draws pair by chance, as of separate runs.
    """
    draws = [one["draws"].get(key, []) for one in fits]
    fewest = min(len(each) for each in draws)
    return np.array([each[:fewest] for each in draws])


def paired_draws(fits: Sequence[Fit]) -> list[Fit]:
    """The draws of several fits, cut to as many as the fewest; empty where one has none."""
    fewest = min(len(one["draws"].get("tokens_exponent", [])) for one in fits)
    names = ("tokens_exponent", "tokens_coefficient", "params_exponent", "params_coefficient")
    return [{name: one["draws"].get(name, [])[:fewest] for name in names} for one in fits]
