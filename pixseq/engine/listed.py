"""Options that are lists of numbers: text as "0,4,8" on a command line, or a list from Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from pixseq.errors import UsageError

N = TypeVar("N", int, float)


def listed_layers(name: str, layers: str | Sequence[int]) -> list[int] | None:
    """Layer numbers, ascending, each once; None for "all". Raises UsageError for what is no list of numbers."""
    return None if layers == "all" else _listed(name, layers, int, "all, or for example 0,4,8")


def positive_numbers(name: str, values: str | Sequence[float], example: str, why: str) -> list[float]:
    """Numbers above 0, ascending, each once. Raises UsageError for anything else."""
    numbers = _listed(name, values, float, f"for example {example}")
    if not numbers or not all(0 < value < math.inf for value in numbers):
        raise UsageError(f"{name} {values!r} must hold positive numbers", why)
    return numbers


def inverse_strengths(name: str, values: str | Sequence[float]) -> list[float]:
    """The C's of a logistic regression. Raises UsageError where one cannot be used."""
    return positive_numbers(name, values, "0.01,0.1,1", "C is the inverse strength of regularisation")


def _listed(name: str, values: str | Sequence[N], number: Callable[[str | N], N], hint: str) -> list[N]:
    try:
        return sorted({number(part) for part in (values.split(",") if isinstance(values, str) else values)})
    except ValueError:
        raise UsageError(f"{name} {values!r} is no list of numbers", hint) from None
