"""scaling compare: the statements of the next-pixel scaling paper (arXiv 2511.08704) beside the same numbers of a fit.

Of the paper only its abstracts and the caption of its Fig. 1 are used, and for tokens per parameter later sources,
which are marked as secondary. Its exponents, budgets and way of counting are not known here, so none is shown.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pixseq.artifacts import atomic, manifest
from pixseq.artifacts.metrics import read_metrics, write_metrics
from pixseq.errors import PixseqError, UsageError
from pixseq.numerics import forecast as arithmetic

METHODS = ("isoflop", "direct", "varpro")
# In the words of a metric's name. Generation first: a name may speak of both ("frechet_loss").
ROLES = {
    "generation": r"frechet|\b(fid|fd|kid)",
    "classification": r"accuracy|\b(acc|top) ?\d*\b",
    "loss": r"loss|nats|\bmse\b|bits",
}
BEYOND = 1.01  # budgets of a study agree to a percent: a run has whole steps

PAPER_EXPONENT = "a power law for each metric (secondary); its exponents are not known here"
PAPER_RATIO = "3-5 (abstract)"
PAPER_RATIO_ELSEWHERE = "3-5, stated at 32x32 only (abstract)"
PAPER_PER_PARAM = "10-20 times that of language (Fig. 1); about 200-400 (secondary)"
PAPER_PER_PARAM_GENERATION = PAPER_PER_PARAM + "; more data than accuracy or loss need (Fig. 1)"
PAPER_RESOLUTION = "as resolution rises, model size must grow much faster than data (abstract)"

Fit = dict[str, Any]
Row = dict[str, Any]


def run(
    fit: str | Path,
    budget: float | None = None,
    method: str = "varpro",
    out: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """The table as a mapping, written to `out` as metrics where given. `budget` in FLOPs; None: the largest studied.

    "rows" have "what", "metric", "resolution", "value", "ci", "paper". A value is None where its fit was refused or
    says nothing, and "remarks" say why. An end of an interval is None where it has no bound.
    """
    if budget is not None and not 0 < budget < math.inf:
        raise UsageError(f"--budget is {budget}", "it is a positive number of FLOPs, as 7e19")
    if out is not None:
        atomic.check_target(out, overwrite)
    opened = open_fit(fit, method)
    budget = opened.studied()[1] if budget is None else float(budget)
    remarks: list[str] = []
    rows: list[Row] = []
    for resolution in opened.resolutions:
        ours = [one for one in opened.fits if one["resolution"] == resolution]
        rows += [row for what in ("tokens", "params") for one in ours for row in _exponent(one, what)]
        rows += _ratios(ours, resolution, opened.level, remarks)
        rows += [_per_param(one, budget, opened.level) for one in ours]
    for metric in opened.metrics:
        rows += _by_resolution([one for one in opened.fits if one["metric"] == metric], opened.level)
    remarks = _remarks(opened, budget) + remarks
    numbers = {"method": method, "budget": budget, "rows": rows, "remarks": remarks}
    if out is not None:
        config = {"method": method, "budget": budget}
        write_metrics(out, "scaling compare", config, {"fit": opened.reference}, numbers, overwrite)
    return numbers


# ---- reading a fit


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


# ---- rows


def _row(what: str, metric: str, resolution: int | None, value: float | None, ci, paper: str) -> Row:
    return {
        "what": what,
        "metric": metric,
        "resolution": resolution,
        "value": finite(value),
        "ci": ci and [finite(end) for end in ci],
        "paper": paper,
    }


def finite(value: float | None) -> float | None:
    """For JSON, which knows no infinity."""
    return float(value) if value is not None and math.isfinite(value) else None


def _exponent(fit: Fit, what: str) -> list[Row]:
    value, ci = fit[f"{what}_exponent"], fit.get(f"{what}_exponent_ci")
    return [_row(f"{what} exponent", fit["metric"], fit["resolution"], value, ci, PAPER_EXPONENT)]


def _per_param(fit: Fit, budget: float, level: float) -> Row:
    """Tokens for each parameter of the best model at `budget` FLOPs."""
    paper = PAPER_PER_PARAM_GENERATION if role(fit["metric"]) == "generation" else PAPER_PER_PARAM
    what = f"tokens per parameter at {budget:.3g} FLOPs"
    if fit["refused"]:
        return _row(what, fit["metric"], fit["resolution"], None, None, paper)

    def at(numbers: Fit) -> np.ndarray:
        size, data = (
            np.log(numbers[f"{name}_coefficient"]) + np.multiply(numbers[f"{name}_exponent"], math.log(budget))
            for name in ("params", "tokens")
        )
        return np.exp(data - size)

    ci = arithmetic.interval(at(fit["draws"]), level) if fit["draws"] else None
    return _row(what, fit["metric"], fit["resolution"], at(fit), ci, paper)


def _ratios(fits: Sequence[Fit], resolution: int | None, level: float, remarks: list[str]) -> list[Row]:
    """How much faster the data grow that generation needs than the data that classification needs."""
    by_role = {name: [one for one in fits if role(one["metric"]) == name] for name in ("generation", "classification")}
    paper = PAPER_RATIO if resolution == 32 else PAPER_RATIO_ELSEWHERE
    rows = []
    for over, under in itertools.product(by_role["generation"], by_role["classification"]):
        name = f"{over['metric']} / {under['metric']}"
        value, ci = None, None
        if over["refused"] or under["refused"]:
            remarks.append(f"{place(name, resolution)}: no ratio of data exponents, since one of them has no fit")
        else:
            value, ci = _ratio(over, under, level, place(name, resolution), remarks)
        rows.append(_row("ratio of data exponents", name, resolution, value, ci, paper))
    return rows


def _ratio(over: Fit, under: Fit, level: float, name: str, remarks: list[str]) -> tuple[float | None, Any]:
    if under["tokens_exponent"] <= 0:
        remarks.append(f"{name}: {under['metric']} wants no more data as compute grows, so there is no ratio")
        return None, None
    upper, lower = _paired([over, under], "tokens_exponent")
    if len(over["draws"].get("tokens_exponent", [])) != len(under["draws"].get("tokens_exponent", [])):
        remarks.append(f"{name}: some resamples failed, so the interval takes the two fits as of separate runs")
    with np.errstate(divide="ignore"):
        draws = np.where(lower > 0, upper / np.where(lower > 0, lower, 1), np.inf)
    ci = arithmetic.interval(draws, level)
    if ci is not None and not math.isfinite(ci[1]):
        remarks.append(f"{name}: the data exponent of {under['metric']} may be 0, so the ratio has no upper bound")
    return over["tokens_exponent"] / under["tokens_exponent"], ci


def _paired(fits: Sequence[Fit], key: str) -> np.ndarray:
    """Draws of several fits side by side, [fits, S]: a resample is of the same runs for all metrics of a resolution.

    Where resamples failed for one fit, or resolutions differ, draws pair by chance, as of separate runs.
    """
    draws = [one["draws"].get(key, []) for one in fits]
    fewest = min(len(each) for each in draws)
    return np.array([each[:fewest] for each in draws])


def _by_resolution(fits: Sequence[Fit], level: float) -> list[Row]:
    """How a metric's exponents move as resolution doubles; only of fits that know their resolution."""
    fits = [one for one in fits if one["resolution"] is not None and not one["refused"]]
    if len(fits) < 2:
        return []
    doublings = np.log2([one["resolution"] for one in fits])
    rows = []
    for what in ("params", "tokens"):
        draws = _paired(fits, f"{what}_exponent")
        slopes = [
            arithmetic.through(doublings, values, doublings.mean() + 1) - values.mean(axis=-1)
            for values in (np.array([one[f"{what}_exponent"] for one in fits]), draws.T)
        ]
        ci = arithmetic.interval(slopes[1], level)
        name = f"{what} exponent, change per doubling of resolution"
        rows.append(_row(name, fits[0]["metric"], None, slopes[0], ci, PAPER_RESOLUTION))
    return rows


# ---- remarks


def _remarks(opened: Opened, budget: float) -> list[str]:
    numbers = opened.numbers
    remarks = [
        f"FLOPs are counted as {numbers['counting'] or 'the runs state them'}, params as "
        f"{numbers['params_counted'] or 'the runs state them'}; how the paper counts is not known here"
    ]
    for one in opened.fits:
        name = place(one["metric"], one["resolution"])
        if one["refused"]:
            remarks.append(f"{name}: no fit: {one['refused']}")
        remarks += [f"{name}: {flag}" for flag in one["flags"]]
        if role(one["metric"]) is None:
            remarks.append(f"{name}: neither loss, classification nor generation by its name, so in no ratio")
    for resolution in opened.resolutions:
        low, high = opened.studied(resolution)
        where = "" if resolution is None else f" at {resolution}x{resolution}"
        if not low / BEYOND <= budget <= high * BEYOND:
            remarks.append(
                f"tokens per parameter{where} are extrapolated to {budget:.3g} FLOPs: budgets from {low:.3g} to "
                f"{high:.3g} were studied"
            )
    roles = {role(metric) for metric in opened.metrics}
    missing = [name for name in ("generation", "classification") if name not in roles]
    if missing:
        remarks.append(f"no metric of {' or '.join(missing)}: the ratio of data exponents needs one of each")
    if not opened.resampled:
        remarks.append("the fit holds no resamples, so there are no intervals")
    return list(dict.fromkeys(remarks + [one["text"] for one in numbers["disagreements"]]))
