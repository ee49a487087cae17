"""scaling fit: how the best model size and data size grow with compute, for each metric and resolution, in three ways.

IsoFLOP parabolas, the direct fit of L(N, D) = E + A N^-alpha + B D^-beta, and the same law by variable projection
(numerics/isoflop.py, numerics/laws.py), each with bootstrap intervals. Where they disagree, the result says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixseq import progress
from pixseq.artifacts import atomic
from pixseq.artifacts.metrics import write_metrics
from pixseq.artifacts.picture import check_png
from pixseq.drawing import scaling as figures
from pixseq.errors import PixseqError, UsageError
from pixseq.numerics import isoflop, laws
from pixseq.studies import table as reading
from pixseq.studies.agreement import disagreements
from pixseq.studies.points import NEAR, Fit, Points, Study, Turn, exp, number, rms

LEVEL = 0.95
FEWEST_DRAWS = 20  # resamples that an interval needs
OUTLYING = 4.5  # scales of the noise off a law from which on a run is named
NAMED = 4  # runs that one remark names


@atomic.owns("scaling fit", "out", "plot")
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
    table = reading.read(source, metrics, columns or ())
    turns = [Turn.of(metric, table.runs, maximize) for metric in table.metrics]
    _check_varying(turns, table.runs, source, named=metrics is not None)

    fits: list[Fit] = []
    plain = True
    resolutions = sorted({one["resolution"] for one in table.runs}, key=lambda value: value or 0)
    with progress.track("fit", 3 * len(turns) * len(resolutions), "fits") as bar:
        for resolution in resolutions:
            ours = [one for one in table.runs if one["resolution"] == resolution]
            study = Study.of(ours, resolution, resamples, seed)
            plain = plain and study.ratio.plain
            for turn in turns:
                points = study.points(turn)
                for method in ("isoflop", "direct", "varpro"):
                    bar.note(f"{turn.metric} {method}")
                    fits.append(_isoflop(points) if method == "isoflop" else _law(points, method))
                    bar.advance()
    of = {"isoflop": "residuals", "direct": "runs", "varpro": "runs"}
    numbers = {
        "counting": table.counting or ("6nd" if plain else None),  # a CSV does not name it
        "params_counted": table.params_counted,
        "tokens_per_image": table.tokens_per_image,
        "runs": table.runs,
        "excluded": table.excluded,
        "bootstrap": {"resamples": resamples, "seed": seed, "level": LEVEL, "of": of},
        "fits": fits,
        "disagreements": disagreements(fits),
    }
    config: dict[str, Any] = {"metrics": table.metrics, "maximize": maximize, "resamples": resamples, "seed": seed}
    if table.notes:
        numbers["notes"] = table.notes
    if columns:
        config["columns"] = list(columns)
    if out is not None:
        write_metrics(out, "scaling fit", config, table.inputs, numbers, overwrite)
    if plot is not None:
        figures.save_fit(plot, numbers, config, table.inputs, overwrite)
    return numbers


def _check_varying(turns: Sequence[Turn], runs: Sequence[dict[str, Any]], source: str | Path, named: bool) -> None:
    """A metric that was named, or is the only one, takes more than one value; another's fits are refused one by one."""
    for turn in turns:
        values = {run[turn.metric] for run in runs} - {None}
        if len(values) <= 1 and (named or len(turns) == 1):
            shown = f"{values.pop()} in every run" if values else "missing in every finished run"
            raise PixseqError(f"{source}: {turn.metric} is {shown}", "there is nothing to fit; name another metric")


# ---- fitting


def _isoflop(points: Points) -> Fit:
    fit = points.blank("isoflop")
    if _refused(points, fit):
        return fit
    log_n, log_c = np.log(points.params), np.log(points.budgets)
    found = isoflop.profile(log_n, points.y, points.index, log_c, points.study.ratio, points.weight)
    _name_left_out(points, fit, found, log_n)
    misfits = []
    for k, (parabola, status) in enumerate(zip(found.parabolas, found.status)):
        inside = status == "ok"
        vertex, value = (float(parabola.vertex), float(parabola.value)) if inside else (None, None)
        fit["budgets"].append(points.budget(k, status, vertex, value, parabola and float(parabola.curvature)))
        if not inside:
            fit["flags"].append(_why_unused(points, k, parabola, status))
            continue
        seen = points.y[(points.index == k) & found.used]
        if (parabola.fitted > 0).all() and (seen > 0).all():
            misfits.append(np.log(parabola.fitted / seen))
    if found.params_law is None:
        usable = found.status.count("ok")
        unused = [f"{c:.3g} ({s})" for c, s in zip(points.budgets, found.status) if s != "ok"]
        fit["refused"] = (
            f"{usable} of {len(points.budgets)} budgets have an optimum inside the sizes run, three are needed; "
            f"not so: {', '.join(unused)}"
        )
        return fit
    fit["residual"] = number(rms(np.concatenate(misfits))) if misfits else None
    drawn = isoflop.bootstrap(
        found, log_n, points.y, points.index, log_c, points.study.ratio, points.picks, points.weight
    )
    _fill(points, fit, (found.params_law, found.tokens_law), drawn, {})
    return fit


def _law(points: Points, method: str) -> Fit:
    fit = points.blank(method)
    if _refused(points, fit):
        return fit
    fit["refused"] = _no_law(points)
    if fit["refused"]:
        return fit
    runs = laws.Runs.of(points.params, points.tokens, points.y, points.weight)
    theta = laws.direct(runs) if method == "direct" else laws.varpro(runs)
    fit["refused"] = _not_identified(str(laws.trouble(theta[None], runs)[0]))
    if fit["refused"]:
        return fit
    resample = laws.direct_resampled if method == "direct" else laws.varpro_resampled
    drawn = np.concatenate([theta[None], resample(theta, runs, points.counts)]) if len(points.counts) else theta[None]
    law, log_c = laws.Law.of(drawn, runs), np.log(points.budgets)
    log_n, log_d = law.optimum(log_c, points.study.ratio)
    grown = [np.stack(isoflop.power_law(log_c, value), axis=1) for value in (log_n, log_d)]
    for part in grown:
        part[laws.trouble(drawn, runs) != ""] = np.nan
    for k, (size, value) in enumerate(zip(log_n[0], law(log_n[:1], log_d[:1])[0])):
        low, high = points.sizes(k)
        status = "ok" if low <= np.exp(size) <= high else "outside"
        fit["budgets"].append(points.budget(k, status, float(size), float(value), None))
    outside = [f"{row['flops']:.3g}" for row in fit["budgets"] if row["status"] == "outside"]
    if outside:
        fit["flags"].append(f"the optimum lies outside the sizes run at {', '.join(outside)} FLOPs")
    ordinary = _name_outliers(points, fit, theta, runs)
    fit["residual"] = number(rms(laws.residual(theta[None], runs)[0][ordinary]))
    _fill(points, fit, [part[0] for part in grown], [part[1:] for part in grown], vars(law))
    return fit


def _name_outliers(points: Points, fit: Fit, theta: np.ndarray, runs: laws.Runs) -> np.ndarray:
    """Runs far off the law, under "outliers" and in a remark; returns those that are not [n]."""
    misfit = laws.residual(theta[None], runs)[0]
    distance = np.abs(misfit) * np.sqrt(points.weight) / laws.scale(theta, runs)
    for i in np.argsort(-distance, kind="stable"):
        if distance[i] > OUTLYING:
            fit["outliers"].append(_outlier(points, i, float(np.expm1(-misfit[i])), float(distance[i])))
    if fit["outliers"]:
        counts = "counted for little" if fit["method"] == "direct" else "counted for little or nothing"
        fit["flags"].append(f"far off the law, {_listed(fit['outliers'])}: {counts}; were they trained as the others?")
    return distance <= OUTLYING


def _name_left_out(points: Points, fit: Fit, found: isoflop.Profile, log_n: np.ndarray) -> None:
    """Runs that the parabolas of their budgets leave out, under "outliers" and in a remark."""
    for i in np.flatnonzero(~found.used):
        parabola = found.parabolas[points.index[i]]
        others = np.flatnonzero((points.index == points.index[i]) & found.used)
        at = isoflop.parabola(log_n[others], points.y[others], points.weight[others]) if parabola is None else parabola
        value = at.fitted.mean() if np.isnan(at.vertex) else at.value + at.curvature * (log_n[i] - at.vertex) ** 2
        noise = max(rms(points.y[others] - at.fitted), 1e-12)
        fit["outliers"].append(
            _outlier(points, i, float(points.y[i] / value - 1), float(abs(points.y[i] - value) / noise))
        )
    if fit["outliers"]:
        fit["flags"].append(f"far off the parabola of their budget, {_listed(fit['outliers'])}: left out")


def _outlier(points: Points, i: int, off: float, distance: float) -> dict[str, Any]:
    """`off` is a share of what the fit says, `distance` in standard deviations of the noise."""
    where = {"id": points.name(i), "params": float(points.params[i]), "tokens": float(points.tokens[i])}
    value = number(points.turn.turn(points.y[i]))
    return {**where, "value": value, "off": number(off), "deviations": number(distance)}


def _listed(outliers: Sequence[dict[str, Any]]) -> str:
    named = [f"{row['id']} ({1 + (row['off'] or 0):.3g} times what it says)" for row in outliers[:NAMED]]
    more = f" and {len(outliers) - NAMED} more" if len(outliers) > NAMED else ""
    return ", ".join(named) + more


def _no_law(points: Points) -> str | None:
    """Why the law cannot be fitted to these runs."""
    if (points.y <= 0).any():
        what = points.turn.text or points.turn.metric
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


def _refused(points: Points, fit: Fit) -> bool:
    """What keeps every method from fitting."""
    if len(points.budgets) < isoflop.MIN_BUDGETS:
        fit["refused"] = f"runs at {len(points.budgets)} budgets, three are needed"
    elif np.ptp(points.y) == 0:
        fit["refused"] = f"{points.turn.metric} is {points.turn.turn(points.y[0]):.6g} in every run"
    elif fit["floor"] and len(fit["floor"]["extractors"]) > 1:
        shown = "; ".join(fit["floor"]["extractors"])
        fit["refused"] = (
            f"{points.turn.metric} is measured by several extractors, and none compares to another: {shown}"
        )
    if fit["refused"] is None and fit["floor"]:
        fit["flags"] += _floor_flags(points.turn.metric, fit["floor"])
    return fit["refused"] is not None


def _floor_flags(metric: str, floor: dict[str, Any]) -> list[str]:
    """Where values lie within what real pictures against real ones give, and where n differs."""
    flags = []
    if floor["near"]:
        n = ", ".join(f"{count:g}" for count in floor["floor_n"] or floor["n"]) or "unknown"
        by = f", {', '.join(floor['extractors'])}" if floor["extractors"] else ""
        flags.append(
            f"{floor['within']} of {floor['runs']} runs lie within the floor of {metric}, about {floor['floor']:.3g} "
            f"(real against real, n {n}{by}), and {floor['near']} below {NEAR:g} times it: differences there are those "
            "of measuring, not of models"
        )
    if len(floor["n"]) > 1:
        flags.append(
            f"{metric} is measured with n from {floor['n'][0]:g} to {floor['n'][-1]:g}: it is the greater the fewer"
        )
    return flags


def _why_unused(points: Points, k: int, parabola: isoflop.Parabola | None, status: str) -> str:
    where, (low, high) = f"at a budget of {points.budgets[k]:.3g}", points.sizes(k)
    if status == "too few runs":
        return f"{where} there are fewer than {isoflop.MIN_RUNS} sizes for a parabola: not used"
    if status == "not convex":
        return f"{where} the metric has no minimum over the sizes run: not used"
    if status == "scattered":
        return f"{where} the runs lie so far off any parabola that one of them must be at fault: not used"
    below = parabola.vertex <= np.log(low)
    side = f"below the smallest model run ({low:.3g}" if below else f"above the largest model run ({high:.3g}"
    return f"{where} the optimum lies at the edge, {side} params): not used"


def _fill(points: Points, fit: Fit, found, drawn, constants: dict[str, np.ndarray]) -> None:
    """Laws of params and tokens (exponent, log coefficient), their draws [S, 2], constants [1 + S] (the fit first)."""
    draws: dict[str, np.ndarray] = {}
    for what, law, lots in zip(("params", "tokens"), found, drawn):
        fit[f"{what}_exponent"], fit[f"{what}_coefficient"] = number(law[0]), exp(law[1])
        with np.errstate(over="ignore"):
            draws |= {f"{what}_exponent": lots[:, 0], f"{what}_coefficient": np.exp(lots[:, 1])}
    for name, values in constants.items():
        fit[name], draws[name] = number(values[0]), values[1:]
    kept = np.logical_and.reduce([np.isfinite(values) for values in draws.values()])
    draws = {name: values[kept] for name, values in draws.items()}
    fit["tokens_per_param_exponent"] = number(found[1][0] - found[0][0])
    fit["tokens_per_param_coefficient"] = exp(found[1][1] - found[0][1])
    if kept.sum() >= FEWEST_DRAWS:
        per_param = draws["tokens_exponent"] - draws["params_exponent"]
        ranges = {
            name: draws[name] for name in ("params_exponent", "tokens_exponent", "alpha", "beta", "E") if name in draws
        }
        ranges |= {"tokens_per_param_exponent": per_param}
        for name, values in ranges.items():
            tail = 50 * (1 - LEVEL)
            fit[f"{name}_ci"] = [float(end) for end in np.percentile(values, [tail, 100 - tail])]
    fit["draws"] = {name: [float(f"{value:.6g}") for value in values] for name, values in draws.items()}
    lost = len(kept) - int(kept.sum())
    if lost > 0.1 * len(kept):
        verdict = "too few are left for an interval" if kept.sum() < FEWEST_DRAWS else "the intervals are too narrow"
        fit["flags"].append(f"{lost} of {len(kept)} resamples gave no fit: {verdict}")
    if not (0 < fit["params_exponent"] < 1 and 0 < fit["tokens_exponent"] < 1):
        fit["flags"].append("an exponent lies outside 0 to 1: the optima do not settle how compute is divided")
    fit["flags"] += _ratio_flags(points)


def _ratio_flags(points: Points) -> list[str]:
    """Where the FLOPs are not 6 params tokens, what they are and what that does to the exponents."""
    ratio = points.study.ratio
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
