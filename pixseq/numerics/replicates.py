"""Runs that differ in their seed alone: which belong together, and what their spread says of each one's weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np


class Sized(Protocol):
    """What tells whether runs differ in their seed alone; a seed of None: it is not known."""

    @property
    def budget(self) -> float: ...

    @property
    def params(self) -> float: ...

    @property
    def tokens(self) -> float: ...

    @property
    def seed(self) -> int | None: ...


Run = TypeVar("Run", bound=Sized)

PRIOR = 4.0  # degrees of freedom


def by_seed(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in their seed alone stand together; others stand alone."""
    groups: dict[tuple, list[Run]] = {}
    for place, run in enumerate(runs):
        same = (run.budget, run.params, run.tokens)
        key = ("seeds", *same) if run.seed is not None else ("run", place)
        if any(other.seed == run.seed for other in groups.get(key, [])):
            key = ("run", place)  # not another seed: another run that happens to be of this size
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def seed_weights(values: Sequence[np.ndarray]) -> tuple[np.ndarray, float | None]:
    """Weights [n] of the means of groups, from what their seeds measured, and the deviation of one seed, relatively.

    The inverse variance of a mean is the number of its seeds over their variance. Two or three seeds tell a variance
    badly, so a group's own is drawn towards that of all, as if PRIOR more degrees of freedom had that one. Weights
    are in units of their median. Without replicates they are 1, and the deviation is None.
    """
    count = np.array([len(value) for value in values], float)
    own = np.array(
        [np.var(value, ddof=1) / max(value.mean() ** 2, 1e-300) if len(value) > 1 else 0 for value in values]
    )
    freedom = count - 1
    if not (freedom > 0).any():
        return np.ones(len(values)), None
    several = freedom > 0
    # The median of a variance over its expectation, by Wilson and Hilferty; one wild seed does not move it.
    low = (1 - 2 / (9 * freedom[several])) ** 3
    whole = float(np.median(own[several] / low))
    if whole <= 0:
        return count / np.median(count), 0.0
    variance = (PRIOR * whole + freedom * own) / (PRIOR + freedom)
    weight = count / variance
    return weight / np.median(weight), float(np.sqrt(whole))
