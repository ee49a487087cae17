"""scaling fit: how the best model size and data size grow with compute, for each metric and resolution, in three ways.

IsoFLOP parabolas, the direct fit of L(N, D) = E + A N^-alpha + B D^-beta, and the same law by variable projection
(numerics/isoflop.py, numerics/laws.py), each with bootstrap intervals. Where they disagree, the result says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pixseq import progress
from pixseq.artifacts.fit import (
    Bootstrap,
    Constants,
    Fit,
    Floor,
    Growth,
    Interval,
    Optimum,
    Outlier,
    Run,
    StudyFit,
)
from pixseq.artifacts.metrics import write_metrics
from pixseq.artifacts.owning import owns
from pixseq.artifacts.picture import check_png
from pixseq.drawing import scaling as figures
from pixseq.errors import PixseqError, UsageError
from pixseq.numerics import isoflop, laws
from pixseq.numerics.forecast import FEWEST_DRAWS, Frontier, PowerLaw
from pixseq.studies import run_table
from pixseq.studies.agreement import disagreements
from pixseq.studies.fits import METHODS, finite
from pixseq.studies.points import NEAR, Direction, Points, Resampled, exp, rms

LEVEL = 0.95
OUTLYING = 4.5  # scales of the noise off a law from which on a run is named
NAMED = 4  # runs that one remark names


@owns("scaling fit", "out", "plot")
def run(
    source: str | Path,
    out: str | Path | None = None,
    plot: str | Path | None = None,
    metrics: Sequence[str] | None = None,
    maximize: bool = False,
    resamples: int = 400,
    seed: int = 0,
    overwrite: bool = False,
    columns: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The fits as a mapping, written to `out` as metrics and drawn in `plot` where these are given.

    `source` is a plan folder or a CSV, of which `columns` may say what is what, as ROLE=COLUMN. `metrics` None: every
    measured column. A metric is to be small, unless its name speaks of accuracy, or `maximize` says so of all
    `metrics`; what is to be large is turned into 1 - it (shares) or 100 - it (percent). `resamples` 0 gives no
    intervals. A fit that cannot stand has its reason under "refused" and no numbers; the others do. Raises PixseqError
    where nothing can be fitted.
    """
    if maximize and not metrics:
        raise UsageError("--maximize says nothing without --metric", "name what is to be large, as --metric top5")
    if resamples < 0 or 0 < resamples < FEWEST_DRAWS:
        raise UsageError(f"--bootstrap is {resamples}", f"at least {FEWEST_DRAWS}, or 0 for no intervals")
    check_png(plot)
    if plot is not None:
        figures.check_fit(plot, overwrite)
    table = run_table.read(source, metrics, columns or ())
    directions = [Direction.of(metric, table.runs, maximize) for metric in table.metrics]
    _check_varying(directions, table.runs, source, named=metrics is not None)
    found = _study_fit(table, directions, resamples, seed)
    numbers = found.to_json()
    config: dict[str, Any] = {"metrics": table.metrics, "maximize": maximize, "resamples": resamples, "seed": seed}
    if columns:
        config["columns"] = list(columns)
    if out is not None:
        write_metrics(out, "scaling fit", config, table.inputs, numbers, overwrite)
    if plot is not None:
        figures.save_fit(plot, found, config, table.inputs, overwrite)
    return numbers


def _study_fit(table: run_table.Table, directions: Sequence[Direction], resamples: int, seed: int) -> StudyFit:
    """Every fit: of each resolution, metric and method."""
    fits: list[Fit] = []
    plain = True
    resolutions = sorted({one.resolution for one in table.runs}, key=lambda value: value or 0)
    with progress.track("fit", len(METHODS) * len(directions) * len(resolutions), "fits") as bar:
        for resolution in resolutions:
            ours = [one for one in table.runs if one.resolution == resolution]
            resampled = Resampled.of(ours, resolution, resamples, seed)
            plain = plain and resampled.ratio.plain
            for direction in directions:
                points = resampled.points(direction)
                for method in METHODS:
                    bar.note(f"{direction.metric} {method}")
                    fits.append(_isoflop(points) if method == "isoflop" else _law(points, method))
                    bar.advance()
    of = {"isoflop": "residuals", "direct": "runs", "varpro": "runs"}
    return StudyFit(
        counting=table.counting or ("6nd" if plain else None),  # a CSV does not name it
        params_counted=table.params_counted,
        tokens_per_image=table.tokens_per_image,
        runs=tuple(table.runs),
        excluded=tuple(table.excluded),
        bootstrap=Bootstrap(resamples, seed, LEVEL, of),
        fits=tuple(fits),
        disagreements=tuple(disagreements(fits)),
        notes=tuple(table.notes),
    )


def _check_varying(directions: Sequence[Direction], runs: Sequence[Run], source: str | Path, named: bool) -> None:
    """A metric that was named, or is the only one, takes more than one value; another's fits are refused one by one."""
    for direction in directions:
        values = {run.values[direction.metric] for run in runs} - {None}
        if len(values) <= 1 and (named or len(directions) == 1):
            shown = f"{values.pop()} in every run" if values else "missing in every finished run"
            raise PixseqError(
                f"{source}: {direction.metric} is {shown}", "there is nothing to fit; name another metric"
            )


# ---- fitting


def _isoflop(points: Points) -> Fit:
    fit = _blank(points, "isoflop")
    if fit.refused:
        return fit
    log_n, log_c = np.log(points.params), np.log(points.budgets)
    ratio = points.of.ratio
    found = isoflop.profile(log_n, points.y, points.index, log_c, ratio, points.weight)
    left_out = _left_out(points, found, log_n)
    flags = [f"far off the parabola of their budget, {_listed(left_out)}: left out"] if left_out else []
    flags += [
        _why_unused(points, k, parabola, status)
        for k, (parabola, status) in enumerate(zip(found.parabolas, found.status))
        if status != "ok"
    ]
    optima = [_vertex(points, k, *one) for k, one in enumerate(zip(found.parabolas, found.status))]
    fit = replace(fit, optima=tuple(optima), outliers=tuple(left_out), flags=(*fit.flags, *flags))
    if found.params_law is None or found.tokens_law is None:
        unused = [f"{c:.3g} ({s})" for c, s in zip(points.budgets, found.status) if s != "ok"]
        why = f"{found.status.count('ok')} of {len(points.budgets)} budgets have an optimum inside the sizes run"
        return replace(fit, refused=f"{why}, three are needed; not so: {', '.join(unused)}")
    fit = replace(fit, residual=_parabola_residual(points, found))
    drawn = isoflop.bootstrap(found, log_n, points.y, points.index, log_c, ratio, points.picks, points.weight)
    with np.errstate(over="ignore"):
        params, tokens = (PowerLaw(lots[:, 0], np.exp(lots[:, 1])) for lots in drawn)
    return _with_numbers(points, fit, (found.params_law, found.tokens_law), Constants(), Frontier(params, tokens, None))


def _vertex(points: Points, k: int, parabola: isoflop.Parabola | None, status: str) -> Optimum:
    """The optimum of a budget, named where it lies inside the sizes run."""
    curvature = None if parabola is None else float(parabola.curvature)
    if parabola is None or status != "ok":
        return points.optimum(k, status, curvature=curvature)
    return points.optimum(k, status, float(parabola.vertex), float(parabola.value), curvature)


def _parabola_residual(points: Points, found: isoflop.Profile) -> float | None:
    """Of log y, over the budgets whose parabolas are used; None where it is of values not positive."""
    misfits = []
    for k, (parabola, status) in enumerate(zip(found.parabolas, found.status)):
        seen = points.y[(points.index == k) & found.used]
        if parabola is not None and status == "ok" and (parabola.fitted > 0).all() and (seen > 0).all():
            misfits.append(np.log(parabola.fitted / seen))
    return finite(rms(np.concatenate(misfits))) if misfits else None


def _law(points: Points, method: str) -> Fit:
    fit = _blank(points, method)
    if fit.refused:
        return fit
    why = _no_law(points)
    if why:
        return replace(fit, refused=why)
    runs = laws.Runs.of(points.params, points.tokens, points.y, points.weight)
    theta = laws.direct(runs) if method == "direct" else laws.varpro(runs)
    why = _not_identified(str(laws.trouble(theta[None], runs)[0]))
    if why:
        return replace(fit, refused=why)
    resample = laws.direct_resampled if method == "direct" else laws.varpro_resampled
    drawn = np.concatenate([theta[None], resample(theta, runs, points.counts)]) if len(points.counts) else theta[None]
    law, log_c = laws.Law.of(drawn, runs), np.log(points.budgets)
    log_n, log_d = law.optimum(log_c, points.of.ratio)
    grown = [np.stack(isoflop.power_law(log_c, value), axis=1) for value in (log_n, log_d)]
    for part in grown:
        part[laws.trouble(drawn, runs) != ""] = np.nan
    optima = []
    for k, (size, value) in enumerate(zip(log_n[0], law(log_n[:1], log_d[:1])[0])):
        low, high = points.sizes(k)
        status = "ok" if low <= np.exp(size) <= high else "outside"
        optima.append(points.optimum(k, status, float(size), float(value)))
    far, flags = _outliers(points, theta, runs), []
    outside = [f"{row.flops:.3g}" for row in optima if row.status == "outside"]
    if outside:
        flags.append(f"the optimum lies outside the sizes run at {', '.join(outside)} FLOPs")
    if far:
        counts = "counted for little" if method == "direct" else "counted for little or nothing"
        flags.append(f"far off the law, {_listed(far.values())}: {counts}; were they trained as the others?")
    ordinary = np.delete(laws.residual(theta[None], runs)[0], list(far))
    fit = replace(
        fit,
        optima=tuple(optima),
        outliers=tuple(far.values()),
        residual=finite(rms(ordinary)),
        flags=(*fit.flags, *flags),
    )
    with np.errstate(over="ignore"):
        params, tokens = (PowerLaw(part[1:, 0], np.exp(part[1:, 1])) for part in grown)
    draws = Frontier(params, tokens, laws.Law(*(values[1:] for values in vars(law).values())))
    known: dict[str, Any] = {name: finite(values[0]) for name, values in vars(law).items()}
    constants = Constants(**known)
    return _with_numbers(points, fit, [part[0] for part in grown], constants, draws)


def _outliers(points: Points, theta: np.ndarray, runs: laws.Runs) -> dict[int, Outlier]:
    """Runs far off the law by their places, the farthest first."""
    misfit = laws.residual(theta[None], runs)[0]
    distance = np.abs(misfit) * np.sqrt(points.weight) / laws.scale(theta, runs)
    order = [i for i in np.argsort(-distance, kind="stable") if distance[i] > OUTLYING]
    return {i: _outlier(points, i, float(np.expm1(-misfit[i])), float(distance[i])) for i in order}


def _left_out(points: Points, found: isoflop.Profile, log_n: np.ndarray) -> list[Outlier]:
    """Runs that the parabolas of their budgets leave out."""
    outliers = []
    for i in np.flatnonzero(~found.used).tolist():
        parabola = found.parabolas[points.index[i]]
        others = np.flatnonzero((points.index == points.index[i]) & found.used)
        at = isoflop.parabola(log_n[others], points.y[others], points.weight[others]) if parabola is None else parabola
        value = at.fitted.mean() if np.isnan(at.vertex) else at.value + at.curvature * (log_n[i] - at.vertex) ** 2
        noise = max(rms(points.y[others] - at.fitted), 1e-12)
        outliers.append(_outlier(points, i, float(points.y[i] / value - 1), float(abs(points.y[i] - value) / noise)))
    return outliers


def _outlier(points: Points, i: int, off: float, distance: float) -> Outlier:
    """`off` is a share of what the fit says, `distance` in standard deviations of the noise."""
    value = finite(float(points.direction.flipped(points.y[i])))
    return Outlier(
        points.name(i), float(points.params[i]), float(points.tokens[i]), value, finite(off), finite(distance)
    )


def _listed(outliers: Collection[Outlier]) -> str:
    named = [f"{one.id} ({1 + (one.off or 0):.3g} times what it says)" for one in itertools.islice(outliers, NAMED)]
    more = f" and {len(outliers) - NAMED} more" if len(outliers) > NAMED else ""
    return ", ".join(named) + more


def _no_law(points: Points) -> str | None:
    """Why the law cannot be fitted to these runs."""
    if (points.y <= 0).any():
        what = points.direction.text or points.direction.metric
        return f"{(points.y <= 0).sum()} runs have {what} <= 0, and the law is a sum of positive terms"
    if len(points.y) < laws.MIN_RUNS:
        return f"{len(points.y)} runs for five constants, {laws.MIN_RUNS} are needed"
    return None


def _not_identified(fault: str) -> str | None:
    """A fault of `laws.trouble` in words."""
    term, size = ("A N^-alpha", "params") if fault in ("A", "alpha") else ("B D^-beta", "tokens")
    if fault in ("A", "B"):
        return f"{term} is not identified: these runs show no gain from more {size}"
    if fault:
        return f"{fault} is not identified: it ends at a bound of {laws.EXPONENTS[0]} to {laws.EXPONENTS[1]}"
    return None


def _blank(points: Points, method: str) -> Fit:
    """A fit without numbers, refused where no method can fit these runs."""
    fit, metric = points.blank(method), points.direction.metric
    if len(points.budgets) < isoflop.MIN_BUDGETS:
        return replace(fit, refused=f"runs at {len(points.budgets)} budgets, three are needed")
    if np.ptp(points.y) == 0:
        return replace(fit, refused=f"{metric} is {points.direction.flipped(points.y[0]):.6g} in every run")
    if fit.floor and len(fit.floor.extractors) > 1:
        shown = "; ".join(fit.floor.extractors)
        return replace(
            fit, refused=f"{metric} is measured by several extractors, and none compares to another: {shown}"
        )
    return replace(fit, flags=tuple(_floor_flags(metric, fit.floor))) if fit.floor else fit


def _floor_flags(metric: str, floor: Floor) -> list[str]:
    """Where values lie within what real pictures against real ones give, and where n differs."""
    flags = []
    if floor.near:
        n = ", ".join(f"{count:g}" for count in floor.floor_n or floor.n) or "unknown"
        by = f", {', '.join(floor.extractors)}" if floor.extractors else ""
        flags.append(
            f"{floor.within} of {floor.runs} runs lie within the floor of {metric}, about {floor.floor:.3g} "
            f"(real against real, n {n}{by}), and {floor.near} below {NEAR:g} times it: differences there are those "
            "of measuring, not of models"
        )
    if len(floor.n) > 1:
        flags.append(f"{metric} is measured with n from {floor.n[0]:g} to {floor.n[-1]:g}: it is the greater the fewer")
    return flags


def _why_unused(points: Points, k: int, parabola: isoflop.Parabola | None, status: str) -> str:
    at, (low, high) = f"at a budget of {points.budgets[k]:.3g}", points.sizes(k)
    if status == "too few runs":
        return f"{at} there are fewer than {isoflop.MIN_RUNS} sizes for a parabola: not used"
    if status == "not convex":
        return f"{at} the metric has no minimum over the sizes run: not used"
    if status == "scattered":
        return f"{at} the runs lie so far off any parabola that one of them must be at fault: not used"
    assert parabola is not None
    below = parabola.vertex <= np.log(low)
    side = f"below the smallest model run ({low:.3g}" if below else f"above the largest model run ({high:.3g}"
    return f"{at} the optimum lies at the edge, {side} params): not used"


def _with_numbers(
    points: Points, fit: Fit, found: Sequence[Sequence[float]], constants: Constants, draws: Frontier
) -> Fit:
    """The fit with its laws of params and tokens, `found` as (exponent, log coefficient), and intervals."""
    (size, log_size), (data, log_data) = found
    kept = np.logical_and.reduce([np.isfinite(values) for values in draws.arrays().values()])
    draws = draws.each(lambda values: values[kept])
    lost, flags = len(kept) - int(kept.sum()), []
    if lost > 0.1 * len(kept):
        verdict = "too few are left for an interval" if kept.sum() < FEWEST_DRAWS else "the intervals are too narrow"
        flags.append(f"{lost} of {len(kept)} resamples gave no fit: {verdict}")
    params = Growth(finite(size), _interval(draws.params.exponent), exp(log_size))
    tokens = Growth(finite(data), _interval(draws.tokens.exponent), exp(log_data))
    if not all(one.exponent is not None and 0 < one.exponent < 1 for one in (params, tokens)):
        flags.append("an exponent lies outside 0 to 1: the optima do not settle how compute is divided")
    between = _interval(draws.tokens.exponent - draws.params.exponent)
    if draws.law is not None:
        intervals: dict[str, Any] = {
            f"{name}_ci": _interval(getattr(draws.law, name)) for name in ("E", "alpha", "beta")
        }
        constants = replace(constants, **intervals)
    return replace(
        fit,
        params=params,
        tokens=tokens,
        tokens_per_param=Growth(finite(data - size), between, exp(log_data - log_size)),
        constants=constants,
        draws=draws.each(_rounded),
        flags=(*fit.flags, *flags, *_ratio_flags(points)),
    )


def _rounded(values: np.ndarray) -> np.ndarray:
    """To six digits, for a document."""
    return np.array([float(f"{value:.6g}") for value in values])


def _interval(draws: np.ndarray) -> Interval | None:
    """None of too few."""
    if len(draws) < FEWEST_DRAWS:
        return None
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(draws, [tail, 100 - tail])
    return float(low), float(high)


def _ratio_flags(points: Points) -> list[str]:
    """Where the FLOPs are not 6 params tokens, what they are and what that does to the exponents."""
    ratio = points.of.ratio
    seen = np.exp(ratio(np.log(points.params)))
    if not ratio.constant:
        return [
            f"flops are {seen.min():.3g} to {seen.max():.3g} times 6 params tokens, by size, as where attention is "
            "counted (exact, exact-causal): the exponents are slopes over these budgets"
        ]
    if ratio.plain:
        return []
    forward = ", as of a forward pass alone" if abs(seen[0] - 1 / 3) < 0.01 else ""
    return [f"flops are {seen[0]:.3g} times 6 params tokens at every size{forward}"]
