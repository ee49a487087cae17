"""Where the three fits of a metric disagree by more than their intervals allow."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from pixseq.artifacts.fit import Disagreement, Fit, Interval

# Differences that never, and that may, count as disagreement.
SAME_EXPONENT, APART = 0.01, 0.05
QUANTITIES = {
    "tokens_exponent": "the tokens exponent",
    "params_exponent": "the params exponent",
    "E": "E",
    "alpha": "alpha",
    "beta": "beta",
}


def disagreements(fits: Sequence[Fit]) -> list[Disagreement]:
    """Metrics whose methods give numbers that their intervals do not reconcile, one a number.

    Two do not where they differ by more than SAME_EXPONENT and their intervals do not meet, or by more than APART and
    either lies outside the other's interval; E's difference is taken as a share of the metric. Without intervals the
    second difference alone counts.
    """
    found = []
    for metric, resolution in dict.fromkeys((fit.metric, fit.resolution) for fit in fits):
        ours = [fit for fit in fits if (fit.metric, fit.resolution) == (metric, resolution)]
        for what, name in QUANTITIES.items():
            standing = [fit for fit in ours if _value(fit, what) is not None]
            if what == "params_exponent" and all(_mirrored(fit) for fit in standing):
                continue
            unit = _least(standing) if what == "E" else 1.0
            pairs = [pair for pair in itertools.combinations(standing, 2) if _apart(*pair, what, unit)]
            if pairs:
                shown = "; ".join(" against ".join(_with_interval(fit, what) for fit in pair) for pair in pairs)
                at = "" if resolution is None else f" at resolution {resolution}"
                values = {fit.method: _known(fit, what) for fit in standing}
                methods = tuple((a.method, b.method) for a, b in pairs)
                found.append(
                    Disagreement(metric, resolution, what, values, methods, f"{name} of {metric}{at}: {shown}")
                )
    return found


def _value(fit: Fit, what: str) -> float | None:
    """A quantity of a fit."""
    grown = what.removesuffix("_exponent")
    return getattr(fit, grown).exponent if grown != what else getattr(fit.constants, what)


def _known(fit: Fit, what: str) -> float:
    """Of a fit that has it."""
    value = _value(fit, what)
    assert value is not None
    return value


def _interval(fit: Fit, what: str) -> Interval | None:
    grown = what.removesuffix("_exponent")
    return getattr(fit, grown).exponent_ci if grown != what else getattr(fit.constants, f"{what}_ci")


def _mirrored(fit: Fit) -> bool:
    """Whether the params exponent is 1 minus that of tokens, as where compute is 6 N D."""
    return abs((fit.params.exponent or 0) + (fit.tokens.exponent or 0) - 1) < 1e-6


def _least(fits: Sequence[Fit]) -> float:
    """The least value of the metric, as something to be small, at any optimum."""
    values = [
        row.value if fit.ceiling is None else fit.ceiling - row.value
        for fit in fits
        for row in fit.optima
        if row.value is not None
    ]
    return max(min(values, default=1.0), 1e-12)


def _apart(a: Fit, b: Fit, what: str, unit: float) -> bool:
    one, other = _known(a, what), _known(b, what)
    difference = abs(one - other) / unit
    ours, theirs = _interval(a, what), _interval(b, what)
    if ours is None or theirs is None:
        return difference > APART
    (a_low, a_high), (b_low, b_high) = ours, theirs
    if max(a_low, b_low) > min(a_high, b_high):
        return difference > SAME_EXPONENT
    return difference > APART and not (b_low <= one <= b_high and a_low <= other <= a_high)


def _with_interval(fit: Fit, what: str) -> str:
    ci = _interval(fit, what)
    return f"{fit.method} {_value(fit, what):.3f} " + (f"({ci[0]:.3f} to {ci[1]:.3f})" if ci else "(no interval)")
