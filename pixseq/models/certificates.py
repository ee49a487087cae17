"""What every family's certificates share: one measured property of a model each, with its figure.

A family's own are in igpt_checks.py and aim_checks.py: `certify(net, x, generator, close)` yields them, computed on a
few images x as the model takes them, in float32 or under autocast in bf16: `close` is what rounding may then move.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

CLOSE = {"fp32": 1e-4, "bf16": 3e-2}  # of the largest output: what sums in another order differ by
STILL = 1e-6  # of the largest output: what may not depend on an input does not move


@dataclass(frozen=True)
class Check:
    """`figure` is what was measured, `about` says what it must be."""

    name: str
    ok: bool
    figure: float | int | str
    about: str


def some_positions(total: int, generator: torch.Generator) -> Iterator[int]:
    """The ends, the middle and some positions between."""
    some = torch.randint(total, (4,), generator=generator).tolist()
    yield from sorted({0, 1 % total, total // 2, max(total - 2, 0), total - 1, *some})


def moves(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """How far outputs lie apart, each; infinitely where one is no number, which no comparison would find."""
    return (after - before).abs().nan_to_num(torch.inf, torch.inf)
