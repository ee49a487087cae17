"""Dataclasses as schemas: filled from mappings that strangers wrote, by their fields' types, ranges and names.

Every key is known, every value of its type and range, or UsageError says which is not, with a guess at what was meant.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from pixseq.bounded.forms import EXACT
from pixseq.errors import UsageError, guess

BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
PLAIN_NUMBER = r"[-+]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][-+]?[0-9]+)?"


@dataclass(frozen=True)
class Range:
    """What a number of a configuration may be; NaN and infinity never."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        bounds = dataclasses.asdict(self).items()
        return " and ".join(f"{name.replace('_', ' ')} {bound:,}" for name, bound in bounds if bound is not None)


class Typed(str):
    """A value typed on the command line: the field's type reads it, so that 3e-4 is a number there."""


def filled(kind: type, values: Any, place: str = "", others: Mapping[str, type] | None = None) -> Any:
    """The dataclass `kind` of a mapping; `place` stands before its keys, `others` are what its section may be instead.

    Raises UsageError for a key that it has not, or a value of another type. Ranges are looked at by check_ranges.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"{place.rstrip('.')} is {values!r}, not a section", "write its keys below it, indented")
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}
    found = {}
    for key, value in values.items():
        if key not in known:
            raise _unknown(str(key), kind, place, others or {})
        kinds, several = _sections(hints[key]), _tuple_of(hints[key], value)
        if several:
            found[key] = _several(several, value, f"{place}{key}")
        elif kinds:
            found[key] = _section(kinds, value, f"{place}{key}.")
        else:
            found[key] = _typed(hints[key], value, f"{place}{key}")
    for f in dataclasses.fields(kind):
        if f.name not in found and f.default is f.default_factory is dataclasses.MISSING:
            raise UsageError(f"{place}{f.name} is not given", f"keys here: {', '.join(sorted(known))}")
    return kind(**found)


def check_ranges(config: Any, place: str = "") -> None:
    """Raises UsageError for a value of this section outside the range that stands beside its field."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for key in (f.name for f in dataclasses.fields(config)):
        value, allowed = getattr(config, key), _range(hints[key])
        for each in value if isinstance(value, tuple) else [value]:
            if allowed and each is not None and not allowed.holds(each):
                finite = "" if math.isfinite(each) else "finite, "
                raise UsageError(f"{place}{key} is {each}, it must be {finite}{allowed}")


def sections(config: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """A dataclass and all that it holds, each with what stands before its keys, the inner ones first."""
    for key in (f.name for f in dataclasses.fields(config)):
        value = getattr(config, key)
        for each in value if isinstance(value, tuple) else [value]:
            if dataclasses.is_dataclass(each):
                yield from sections(each, f"{place}{key}.")
    yield place, config


def _range(hint: Any) -> Range | None:
    """The range of a field of that type, be it optional or one of several."""
    if typing.get_origin(hint) is Annotated:
        return next((each for each in hint.__metadata__ if isinstance(each, Range)), None)
    return next((found for each in typing.get_args(hint) if (found := _range(each))), None)


def _unknown(key: str, kind: Any, place: str, others: Mapping[str, type]) -> UsageError:
    """Of a key that a section of `kind` has not; one of another kind that it might have been is told as such."""
    known = {f.name for f in dataclasses.fields(kind)}
    listed = f"keys here: {', '.join(sorted(known))}"
    theirs = [name for name, each in others.items() if key in {f.name for f in dataclasses.fields(each)}]
    if theirs:
        what = f"{place}{key} is of models of family {theirs[0]}, and this one is of {kind.family}"
        return UsageError(what, kind.instead.get(key, f"leave it out; {listed}"))
    return UsageError(f"unknown key {place}{key}", f"{guess(key, known)}{listed}")


def _tuple_of(hint: Any, value: Any) -> Any:
    """The type of what a tuple holds; None where `hint` is no tuple, or may be none and `value` is."""
    hints = [hint, *(typing.get_args(hint) if value is not None else ())]
    found = [each for each in hints if typing.get_origin(each) is tuple]
    return typing.get_args(found[0])[0] if found else None


def _several(kind: Any, value: Any, key: str) -> tuple:
    """One or more of `kind`: a list, one alone, or the two ends of a range of numbers."""
    if isinstance(value, dict) and value.keys() == {"from", "to"}:
        value = [value["from"], value["to"]]
    values = value if isinstance(value, list) else [value]
    if not values:
        raise UsageError(f"{key} is empty", "name at least one")
    if dataclasses.is_dataclass(kind):
        return tuple(filled(cast(type, kind), each, f"{key}.") for each in values)
    return tuple(_typed(kind, each, key) for each in values)


def _sections(hint: Any) -> dict[str, type]:
    """The dataclasses that a section may be, by their `family` where there are several; none for a plain value."""
    kinds = [
        kind for kind in typing.get_args(hint) or [hint] if isinstance(kind, type) and dataclasses.is_dataclass(kind)
    ]
    return {getattr(kind, "family", ""): kind for kind in kinds}


def _section(kinds: Mapping[str, type], value: Any, place: str) -> Any:
    """A section of the kind that its `family` tells, the first one where it tells none."""
    usual = next(iter(kinds))
    if isinstance(value, str):
        value = getattr(kinds[usual], "words", {}).get(value, value)
    if value is None:
        value = {}
    family = usual
    if len(kinds) > 1 and isinstance(value, Mapping):
        family = str(value.get("family", usual))
        value = {key: each for key, each in value.items() if key != "family"}
    if family not in kinds:
        known = ", ".join(sorted(kinds))
        raise UsageError(f"{place}family is {family!r}", f"{guess(family, kinds)}one of: {known}")
    return filled(kinds[family], value, place, {name: kind for name, kind in kinds.items() if name != family})


def _whole(value: Any) -> int | None:
    """1e3, 1.5e2 and 100.0 as the whole numbers that they plainly are; None for all else."""
    if isinstance(value, str) and re.fullmatch(PLAIN_NUMBER, value.strip()) and re.search("[.eE]", value):
        value = float(value)
    exact = isinstance(value, float) and value.is_integer() and abs(value) <= EXACT
    return int(value) if exact else None


def _typed(hint: Any, value: Any, key: str) -> Any:
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value in choices:
            return str(value)
        raise UsageError(f"{key} is {value!r}", f"{guess(str(value), choices)}one of: {', '.join(choices)}")
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None or value == "null":
            return None
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if hint is str and isinstance(value, str):
        return str(value)
    if hint is bool:
        if isinstance(value, bool) or (isinstance(value, str) and value.lower() in BOOLS):
            return BOOLS[str(value).lower()]
        raise UsageError(f"{key} is {value!r}, not true or false")
    if isinstance(value, Typed) and hint in (int, float):
        try:
            return hint(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, str) and re.fullmatch(PLAIN_NUMBER, value.strip()):
        return float(value)  # YAML 1.1 reads 1e-3, which has no decimal point, as text
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is int and (whole := _whole(value)) is not None:
        return whole
    wanted = {int: "a whole number", float: "a number", str: "text"}[hint]
    quoted = ": write it in quotes" if hint is str and not isinstance(value, dict | list) else ""
    if hint is str and isinstance(value, list) and all(isinstance(each, str | int | float) for each in value):
        quoted = f": '{','.join(map(str, value))}'"
    raise UsageError(f"{key} is {value!r}, not {wanted}", f"it must be {wanted}{quoted}")
