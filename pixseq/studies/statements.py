"""What the paper on next-pixel scaling (arXiv 2511.08704) states, each statement beside what a fit finds.

A statement is agreed with where the whole interval of the number lies where the statement has it, disagreed with where
none of it does; else, and where a number is missing, a fit cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pixseq.artifacts.fit import Fit
from pixseq.numerics import forecast as arithmetic
from pixseq.studies.fits import OpenFit, paired
from pixseq.studies.image_tokens import ImageTokens
from pixseq.studies.needs import SHARE_OF_E, Disputes, needed

LARGEST = 7e19  # FLOPs of the paper's largest runs
GROWTH, YEARS = (4.0, 5.0), 5.0  # of compute a year; the paper's horizon
EPOCHS = 4.0  # that repeated pictures are worth almost what new ones are
AGREES, DISAGREES, CANNOT_TELL = "agrees", "disagrees", "cannot tell"

FASTER = "data for generation grow 3-5 times faster than data for classification, at 32x32 (abstract)"
MORE = "generation needs more data than loss and accuracy (Fig. 1)"
PER_PARAM = "tokens per parameter are 10-20 times those of language, 200-400 (Fig. 1; the numbers secondary)"
RESOLUTION = "as resolution rises, model size must grow much faster than data (abstract)"
FIVE_YEARS = "pixel-by-pixel modelling is feasible within five years, at 4-5 times more compute a year (abstract)"
BOTTLENECK = "compute is the bottleneck, not data (abstract)"

# What it says of the single numbers of a comparison.
PAPER_EXPONENT = "a power law for each metric (secondary); its exponents are not known here"
READING = "as a ratio of exponents: an interpretation"
PAPER_RATIO = f"3-5 times faster (abstract); {READING}"
PAPER_RATIO_ELSEWHERE = f"3-5 times faster, stated at 32x32 only (abstract); {READING}"
PAPER_MORE = "generation needs more data than loss or accuracy (Fig. 1)"
PAPER_PER_PARAM = "10-20 times that of language (Fig. 1); about 200-400 (secondary)"
PAPER_PER_PARAM_GENERATION = PAPER_PER_PARAM + "; more data than accuracy or loss need (Fig. 1)"

# How the rows of a comparison that statements rest on are called.
DATA_EXPONENTS = "ratio of data exponents"  # of generation and classification; or, of what PAPER_MORE says, and loss
OPTIMAL_TOKENS = "ratio of optimal tokens"
TOKENS_PER_PARAM = "tokens per parameter"


@dataclass(frozen=True)
class Row:
    """One number of a comparison, and what the paper says; an end of `ci` is None where it has no bound."""

    what: str
    metric: str
    resolution: int | None
    value: float | None
    ci: Sequence[float | None] | None
    paper: str


@dataclass(frozen=True)
class Judged:
    """A statement of the paper beside what is found here."""

    statement: str
    metric: str | None
    resolution: int | None
    here: str
    verdict: str
    why: str


@dataclass(frozen=True)
class Supply:
    """What there is: images to train on (None: not given), FLOPs of one run today, and whether these were given."""

    images: float | None
    start_flops: float
    given: bool


def judged(opened: OpenFit, rows: Sequence[Row], supply: Supply) -> list[Judged]:
    """Every statement, for every metric and resolution that it speaks of; `rows` are those of the comparison."""
    found = [_faster(row) for row in rows if row.what == DATA_EXPONENTS and row.paper != PAPER_MORE]
    found = found or [_untold(FASTER, "no fits of both generation and classification")]
    more = [_more(row) for row in rows if row.what.startswith(OPTIMAL_TOKENS)]
    found += more or [_untold(MORE, "no fits of both generation and loss or classification")]
    found += [_per_param(row) for row in rows if row.what.startswith(TOKENS_PER_PARAM)]
    grown = [_resolution(opened, metric) for metric in opened.metrics if len(opened.resolutions) > 1]
    found += grown or [_untold(RESOLUTION, "the study has one resolution")]
    for one in opened.fits:
        found += [_five_years(opened, one, supply), _bottleneck(opened, one, supply)]
    return found


def _untold(paper: str, why: str, metric: str | None = None, resolution: int | None = None) -> Judged:
    return Judged(paper, metric, resolution, "-", CANNOT_TELL, why)


def _verdict(value: float | None, ci: Sequence[float | None] | None, low: float, high: float) -> tuple[str, str]:
    """Where a number and its interval lie against `low` to `high`, and why that says what it says."""
    span = f"{low:g} to {high:g}" if math.isfinite(high) else f"more than {low:g}"
    if value is None:
        return CANNOT_TELL, "there is no number"
    if ci is None:
        side = "in" if low <= value <= high else "off"
        return CANNOT_TELL, f"there is no interval; the number alone lies {side} {span}"
    bottom, top = (-math.inf if ci[0] is None else ci[0]), (math.inf if ci[1] is None else ci[1])
    if low <= bottom and top <= high:
        return AGREES, f"the whole interval lies in {span}"
    if top < low or bottom > high:
        return DISAGREES, f"the whole interval lies off {span}"
    return CANNOT_TELL, f"the interval lies partly in {span}"


def _spelt(value: float | None, ci: Sequence[float | None] | None) -> str:
    if value is None:
        return "-"
    ends = "" if ci is None else " ({} to {})".format(*("no bound" if end is None else f"{end:.3g}" for end in ci))
    return f"{value:.3g}{ends}"


def _faster(row: Row) -> Judged:
    verdict, why = _verdict(row.value, row.ci, 3, 5)
    if row.resolution != 32 and verdict != CANNOT_TELL:
        verdict, why = CANNOT_TELL, f"the paper speaks of 32x32 alone; here {why}"
    why += "; that a ratio of exponents is meant is an interpretation"
    here = f"{DATA_EXPONENTS} {_spelt(row.value, row.ci)}"
    return Judged(FASTER, row.metric, row.resolution, here, verdict, why)


def _more(row: Row) -> Judged:
    verdict, why = _verdict(row.value, row.ci, 1, math.inf)
    return Judged(MORE, row.metric, row.resolution, f"{_spelt(row.value, row.ci)} times", verdict, why)


def _per_param(row: Row) -> Judged:
    verdict, why = _verdict(row.value, row.ci, 200, 400)
    return Judged(PER_PARAM, row.metric, row.resolution, _spelt(row.value, row.ci), verdict, why)


def _resolution(opened: OpenFit, metric: str) -> Judged:
    """Whether the params exponent rises with resolution, and is beyond the tokens exponent at the highest."""
    fits = [one for one in opened.fits if one.metric == metric and not one.refused and one.resolution]
    if len(fits) < 2:
        return _untold(RESOLUTION, "fewer than two resolutions have a fit", metric)
    fits = sorted(fits, key=lambda one: one.resolution or 0)
    low, high = fits[0], fits[-1]
    first, last, data = low.params.exponent, high.params.exponent, high.tokens.exponent
    assert first is not None and last is not None and data is not None  # of fits that stand
    rise, lead = last - first, last - data
    ends = f"from {low.resolution} to {high.resolution}"
    here = f"params exponent {rise:+.3f} {ends}, there {lead:+.3f} beyond tokens'"
    rises = leads = None
    if low.draws is not None and high.draws is not None:
        ours = [one.params.exponent for one in paired([low, high])]
        rises = arithmetic.interval(ours[1] - ours[0], opened.level)
        leads = arithmetic.interval(high.draws.params.exponent - high.draws.tokens.exponent, opened.level)
    if rises is None or leads is None:
        return Judged(RESOLUTION, metric, None, here, CANNOT_TELL, "there is no interval")
    if rises[0] > 0 and leads[0] > 0:
        return Judged(RESOLUTION, metric, None, here, AGREES, "the exponent rises, and ends above that of tokens")
    if rises[1] < 0 or leads[1] < 0:
        why = "the exponent falls" if rises[1] < 0 else "data still grow faster than size at the highest resolution"
        return Judged(RESOLUTION, metric, None, here, DISAGREES, why)
    why = f"intervals hold 0: {rises[0]:+.3f} to {rises[1]:+.3f}, {leads[0]:+.3f} to {leads[1]:+.3f}"
    return Judged(RESOLUTION, metric, None, here, CANNOT_TELL, why)


def _five_years(opened: OpenFit, fit: Fit, supply: Supply) -> Judged:
    """Years until compute pays for the default target, at the paper's two paces."""
    subject = (fit.metric, fit.resolution)
    if fit.method == "isoflop":
        return _untold(FIVE_YEARS, "parabolas do not tell what remains at infinite compute", *subject)
    one = needed(fit, None)
    if one.why is not None:
        return _untold(FIVE_YEARS, one.why.removeprefix("none: "), *subject)
    log_start = math.log(supply.start_flops)
    slow, fast = (float(arithmetic.years(np.array(one.log_c), log_start, pace)) for pace in GROWTH)
    ends = arithmetic.interval(one.draws, opened.level)
    here = f"{fast:.1f} to {slow:.1f} years to {one.target:.4g}"
    base = "as given" if supply.given else "the paper's largest runs; its base year is not known"
    text = f"from {opened.flops(supply.start_flops)} ({base}), to E and {SHARE_OF_E:.0%} of it"
    disputes = Disputes.of(opened, subject[0])
    others = [needed(each, one.target) for each in disputes.fits if each.resolution == subject[1]]
    if subject[1] in disputes.sides or any(disputes.at_odds(one, other, opened.level) for other in others):
        return Judged(FIVE_YEARS, *subject, here, CANNOT_TELL, f"the methods of the fit disagree; {text}")
    if ends is None:
        return Judged(FIVE_YEARS, *subject, here, CANNOT_TELL, f"there is no interval; {text}")
    latest, soonest = (float(arithmetic.years(np.array(end), log_start, pace)) for end, pace in zip(ends[::-1], GROWTH))
    if latest <= YEARS:
        return Judged(FIVE_YEARS, *subject, here, AGREES, f"at most {latest:.1f} years; {text}")
    if soonest > YEARS:
        return Judged(FIVE_YEARS, *subject, here, DISAGREES, f"at least {soonest:.1f} years; {text}")
    reach = (
        f"{soonest:.1f} to {latest:.1f} years" if math.isfinite(latest) else f"{soonest:.1f} years or more, or never"
    )
    return Judged(FIVE_YEARS, *subject, here, CANNOT_TELL, f"{reach}; {text}")


def _bottleneck(opened: OpenFit, fit: Fit, supply: Supply) -> Judged:
    """Whether the images of the best run that compute pays for in five years are there."""
    subject = (fit.metric, fit.resolution)
    if supply.images is None:
        return _untold(BOTTLENECK, "how many images there are is not given: --images", *subject)
    if fit.refused:
        return _untold(BOTTLENECK, f"no fit: {fit.refused}", *subject)
    if subject[1] is None:
        return _untold(BOTTLENECK, "the fit names no resolution to count images at", *subject)
    image_tokens = ImageTokens.of(opened, None)
    per_image = image_tokens.tokens(subject[1])
    log_c = [math.log(supply.start_flops) + YEARS * math.log(pace) for pace in GROWTH]
    least, most = (float(arithmetic.exp(fit.tokens.log(c))) / per_image for c in log_c)
    have = supply.images * EPOCHS
    here = f"{least:.3g} to {most:.3g} images after {YEARS:.0f} years"
    ends = None
    if fit.draws is not None:
        low, high = (
            arithmetic.interval(arithmetic.exp(fit.draws.tokens.log(np.array(c))) / per_image, opened.level)
            for c in log_c
        )
        ends = low and high and (low[0], high[1])
    base = opened.flops(supply.start_flops)
    there = f"{supply.images:.3g} images are there, each seen up to {EPOCHS:.0f} times; from {base}"
    if not image_tokens.studied:
        there += "; an image is taken to have one token a pixel, since the fit does not say"
    if ends is None:
        return Judged(BOTTLENECK, *subject, here, CANNOT_TELL, f"there is no interval; {there}")
    if ends[1] <= have:
        return Judged(BOTTLENECK, *subject, here, AGREES, f"at most {ends[1]:.3g} are needed, {there}")
    if ends[0] > have:
        why = f"data run out first: at least {ends[0]:.3g} are needed, {there}"
        return Judged(BOTTLENECK, *subject, here, DISAGREES, why)
    return Judged(BOTTLENECK, *subject, here, CANNOT_TELL, f"{ends[0]:.3g} to {ends[1]:.3g} are needed, {there}")
