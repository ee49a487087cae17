"""A fit.json that is open: its fits by one method, what its metrics are called and measure."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pixseq.artifacts.fit import Fit, StudyFit, metrics_of, read_fit, resolutions_of
from pixseq.errors import PixseqError, UsageError
from pixseq.numerics.forecast import Frontier

METHODS = ("isoflop", "direct", "varpro")
# In the words of a metric's name. Generation first: a name may speak of both ("frechet_loss").
MEASURES = {
    "generation": r"frechet|\b(fid|fd|kid)",
    "classification": r"accuracy|\b(acc|top) ?\d*\b",
    "loss": r"loss|nats|\bmse\b|bits",
}
BEYOND = 1.01  # budgets of a study agree to a percent: a run has whole steps


@dataclass(frozen=True)
class OpenFit:
    """A fit.json: all it says, and of its fits those of one method."""

    path: Path
    whole: StudyFit
    method: str
    fits: list[Fit]
    reference: dict[str, str]

    @property
    def level(self) -> float:
        return self.whole.bootstrap.level

    @property
    def resampled(self) -> bool:
        return any(one.draws is not None and len(one.draws) for one in self.fits)

    @property
    def metrics(self) -> list[str]:
        return metrics_of(self.fits)

    @property
    def resolutions(self) -> list[int | None]:
        return resolutions_of(self.fits)

    def flops(self, value: float) -> str:
        """So many, with the name of their counting where it is known."""
        counting = self.whole.counting
        return f"{value:.3g} FLOPs ({counting})" if counting else f"{value:.3g} FLOPs"

    def studied(self, resolution: int | None = None) -> tuple[float, float]:
        """The smallest and the largest budget run, of one resolution or of all."""
        runs = self.whole.runs
        budgets = [one.budget for one in runs if resolution is None or one.resolution == resolution]
        return min(budgets), max(budgets)


def open_fit(fit: str | Path, method: str) -> OpenFit:
    """Raises UsageError for an unknown method, PixseqError where `fit` holds no scaling fit or none of that method."""
    if method not in METHODS:
        raise UsageError(f"--method is {method!r}", f"one of: {', '.join(METHODS)}")
    found, reference = read_fit(fit)
    fits = [one for one in found.fits if one.method == method]
    if not fits:
        others = ", ".join(dict.fromkeys(one.method for one in found.fits)) or "none"
        raise PixseqError(f"{fit} holds no fits by {method}", f"it has: {others}")
    return OpenFit(Path(fit), found, method, fits, reference)


def place(metric: str, resolution: int | None) -> str:
    """What people call a fit."""
    return metric if resolution is None else f"{metric} at {resolution}x{resolution}"


def measure(metric: str) -> str | None:
    """Which of the paper's three measures a metric is, by its name."""
    words = re.sub(r"[^a-z0-9]+", " ", metric.lower())
    return next((name for name, pattern in MEASURES.items() if re.search(pattern, words)), None)


def finite(value: float | None) -> float | None:
    """For JSON, which knows no infinity."""
    return float(value) if value is not None and math.isfinite(value) else None


def paired(fits: Sequence[Fit]) -> list[Frontier]:
    """Draws of several fits, as many as the fewest have: a resample is of the same runs for all metrics.

    Where resamples failed for one fit, or between resolutions, draws pair by chance, as of separate runs. Without draws
    of one fit there are none.
    """
    draws = [one.draws for one in fits if one.draws is not None]
    if len(draws) < len(fits):
        return []
    fewest = min(map(len, draws))
    return [one.each(lambda values: values[:fewest]) for one in draws]
