"""scaling fit: how the best model size and data size grow with compute, for each metric and resolution, in three ways.

IsoFLOP parabolas, the direct fit of L(N, D) = E + A N^-alpha + B D^-beta, and the same law by variable projection
(numerics/isoflop.py, numerics/laws.py), each with bootstrap intervals. Where they disagree, the result says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pixseq import progress
from pixseq.artifacts import atomic
from pixseq.errors import PixseqError, UsageError
from pixseq.numerics import isoflop, laws
from pixseq.stages.scaling import runs as reading

LEVEL = 0.95
BOOTSTRAP_STREAM = 31
FEWEST_DRAWS = 20  # resamples that an interval needs
SAME_EXPONENT, APART = 0.01, 0.05  # differences of an exponent that never, and that may, count as disagreement
GROWING = ("params", "tokens", "tokens_per_param")

Fit = dict[str, Any]


def run(
    source: str | Path,
    out: str | Path | None = None,
    plot: str | Path | None = None,
    metrics: Sequence[str] | None = None,
    maximize: bool = False,
    resamples: int = 400,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """The fits as a mapping, written to `out` as metrics and drawn in `plot` where these are given.

    `source` is a plan folder or a CSV. `metrics` None: every measured column. A metric is to be small, unless its name
    speaks of accuracy, or `maximize` says so of all `metrics`; what is to be large is turned into 1 - it (shares) or
    100 - it (percent). `resamples` 0 gives no intervals. A fit that cannot stand has its reason under "refused" and no
    numbers; the others do. Raises PixseqError where nothing can be fitted.
    """
    if maximize and not metrics:
        raise UsageError("--maximize says nothing without --metric", "name what is to be large, as --metric top5")
    if resamples < 0 or 0 < resamples < FEWEST_DRAWS:
        raise UsageError(f"--bootstrap is {resamples}", f"at least {FEWEST_DRAWS}, or 0 for no intervals")
    for target in filter(None, (out, plot)):
        atomic.check_target(target, overwrite)
    if plot is not None:
        from pixseq.stages.scaling import figures

        figures.check_fit(plot, overwrite)
    table = reading.read(source, metrics)
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
                points = study.points(turn, ours)
                for method in ("isoflop", "direct", "varpro"):
                    bar.note(f"{turn.metric} {method}")
                    fits.append(_isoflop(points) if method == "isoflop" else _law(points, method))
                    bar.advance()
    of = {"isoflop": "residuals", "direct": "runs", "varpro": "runs"}
    numbers = {
        "counting": table.counting or ("6nd" if plain else None),  # a CSV does not name it
        "params_counted": table.params_counted,
        "runs": table.runs,
        "excluded": table.excluded,
        "bootstrap": {"resamples": resamples, "seed": seed, "level": LEVEL, "of": of},
        "fits": fits,
        "disagreements": disagreements(fits),
    }
    config = {"metrics": table.metrics, "maximize": maximize, "resamples": resamples, "seed": seed}
    if out is not None:
        from pixseq.artifacts.metrics import write_metrics

        write_metrics(out, "scaling fit", config, table.inputs, numbers, overwrite)
    if plot is not None:
        figures.save_fit(plot, numbers, config, table.inputs, overwrite)
    return numbers


# ---- what is fitted


@dataclass(frozen=True)
class Turn:
    """A metric as something to be small: itself, or `ceiling` minus it."""

    metric: str
    ceiling: float | None

    @classmethod
    def of(cls, metric: str, runs: Sequence[dict[str, Any]], maximize: bool) -> Turn:
        if not maximize and not any(word in metric.lower() for word in reading.SHARE_NAMES):
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
    """The runs [n] of one resolution, and the resamples [S, n] that all metrics share, so that they can be compared."""

    resolution: int | None
    ratio: isoflop.Ratio
    counts: np.ndarray  # how often a resample holds each run
    picks: np.ndarray  # in [0, 1): which residual a resample gives each run

    @classmethod
    def of(cls, runs: Sequence[dict[str, Any]], resolution: int | None, resamples: int, seed: int) -> Study:
        """Runs are resampled within their budget; budgets of too few runs for that are resampled together."""
        params, tokens, flops, budgets = (
            np.array([run[key] for run in runs]) for key in ("params", "tokens", "flops", "budget")
        )
        rng = np.random.default_rng([seed, BOOTSTRAP_STREAM, resolution or 0])
        _, stratum, sizes = np.unique(budgets, return_inverse=True, return_counts=True)
        stratum = np.where(sizes[stratum] < isoflop.MIN_RUNS, -1, stratum)
        counts = np.empty((resamples, len(runs)))
        for one in np.unique(stratum):
            members = np.flatnonzero(stratum == one)
            shares = np.full(len(members), 1 / len(members))
            counts[:, members] = rng.multinomial(len(members), shares, size=resamples)
        picks = rng.random((resamples, len(runs)))
        return cls(resolution, isoflop.flops_ratio(params, tokens, flops), counts, picks)

    def points(self, turn: Turn, runs: Sequence[dict[str, Any]]) -> Points:
        has = np.array([run[turn.metric] is not None for run in runs])
        table = np.array(
            [[run[key] for key in ("params", "tokens", "budget", turn.metric)] for run in itertools.compress(runs, has)]
        ).reshape(-1, 4)
        budgets, index = np.unique(table[:, 2], return_inverse=True)
        y = turn.turn(table[:, 3])
        return Points(turn, self, table[:, 0], table[:, 1], budgets, index, y, self.counts[:, has], self.picks[:, has])


@dataclass(frozen=True)
class Points:
    """The runs of one resolution that have one metric. `y` is to be small; `index` is each run's place in `budgets`."""

    turn: Turn
    study: Study
    params: np.ndarray
    tokens: np.ndarray
    budgets: np.ndarray
    index: np.ndarray
    y: np.ndarray
    counts: np.ndarray
    picks: np.ndarray

    def blank(self, method: str) -> Fit:
        """A fit without numbers."""
        growth = [f"{what}_{part}" for what in GROWING for part in ("exponent", "exponent_ci", "coefficient")]
        names = (*growth, "E", "A", "alpha", "alpha_ci", "B", "beta", "beta_ci", "residual")
        return {
            "metric": self.turn.metric,
            "direction": "minimize" if self.turn.ceiling is None else "maximize",
            "resolution": self.study.resolution,
            "transform": self.turn.text,
            "method": method,
            **dict.fromkeys(names),
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
            row |= {"params_opt": _number(np.exp(log_n)), "tokens_opt": _number(np.exp(log_d))}
            row |= {"tokens_per_param": _number(np.exp(log_d - log_n)), "value_opt": _number(self.turn.turn(value))}
        runs = int((self.index == k).sum())
        return row | {"curvature": _number(curvature), "runs": runs, "status": status}

    def sizes(self, k: int) -> tuple[float, float]:
        ours = self.params[self.index == k]
        return float(ours.min()), float(ours.max())


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
    found = isoflop.profile(log_n, points.y, points.index, log_c, points.study.ratio)
    misfits = []
    for k, (parabola, status) in enumerate(zip(found.parabolas, found.status)):
        inside = status == "ok"
        vertex, value = (float(parabola.vertex), float(parabola.value)) if inside else (None, None)
        fit["budgets"].append(points.budget(k, status, vertex, value, parabola and float(parabola.curvature)))
        if not inside:
            fit["flags"].append(_why_unused(points, k, parabola, status))
        elif (parabola.fitted > 0).all() and (points.y[points.index == k] > 0).all():
            misfits.append(np.log(parabola.fitted / points.y[points.index == k]))
    if found.params_law is None:
        usable = found.status.count("ok")
        unused = [f"{c:.3g} ({s})" for c, s in zip(points.budgets, found.status) if s != "ok"]
        fit["refused"] = (
            f"{usable} of {len(points.budgets)} budgets have an optimum inside the sizes run, three are needed; "
            f"not so: {', '.join(unused)}"
        )
        return fit
    fit["residual"] = _number(_rms(np.concatenate(misfits))) if misfits else None
    drawn = isoflop.bootstrap(found, log_n, points.y, points.index, log_c, points.study.ratio, points.picks)
    _fill(points, fit, (found.params_law, found.tokens_law), drawn, {})
    return fit


def _law(points: Points, method: str) -> Fit:
    fit = points.blank(method)
    if _refused(points, fit):
        return fit
    fit["refused"] = _no_law(points)
    if fit["refused"]:
        return fit
    runs = laws.Runs.of(points.params, points.tokens, points.y)
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
    fit["residual"] = _number(_rms(laws.residual(theta[None], runs)))
    _fill(points, fit, [part[0] for part in grown], [part[1:] for part in grown], vars(law))
    return fit


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
    return fit["refused"] is not None


def _why_unused(points: Points, k: int, parabola: isoflop.Parabola | None, status: str) -> str:
    where, (low, high) = f"at a budget of {points.budgets[k]:.3g}", points.sizes(k)
    if status == "too few runs":
        return f"{where} there are fewer than {isoflop.MIN_RUNS} sizes for a parabola: not used"
    if status == "not convex":
        return f"{where} the metric has no minimum over the sizes run: not used"
    below = parabola.vertex <= np.log(low)
    side = f"below the smallest model run ({low:.3g}" if below else f"above the largest model run ({high:.3g}"
    return f"{where} the optimum lies at the edge, {side} params): not used"


def _fill(points: Points, fit: Fit, found, drawn, constants: dict[str, np.ndarray]) -> None:
    """Laws of params and tokens (exponent, log coefficient), their draws [S, 2], constants [1 + S] (the fit first)."""
    draws: dict[str, np.ndarray] = {}
    for what, law, lots in zip(("params", "tokens"), found, drawn):
        fit[f"{what}_exponent"], fit[f"{what}_coefficient"] = _number(law[0]), _exp(law[1])
        with np.errstate(over="ignore"):
            draws |= {f"{what}_exponent": lots[:, 0], f"{what}_coefficient": np.exp(lots[:, 1])}
    for name, values in constants.items():
        fit[name], draws[name] = _number(values[0]), values[1:]
    kept = np.logical_and.reduce([np.isfinite(values) for values in draws.values()])
    draws = {name: values[kept] for name, values in draws.items()}
    fit["tokens_per_param_exponent"] = _number(found[1][0] - found[0][0])
    fit["tokens_per_param_coefficient"] = _exp(found[1][1] - found[0][1])
    if kept.sum() >= FEWEST_DRAWS:
        per_param = draws["tokens_exponent"] - draws["params_exponent"]
        ranges = {
            name: draws[name] for name in ("params_exponent", "tokens_exponent", "alpha", "beta") if name in draws
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


# ---- comparing


def disagreements(fits: Sequence[Fit]) -> list[dict[str, Any]]:
    """Metrics whose methods give tokens exponents that their intervals do not reconcile.

    Two do not where they differ by more than SAME_EXPONENT and their intervals do not meet, or by more than APART and
    either lies outside the other's interval.
    """
    found = []
    for metric, resolution in dict.fromkeys((fit["metric"], fit["resolution"]) for fit in fits):
        standing = [
            fit
            for fit in fits
            if (fit["metric"], fit["resolution"]) == (metric, resolution) and fit["tokens_exponent_ci"]
        ]
        pairs = [pair for pair in itertools.combinations(standing, 2) if _apart(*pair)]
        if pairs:
            methods = {fit["method"]: fit["tokens_exponent"] for fit in standing}
            shown = "; ".join(" against ".join(_with_interval(fit) for fit in pair) for pair in pairs)
            at = "" if resolution is None else f" at resolution {resolution}"
            text = f"the tokens exponent of {metric}{at}: {shown}"
            row = {"metric": metric, "resolution": resolution, "what": "tokens_exponent"}
            found.append({**row, "methods": methods, "text": text})
    return found


def _apart(a: Fit, b: Fit) -> bool:
    (a_low, a_high), (b_low, b_high) = a["tokens_exponent_ci"], b["tokens_exponent_ci"]
    one, other = a["tokens_exponent"], b["tokens_exponent"]
    if max(a_low, b_low) > min(a_high, b_high):
        return abs(one - other) > SAME_EXPONENT
    return abs(one - other) > APART and not (b_low <= one <= b_high and a_low <= other <= a_high)


def _with_interval(fit: Fit) -> str:
    low, high = fit["tokens_exponent_ci"]
    return f"{fit['method']} {fit['tokens_exponent']:.3f} ({low:.3f} to {high:.3f})"


# ---- numbers


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _number(value: float | None) -> float | None:
    """For JSON, which knows no infinity."""
    return float(value) if value is not None and np.isfinite(value) else None


def _exp(value: float) -> float | None:
    with np.errstate(over="ignore"):
        return _number(np.exp(value))
