"""scaling forecast: the compute that a target needs, and the years until growing compute pays for it.

Every number rests on a law carried beyond the runs that made it, so the assumptions are part of the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pixseq.artifacts.fit import Fit
from pixseq.artifacts.forecast import Forecast, Other, StudyForecast
from pixseq.artifacts.metrics import write_metrics
from pixseq.artifacts.owning import owns
from pixseq.artifacts.picture import check_png
from pixseq.choices import FitMethod
from pixseq.drawing.forecast import save_forecast
from pixseq.errors import PixseqError, UsageError
from pixseq.numerics import forecast as arithmetic
from pixseq.studies.fits import BEYOND, OpenFit, finite, open_fit, place
from pixseq.studies.image_tokens import ImageTokens
from pixseq.studies.needs import SHARE_OF_E, Disputes, Needed, found_at, needed

FARTHEST = math.log(1e100)  # FLOPs; what needs more is out of reach for good


@owns("scaling forecast", "out", "plot")
def run(
    fit: str | Path,
    growth: float,
    start_flops: float,
    resolutions: str | Sequence[int],
    targets: Mapping[str, float] | None = None,
    metrics: Sequence[str] | None = None,
    method: FitMethod = "varpro",
    out: str | Path | None = None,
    plot: str | Path | None = None,
    overwrite: bool = False,
    tokens_per_pixel: float | None = None,
) -> dict[str, Any]:
    """The forecast as a mapping, written to `out` as metrics and drawn in `plot` where these are given.

    `growth` is how many times compute grows in a year, `start_flops` what one training run may cost today. `targets`
    are in a metric's own units. `metrics` None: those with a target, or all where no target is given; a metric without
    a target takes the value at which its law has E (1 + SHARE_OF_E) left. `tokens_per_pixel` None: as the study's
    pictures have, or 1 where the fit does not know.

    "rows" have "metric", "resolution", "target", "flops", "flops_ci", "params", "tokens", "images", "years",
    "years_ci", "beyond" (flops over the largest budget studied), "other" (what the other law says: "method", "flops",
    None: unreachable) and "status": "ok", "now" (start_flops suffice), "extrapolated" (no runs at that resolution),
    "disputed" (the methods of the fit disagree), "unreachable: why" or "none: why". An upper end of an interval is None
    where the target is out of reach in too many resamples. Raises PixseqError where no row has a forecast to give.
    """
    sides = _checked(growth, start_flops, resolutions, tokens_per_pixel)
    if method == "isoflop":
        raise UsageError(
            "--method isoflop cannot forecast: parabolas do not tell what remains at infinite compute (E), and a bare "
            "power law promises that any target is reached",
            "use --method varpro or direct",
        )
    check_png(plot)
    opened = open_fit(fit, method)
    named = _targets(opened, targets or {}, metrics)
    found = _forecast(
        opened, named, sides, ComputeGrowth(growth, start_flops, opened.level, opened.studied()[1]), tokens_per_pixel
    )
    numbers = found.to_json()
    config: dict[str, Any] = {
        "method": method,
        "growth": growth,
        "start_flops": start_flops,
        "resolutions": sides,
        "targets": named,
    }
    if tokens_per_pixel is not None:
        config["tokens_per_pixel"] = tokens_per_pixel
    inputs = {"fit": opened.reference}
    if out is not None:
        write_metrics(out, "scaling forecast", config, inputs, numbers, overwrite)
    if plot is not None:
        save_forecast(plot, found, config, inputs, overwrite)
    return numbers


def _forecast(
    opened: OpenFit,
    named: Mapping[str, float | None],
    sides: Sequence[int],
    pace: ComputeGrowth,
    tokens_per_pixel: float | None,
) -> StudyForecast:
    """Every metric's forecasts. Raises PixseqError where there is none to give."""
    image_tokens = ImageTokens.of(opened, tokens_per_pixel)
    rows: list[Forecast] = []
    for metric, target in named.items():
        ours = [one for one in opened.fits if one.metric == metric]
        rows += _metric_rows(ours, target, sides, pace, image_tokens, Disputes.of(opened, metric))
    if all(row.status.startswith("none: ") for row in rows):
        first = rows[0]
        why = first.status.removeprefix("none: ")
        raise PixseqError(
            f"{opened.path}: {place(first.metric, first.resolution)}: no forecast: {why}",
            "name a target, as --target loss=2.1, or study more budgets or resolutions",
        )
    return StudyForecast(
        method=opened.method,
        growth_per_year=pace.growth,
        start_flops=pace.start_flops,
        studied_flops=list(opened.studied()),
        counting=opened.whole.counting,
        level=opened.level,
        rows=rows,
        assumptions=_assumptions(opened, rows, named, pace, image_tokens),
    )


# ---- checks before any work


def _checked(
    growth: float, start_flops: float, resolutions: str | Sequence[int], tokens_per_pixel: float | None
) -> list[int]:
    """The resolutions, each once. Raises UsageError where a number cannot be used."""
    if not 1 < growth < math.inf:
        raise UsageError(f"--growth is {growth}", "how many times compute grows in a year: more than 1, as 4.5")
    if not 0 < start_flops < math.inf:
        raise UsageError(f"--start-flops is {start_flops}", "what one training run may cost today, as 1e21")
    if tokens_per_pixel is not None and not 0 < tokens_per_pixel < math.inf:
        raise UsageError(f"--tokens-per-pixel is {tokens_per_pixel}", "a positive number: 3 for rgb, 1/256 for patches")
    try:
        parts = resolutions.split(",") if isinstance(resolutions, str) else resolutions
        sides = list(dict.fromkeys(int(part) for part in parts))
    except ValueError:
        sides = []
    if not sides or min(sides) < 1:
        raise UsageError(f"--resolution {resolutions!r} is no list of sizes in pixels", "for example 32,64,128")
    return sides


def _targets(opened: OpenFit, targets: Mapping[str, float], metrics: Sequence[str] | None) -> dict[str, float | None]:
    """The metrics to forecast, each with its target or None for the default."""
    known = opened.metrics
    for metric in [*targets, *(metrics or ())]:
        if metric not in known:
            raise UsageError(f"{opened.path} has no fit of {metric!r}", f"it has: {', '.join(known)}")
    for metric, target in targets.items():
        top = next(one for one in opened.fits if one.metric == metric).ceiling
        if not math.isfinite(target) or (top is not None and not 0 <= target <= top):
            limits = "a number" if top is None else f"between 0 and {top:g}, as its runs are"
            raise UsageError(f"--target {metric}={target}", f"it must be {limits}")
    for metric in targets:
        if metrics and metric not in metrics:
            raise UsageError(f"--target names {metric}, --metric does not", "name the metric in both")
    return {metric: targets.get(metric) for metric in (metrics or targets or known)}


# ---- rows


@dataclass(frozen=True)
class ComputeGrowth:
    """How compute grows, and how far the study went."""

    growth: float
    start_flops: float
    level: float
    largest: float


def _metric_rows(
    fits: Sequence[Fit],
    target: float | None,
    sides: Sequence[int],
    pace: ComputeGrowth,
    image_tokens: ImageTokens,
    disputes: Disputes,
) -> list[Forecast]:
    found = {one.resolution: needed(one, target) for one in fits}
    rows = []
    for side in sides:
        one = found_at(found, side, target)
        others = {each.resolution: needed(each, one.target) for each in disputes.fits} if one.target is not None else {}
        other = found_at(others, side, one.target) if others else None
        row = _row(fits[0].metric, side, one, None in found or side in found, pace, image_tokens)
        row = replace(row, other=None if other is None else Other(disputes.method, _exp(other.log_c)))
        rested_on = {None} if None in found else {side} if side in found else set(found)
        disputed = bool(rested_on & disputes.sides) or (other is not None and disputes.at_odds(one, other, pace.level))
        rows.append(_marked(row) if disputed else row)
    return rows


def _marked(row: Forecast) -> Forecast:
    """With a status that says that the methods disagree."""
    if row.status.startswith("none"):
        return row
    if row.status.startswith("unreachable"):
        other = row.other
        says = f"by {other.method} it takes {other.flops:.3g} FLOPs" if other and other.flops else "see below"
        return replace(row, status=f"{row.status} (disputed: {says})")
    return replace(row, status="disputed" if row.status == "ok" else f"{row.status}, disputed")


def _row(
    metric: str, resolution: int, one: Needed, studied: bool, pace: ComputeGrowth, image_tokens: ImageTokens
) -> Forecast:
    why = one.why
    if why is None and one.log_c > FARTHEST:
        why = "unreachable: it takes more than 1e100 FLOPs"
    if why is not None:
        return Forecast(metric, resolution, one.target, status=why)
    log_start = math.log(pace.start_flops)
    between = arithmetic.interval(one.draws, pace.level)
    ends = None if between is None else [end if end <= FARTHEST else math.inf for end in between]
    years = float(arithmetic.years(np.array(one.log_c), log_start, pace.growth))
    tokens = _exp(one.log_d)
    status = ["now"] if years == 0 else []
    status += [] if studied else ["extrapolated"]
    return Forecast(
        metric,
        resolution,
        one.target,
        flops=_exp(one.log_c),
        flops_ci=ends and [_exp(end) for end in ends],
        params=_exp(one.log_n),
        tokens=tokens,
        images=tokens and tokens / image_tokens.tokens(resolution),
        years=years,
        years_ci=ends and [finite(float(arithmetic.years(np.array(end), log_start, pace.growth))) for end in ends],
        beyond=_exp(one.log_c - math.log(pace.largest)),
        status=", ".join(status) or "ok",
    )


def _exp(log_value: float) -> float | None:
    """None for what is out of reach."""
    return math.exp(log_value) if abs(log_value) < 700 else None


# ---- assumptions


def _assumptions(
    opened: OpenFit,
    rows: Sequence[Forecast],
    named: Mapping[str, float | None],
    pace: ComputeGrowth,
    image_tokens: ImageTokens,
) -> list[str]:
    low, high = opened.studied()
    lines = [
        f"compute for one training run is {pace.start_flops:.3g} FLOPs today and grows {pace.growth:g} times a year: "
        "both are given, not measured",
        f"the {opened.method} law E + A N^-alpha + B D^-beta of runs at {low:.3g} to {high:.3g} FLOPs holds "
        "as far as it is followed",
        "a run is compute-optimal: params and tokens follow the fit's power laws of compute "
        f"(FLOPs as {opened.whole.counting or 'the runs count them'})",
    ]
    farthest = max((row.beyond for row in rows if row.beyond), default=0)
    if farthest > BEYOND:
        lines.append(f"the farthest forecast lies {farthest:.3g} times beyond the largest budget studied")
    if None in named.values():
        share = f"{SHARE_OF_E:.0%}"
        lines.append(f"without a named target, it is where the reducible part of a metric has fallen to {share} of E")
    lines += _about_resolutions(opened, rows)
    lines.append(
        f"there is enough data: {image_tokens.text([row.resolution for row in rows])}, and every image is new "
        "(repeated ones are worth less)"
    )
    lines += _about_disputes(opened, rows)
    lines += _about_floors(opened, rows)
    if opened.resampled:
        lines.append(
            f"intervals ({pace.level:.0%}) are of resampled runs: they hold the noise of the fit, not a wrong form of "
            "the law, nor another growth of compute"
        )
    else:
        lines.append("the fit holds no resamples, so there are no intervals")
    for one in opened.fits:
        if one.metric in named:
            name = place(one.metric, one.resolution)
            lines += [f"{name}: no fit: {one.refused}"] if one.refused else []
            lines += [f"{name}: {flag}" for flag in one.flags]
    return list(dict.fromkeys(lines))


def _about_disputes(opened: OpenFit, rows: Sequence[Forecast]) -> list[str]:
    """What the methods disagree on, and what the other law says of each disputed forecast."""
    disputed = [row for row in rows if "disputed" in row.status]
    metrics = {row.metric for row in disputed}
    lines = [f"disputed: {each.text}" for each in opened.whole.disagreements if each.metric in metrics]
    for row in disputed:
        other = row.other
        if other:
            says = f"{other.flops:.3g} FLOPs" if other.flops else "out of reach"
            ours = f"{row.flops:.3g} FLOPs" if row.flops else "out of reach"
            name = place(row.metric, row.resolution)
            lines.append(f"disputed: {name} is {ours} by {opened.method}, {says} by {other.method}")
    return lines


def _about_floors(opened: OpenFit, rows: Sequence[Forecast]) -> list[str]:
    """Targets that real pictures against real ones do not reach."""
    lines = []
    for fit in opened.fits:
        floor = fit.floor and fit.floor.floor
        targets = [row.target for row in rows if row.metric == fit.metric and row.target is not None]
        if floor and targets and min(targets) < floor:
            name = place(fit.metric, fit.resolution)
            lines.append(f"{name}: a target of {min(targets):.3g} lies below what real pictures score, {floor:.3g}")
    return lines


def _about_resolutions(opened: OpenFit, rows: Sequence[Forecast]) -> list[str]:
    if opened.resolutions == [None]:
        return [
            "the fit names no resolution: the same law, and so the same compute, is taken at each; only the images "
            "that its tokens make differ"
        ]
    guessed = [row for row in rows if "extrapolated" in row.status]
    if not guessed:
        return []
    sides = ", ".join(str(side) for side in dict.fromkeys(row.resolution for row in guessed))
    studied = ", ".join(str(side) for side in opened.resolutions)
    return [
        f"at resolution {sides} nothing was run: log FLOPs, params and tokens go on in a straight line over log "
        f"resolution from {studied}, and a target given once means the same at each"
    ]
