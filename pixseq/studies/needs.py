"""The compute that a target needs by one fit, and whether the fits of a metric agree on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pixseq.artifacts.fit import Fit
from pixseq.numerics import forecast as arithmetic
from pixseq.studies.fits import OpenFit

SHARE_OF_E = 0.05  # the default target: what can still be gained is this share of what never can
TINY_E = 0.01  # of the best value seen: below it, E is as good as 0, and no share of it means anything
FACTOR = 3.0  # by which two laws' compute may differ without being at odds


@dataclass(frozen=True)
class Needed:
    """What a target takes: logs of FLOPs, params and tokens, and draws [S] of the first; or `why` there is no such."""

    target: float | None
    log_c: float = math.inf
    log_n: float = math.inf
    log_d: float = math.inf
    draws: np.ndarray = field(default_factory=lambda: np.empty(0))
    why: str | None = None


def needed(fit: Fit, target: float | None) -> Needed:
    """`target` in the metric's own units; None: the default."""
    if fit.refused:
        return Needed(target, why=f"none: no fit: {fit.refused}")
    top, E = fit.ceiling, fit.constants.E
    assert E is not None  # a law's fit that stands has it
    if target is None:
        seen = [row.value for row in fit.optima if row.value is not None]
        best = min((value if top is None else top - value for value in seen), default=math.inf)
        if not seen or TINY_E * best > E:
            return Needed(None, why=f"none: the law tells no floor (E is {E:.3g}) to set a target by; name a target")
        minimised = E * (1 + SHARE_OF_E)
        target = minimised if top is None else top - minimised
    else:
        minimised = target if top is None else top - target
    if minimised <= E:
        floor = f"{E:.4g}" if top is None else f"{E:.4g} of {fit.transform}"
        return Needed(target, why=f"unreachable: at or below the irreducible {floor}")
    log_c = float(fit.frontier.log_compute(minimised)[0])
    if math.isinf(log_c):
        return Needed(target, why="unreachable: the optimal model or data do not grow with compute")
    draws = np.empty(0) if fit.draws is None else fit.draws.log_compute(minimised)
    return Needed(target, log_c, fit.params.log(log_c), fit.tokens.log(log_c), draws)


def _at_resolution(found: Mapping[int, Needed], resolution: int, target: float | None) -> Needed:
    """A resolution without runs: log-linear in resolution through those that have a forecast.

    None where one of them cannot reach the target: a line through the others would hide that.
    """
    barred = [side for side, one in found.items() if (one.why or "").startswith("unreachable")]
    if barred:
        sides = ", ".join(f"{side}x{side}" for side in barred)
        return Needed(target, why=f"none: nothing was run at it, and the target is unreachable at {sides}")
    known = {side: one for side, one in found.items() if one.why is None}
    if len(known) < 2:
        text = f"none: nothing was run at it, and two studied resolutions are needed to go by, there are {len(known)}"
        return Needed(target, why=text)
    x, at = np.log(list(known)), math.log(resolution)
    centre = [np.array([getattr(one, key) for one in known.values()]) for key in ("log_c", "log_n", "log_d")]
    fewest = min(len(one.draws) for one in known.values())
    draws = np.stack([one.draws[:fewest] for one in known.values()], axis=1)
    log_c, log_n, log_d = (float(arithmetic.through(x, values, at)) for values in centre)
    return Needed(target, log_c, log_n, log_d, arithmetic.through(x, draws, at))


def found_at(found: Mapping[int | None, Needed], side: int, target: float | None) -> Needed:
    if None in found:  # one law for all
        return found[None]
    known = {resolution: one for resolution, one in found.items() if resolution is not None}
    return known[side] if side in known else _at_resolution(known, side, target)


# ---- whether the fits agree


@dataclass(frozen=True)
class Disputes:
    """The fits of a metric by the other law, and the resolutions at which methods disagree with the one in use."""

    method: str
    fits: Sequence[Fit]
    sides: frozenset[int | None]

    @classmethod
    def of(cls, opened: OpenFit, metric: str) -> Disputes:
        other = "direct" if opened.method == "varpro" else "varpro"
        fits = [one for one in opened.whole.fits if (one.metric, one.method) == (metric, other)]
        rows = [row for row in opened.whole.disagreements if row.metric == metric]
        ours = [row for row in rows if any(opened.method in pair for pair in row.pairs)]
        return cls(other, fits, frozenset(row.resolution for row in ours))

    def at_odds(self, one: Needed, other: Needed, level: float) -> bool:
        """Whether the other law's compute lies outside the interval, and FACTOR away. Where one has no fit, no."""
        if (other.why or "").startswith("none") or (one.why or "").startswith("none"):
            return False
        if math.isinf(one.log_c) or math.isinf(other.log_c):
            return one.log_c != other.log_c
        low, high = arithmetic.interval(one.draws, level) or (one.log_c, one.log_c)
        return not low <= other.log_c <= high and abs(one.log_c - other.log_c) > math.log(FACTOR)
