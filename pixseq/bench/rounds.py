"""Timing in turns, and what the times say: medians, spreads, ratios, and whether the machine was calm."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

RESTLESS_SPREAD = 0.25  # of one work's rounds: calm machines stay within a few hundredths
RESTLESS_LOAD = 0.35  # jobs a core


def interleaved(
    calls: Sequence[Callable[[], object]], rounds: int, seconds: float, settle: Callable[[], None] = lambda: None
) -> list[list[float]]:
    """The seconds of each call in every round; in a round each is called once, so that what troubles the machine
    troubles all alike. The calls have been warmed up. No round begins after `seconds`, and one is always done.
    `settle` waits for a device.
    """
    times: list[list[float]] = [[] for _ in calls]
    began = time.perf_counter()
    for number in range(rounds):
        if number and time.perf_counter() - began > seconds:
            break
        for call, taken in zip(calls, times):
            started = time.perf_counter()
            call()
            settle()
            taken.append(time.perf_counter() - started)
    return times


def spread(times: Sequence[float]) -> float:
    """From the fastest to the slowest round, as a part of the median."""
    return (max(times) - min(times)) / statistics.median(times)


def ratio(times: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as long as ours: the median over rounds, in each of which both were timed."""
    return statistics.median(a / b for a, b in zip(times, ours, strict=True))


def unrest(load: float, cores: int, spreads: Mapping[str, float]) -> list[str]:
    """Why figures of this run are not to be trusted, if they are not.

    `load`: the average of the minute before, in jobs; `spreads` are by the names of works.
    """
    reasons = []
    if load > RESTLESS_LOAD * cores:
        reasons.append(f"before it began, {load:.1f} jobs were running on {cores} cores")
    far = {name: value for name, value in spreads.items() if value > RESTLESS_SPREAD}
    if far:
        worst = max(far, key=far.__getitem__)
        reasons.append(f"rounds of {len(far)} of {len(spreads)} rows differ, of {worst} by {100 * far[worst]:.0f} %")
    return reasons
