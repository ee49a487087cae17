"""scaling compare: the statements of the next-pixel scaling paper (arXiv 2511.08704) beside the same numbers of a fit.

Of the paper only its abstracts and the caption of its Fig. 1 are used, and for tokens per parameter later sources,
which are marked as secondary. Its exponents, budgets and way of counting are not known here, so none is shown.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixseq.artifacts.fit import Fit, Floor, Growth, Interval
from pixseq.artifacts.metrics import write_metrics
from pixseq.artifacts.owning import owns
from pixseq.choices import FitMethod
from pixseq.errors import UsageError
from pixseq.numerics import forecast as arithmetic
from pixseq.numerics.forecast import Frontier
from pixseq.studies import statements
from pixseq.studies.fits import BEYOND, OpenFit, finite, measure, open_fit, paired, place
from pixseq.studies.statements import (
    DATA_EXPONENTS,
    OPTIMAL_TOKENS,
    PAPER_EXPONENT,
    PAPER_MORE,
    PAPER_PER_PARAM,
    PAPER_PER_PARAM_GENERATION,
    PAPER_RATIO,
    PAPER_RATIO_ELSEWHERE,
    TOKENS_PER_PARAM,
    Row,
)


@owns("scaling compare", "out")
def run(
    fit: str | Path,
    budget: float | None = None,
    method: FitMethod = "varpro",
    out: str | Path | None = None,
    overwrite: bool = False,
    images: float | None = None,
    start_flops: float | None = None,
) -> dict[str, Any]:
    """The table as a mapping, written to `out` as metrics where given. `budget` in FLOPs; None: the largest studied.

    "rows" have "what", "metric", "resolution", "value", "ci", "paper". A value is None where its fit was refused or
    says nothing, and "remarks" say why. An end of an interval is None where it has no bound. "statements" are the
    paper's, each with what is found here, "verdict" ("agrees", "disagrees" or "cannot tell") and "why". `images` are
    those that there are to train on, `start_flops` what one run may cost today; None: the paper's largest budget.
    """
    for name, value in (("images", images), ("start-flops", start_flops)):
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name} is {value}", "a positive number, as 1.3e6")
    if budget is not None and not 0 < budget < math.inf:
        raise UsageError(f"--budget is {budget}", "it is a positive number of FLOPs, as 7e19")
    opened = open_fit(fit, method)
    budget = opened.studied()[1] if budget is None else float(budget)
    remarks: list[str] = []
    rows: list[Row] = []
    for resolution in opened.resolutions:
        ours = [one for one in opened.fits if one.resolution == resolution]
        rows += [row for what in ("tokens", "params") for one in ours for row in _exponent(one, what)]
        rows += _ratios(ours, resolution, opened.level, remarks)
        rows += [_per_param(one, budget, opened) for one in ours]
        rows += _more(ours, budget, opened)
    for metric in opened.metrics:
        rows += _by_resolution([one for one in opened.fits if one.metric == metric], opened.level)
    remarks = _remarks(opened, budget) + remarks
    supply = statements.Supply(images, start_flops or statements.LARGEST, start_flops is not None)
    numbers = {
        "method": method,
        "budget": budget,
        "counting": opened.whole.counting,
        "rows": [vars(row) for row in rows],
        "statements": [vars(each) for each in statements.judged(opened, rows, supply)],
        "remarks": remarks,
    }
    if out is not None:
        config = {"method": method, "budget": budget, "images": images, "start_flops": start_flops}
        write_metrics(out, "scaling compare", config, {"fit": opened.reference}, numbers, overwrite)
    return numbers


# ---- rows


def _row(what: str, metric: str, resolution: int | None, value: float | None, ci: Interval | None, paper: str) -> Row:
    return Row(what, metric, resolution, finite(value), ci and [finite(end) for end in ci], paper)


def _exponent(fit: Fit, what: str) -> list[Row]:
    growth: Growth = getattr(fit, what)
    name = f"{what} exponent"
    return [_row(name, fit.metric, fit.resolution, growth.exponent, growth.exponent_ci, PAPER_EXPONENT)]


def _per_param(fit: Fit, budget: float, opened: OpenFit) -> Row:
    """Tokens for each parameter of the best model at `budget` FLOPs."""
    paper = PAPER_PER_PARAM_GENERATION if measure(fit.metric) == "generation" else PAPER_PER_PARAM
    what = f"{TOKENS_PER_PARAM} at {opened.flops(budget)}"
    if fit.refused:
        return _row(what, fit.metric, fit.resolution, None, None, paper)
    log_c = np.array(math.log(budget))

    def at(frontier: Frontier) -> np.ndarray:
        return arithmetic.exp(frontier.tokens.log(log_c) - frontier.params.log(log_c))

    ci = None if fit.draws is None else arithmetic.interval(at(fit.draws), opened.level)
    return _row(what, fit.metric, fit.resolution, at(fit.frontier)[0], ci, paper)


def _more(fits: Sequence[Fit], budget: float, opened: OpenFit) -> list[Row]:
    """How many times the data of loss and of classification generation wants at `budget` FLOPs."""
    rows = []
    overs = [one for one in fits if measure(one.metric) == "generation"]
    unders = [one for one in fits if measure(one.metric) in ("loss", "classification")]
    for over, under in itertools.product(overs, unders):
        value, ci = None, None
        if not (over.refused or under.refused):
            log_c = math.log(budget)
            value = float(arithmetic.exp(over.tokens.log(log_c) - under.tokens.log(log_c)))
            draws = [one.tokens.log(np.array(log_c)) for one in paired([over, under])]
            ci = arithmetic.interval(arithmetic.exp(draws[0] - draws[1]), opened.level) if draws else None
        name = f"{over.metric} / {under.metric}"
        what = f"{OPTIMAL_TOKENS} at {opened.flops(budget)}"
        rows.append(_row(what, name, over.resolution, value, ci, PAPER_MORE))
    return rows


def _ratios(fits: Sequence[Fit], resolution: int | None, level: float, remarks: list[str]) -> list[Row]:
    """How much faster the data grow that generation needs than the data that classification needs."""
    by_measure = {
        name: [one for one in fits if measure(one.metric) == name] for name in ("generation", "classification", "loss")
    }
    rows = []
    for over, under in itertools.product(by_measure["generation"], by_measure["classification"] + by_measure["loss"]):
        paper = PAPER_RATIO if resolution == 32 else PAPER_RATIO_ELSEWHERE
        if measure(under.metric) == "loss":
            paper = PAPER_MORE
        name = f"{over.metric} / {under.metric}"
        value, ci = None, None
        if over.refused or under.refused:
            remarks.append(f"{place(name, resolution)}: no ratio of data exponents, since one of them has no fit")
        else:
            value, ci = _ratio(over, under, level, place(name, resolution), remarks)
        rows.append(_row(DATA_EXPONENTS, name, resolution, value, ci, paper))
    return rows


def _ratio(over: Fit, under: Fit, level: float, name: str, remarks: list[str]) -> tuple[float | None, Interval | None]:
    slow, fast = under.tokens.exponent, over.tokens.exponent
    assert slow is not None and fast is not None  # of fits that stand
    if slow <= 0:
        remarks.append(f"{name}: {under.metric} wants no more data as compute grows, so there is no ratio")
        return None, None
    value, draws = fast / slow, paired([over, under])
    if not draws or over.draws is None or under.draws is None:
        return value, None
    if len(over.draws) != len(under.draws):
        remarks.append(f"{name}: some resamples failed, so the interval takes the two fits as of separate runs")
    upper, lower = (one.tokens.exponent for one in draws)
    with np.errstate(divide="ignore"):
        ratios = np.where(lower > 0, upper / np.where(lower > 0, lower, 1), np.inf)
    ci = arithmetic.interval(ratios, level)
    if ci is not None and not math.isfinite(ci[1]):
        remarks.append(f"{name}: the data exponent of {under.metric} may be 0, so the ratio has no upper bound")
    return value, ci


def _by_resolution(fits: Sequence[Fit], level: float) -> list[Row]:
    """How a metric's exponents move as resolution doubles; only of fits that know their resolution."""
    fits = [one for one in fits if one.resolution is not None and not one.refused]
    if len(fits) < 2:
        return []
    doublings = np.log2(np.array([one.resolution for one in fits], float))
    rows = []
    for what in ("params", "tokens"):
        slope = _slope(doublings, np.array([getattr(one, what).exponent for one in fits]))
        draws = paired(fits)
        lots = np.array([getattr(one, what).exponent for one in draws]).T
        ci = arithmetic.interval(_slope(doublings, lots), level) if draws else None
        name = f"{what} exponent, change per doubling of resolution"
        rows.append(_row(name, fits[0].metric, None, float(slope), ci, statements.RESOLUTION))
    return rows


def _slope(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """By how much values [.., R] rise as x [R] does by 1."""
    return arithmetic.through(x, values, x.mean() + 1) - values.mean(axis=-1)


# ---- remarks


def _remarks(opened: OpenFit, budget: float) -> list[str]:
    whole = opened.whole
    remarks = [
        f"FLOPs are counted as {whole.counting or 'the runs state them'}, params as "
        f"{whole.params_counted or 'the runs state them'}; how the paper counts is not known here"
    ]
    for one in opened.fits:
        name = place(one.metric, one.resolution)
        if one.refused:
            remarks.append(f"{name}: no fit: {one.refused}")
        remarks += [f"{name}: {flag}" for flag in one.flags]
        remarks += _measured_with(name, one.floor)
        if measure(one.metric) is None:
            remarks.append(f"{name}: neither loss, classification nor generation by its name, so in no ratio")
    for resolution in opened.resolutions:
        low, high = opened.studied(resolution)
        at = "" if resolution is None else f" at {resolution}x{resolution}"
        if not low / BEYOND <= budget <= high * BEYOND:
            remarks.append(
                f"{TOKENS_PER_PARAM}{at} are extrapolated to {budget:.3g} FLOPs: budgets from {low:.3g} to "
                f"{high:.3g} were studied"
            )
    found = {measure(metric) for metric in opened.metrics}
    missing = [name for name in ("generation", "classification") if name not in found]
    if missing:
        remarks.append(f"no metric of {' or '.join(missing)}: the ratio of data exponents needs one of each")
    if not opened.resampled:
        remarks.append("the fit holds no resamples, so there are no intervals")
    return list(dict.fromkeys(remarks + [one.text for one in whole.disagreements]))


def _measured_with(name: str, floor: Floor | None) -> list[str]:
    """How a distance was measured, and what real pictures score by it."""
    if not floor:
        return []
    n = ", ".join(f"{count:g}" for count in floor.n) or "unknown"
    by = ", ".join(floor.extractors) or "an extractor that is not named"
    real = "not known" if floor.floor is None else f"{floor.floor:.3g}"
    return [f"{name}: measured by {by}, n {n}; real against real: {real}"]
