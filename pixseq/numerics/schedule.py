"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int, schedule: str) -> float:
    """Linear warm-up to `peak`, then "cosine" to zero at `steps`, or "constant" (paper §3.4, appendix A.1)."""
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return peak
    done = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def warmup_steps(steps: int, steps_per_epoch: float, epochs: float | None, fraction: float) -> int:
    """`epochs` of warm-up, but at most `fraction` of the run; epochs None: that fraction."""
    longest = fraction * steps
    return int(longest if epochs is None else min(epochs * steps_per_epoch, longest))
