"""How much compute a target needs on the frontier of compute-optimal runs, and when growing compute pays for it.

A law L = E + A N^-alpha + B D^-beta is followed along N = kn C^a, D = kd C^b, so that L falls with C towards E.

S draws of the fit, R resolutions. N params, D tokens, C FLOPs. Logs are natural.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pixseq.numerics.laws import Law

HALVINGS = 60  # of a bracket of a few tens: to the last bit
FEWEST_DRAWS = 20  # that an interval needs


@dataclass(frozen=True)
class PowerLaw:
    """v = coefficient C^exponent, arrays [S] each."""

    exponent: np.ndarray
    coefficient: np.ndarray

    def log(self, log_c: np.ndarray) -> np.ndarray:
        """log v at log C, one for each of S."""
        return np.log(self.coefficient) + self.exponent * log_c


@dataclass(frozen=True)
class Frontier:
    """The compute-optimal sizes as functions of C, and the law they follow, [S] each; None: no law was fitted.

    A and B of the law may be 0, the term is then nothing.
    """

    params: PowerLaw
    tokens: PowerLaw
    law: Law | None

    def __len__(self) -> int:
        return len(self.params.exponent)

    def each(self, change: Callable[[np.ndarray], np.ndarray]) -> Frontier:
        """With every array changed alike."""
        grown = [PowerLaw(change(one.exponent), change(one.coefficient)) for one in (self.params, self.tokens)]
        law = None if self.law is None else Law(*map(change, vars(self.law).values()))
        return Frontier(grown[0], grown[1], law)

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array by its name, as documents hold them."""
        grown = {"params": self.params, "tokens": self.tokens}
        named = {f"{what}_{key}": values for what, law in grown.items() for key, values in vars(law).items()}
        return named | ({} if self.law is None else vars(self.law))

    def terms(self) -> tuple[np.ndarray, np.ndarray]:
        """The two falling terms as exp(height - slope log C): height and slope, [2, S] each. Of one with a law."""
        law = self.law
        assert law is not None
        with np.errstate(divide="ignore"):
            log_a, log_b = np.log(law.A), np.log(law.B)
        height = [
            log_a - law.alpha * np.log(self.params.coefficient),
            log_b - law.beta * np.log(self.tokens.coefficient),
        ]
        return np.stack(height), np.stack([law.alpha * self.params.exponent, law.beta * self.tokens.exponent])

    def log_compute(self, target: float | np.ndarray) -> np.ndarray:
        """log C at which L comes down to `target`: [S], inf where it never does.

        Never: at a target of E or below, and where a term does not fall with C. Found by bisection: at the C where the
        greater term alone makes up the distance to E, L is not yet there; where neither makes up half of it, it is.
        """
        height, slope = self.terms()
        assert self.law is not None
        gap = np.asarray(target - self.law.E, float)
        present = height > -np.inf
        reachable = (gap > 0) & (~present | (slope > 0)).all(axis=0) & present.any(axis=0)
        log_gap = np.log(np.where(reachable, gap, 1))
        height = np.where(present, height, -1e300)
        slope = np.where(slope > 0, slope, 1)
        low = ((height - log_gap) / slope).max(axis=0)
        high = ((height - log_gap + np.log(2)) / slope).max(axis=0)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            above = np.logaddexp(*(height - slope * middle)) > log_gap
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return np.where(reachable, (low + high) / 2, np.inf)


def exp(log: np.ndarray | float) -> np.ndarray:
    """What a logarithm is of, infinite beyond what a float holds: a law may be carried as far as anyone asks."""
    with np.errstate(over="ignore"):
        return np.exp(log)


def years(log_c: np.ndarray, log_start: float, growth: float) -> np.ndarray:
    """Until compute of exp(log_start) FLOPs, growing `growth` > 1 times a year, reaches C; 0 where it does now."""
    return np.maximum((log_c - log_start) / np.log(growth), 0)


def through(x: np.ndarray, values: np.ndarray, at: float) -> np.ndarray:
    """The straight line by least squares through `values` [.., R] over x [R], R > 1, at one place: [..].

    inf where one of its values is.
    """
    x, values = np.asarray(x, float), np.asarray(values, float)
    offset = x - x.mean()
    known = np.isfinite(values).all(axis=-1)
    finite = np.where(known[..., None], values, 0)
    found = finite.mean(axis=-1) + finite @ offset / (offset**2).sum() * (at - x.mean())
    return np.where(known, found, np.inf)


def interval(draws: np.ndarray, level: float) -> tuple[float, float] | None:
    """The middle `level` of draws [S], where an infinite draw counts as beyond any number; None for too few draws."""
    draws = np.asarray(draws, float)
    if len(draws) < FEWEST_DRAWS:
        return None
    tail = (1 - level) / 2
    low, high = (_quantile(np.sort(draws), q) for q in (tail, 1 - tail))
    return low, high


def _quantile(ordered: np.ndarray, q: float) -> float:
    """Between two neighbours by a straight line; where one is infinite, the nearer of the two."""
    place = q * (len(ordered) - 1)
    below, above = ordered[int(np.floor(place))], ordered[int(np.ceil(place))]
    share = place - np.floor(place)
    if np.isfinite(below) and np.isfinite(above):
        return float(below + share * (above - below))
    return float(above if share >= 0.5 else below)
