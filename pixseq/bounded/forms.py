"""What a value by a stranger must be made of, told by the first place where it is not: `fits[2].draws.E[4] is 'x'`.

A form is a function of a value and the name of its place; it returns what is wrong there, or None. JSON has been
parsed before, and bounded (structure.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pixseq.errors import PixseqError

Form = Callable[[Any, str], str | None]

EXACT = 1 << 53  # whole numbers beyond it are no floats, and numpy computes with them as objects
SHOWN = 60  # characters of a value


def require(value: Any, form: Form, path: object, hint: str) -> None:
    """Raises PixseqError with `hint` where a value in the file or folder `path` is not of a form."""
    wrong = form(value, "")
    if wrong is not None:
        raise PixseqError(f"{path}: {wrong}", hint)


def _form(holds: Callable[[Any], bool], words: str) -> Form:
    return lambda value, place: None if holds(value) else f"{place} is {repr(value)[:SHOWN]}, not {words}"


def is_number(value: Any) -> bool:
    """One that can be counted with: a float, or a whole number that is one."""
    return isinstance(value, float) or (type(value) is int and abs(value) <= EXACT)


number = _form(is_number, "a number")
positive = _form(lambda value: is_number(value) and value > 0, "a positive number")
text = _form(lambda value: isinstance(value, str), "text")


def whole(low: int, high: int) -> Form:
    """A whole number from `low` to `high`."""
    words = f"a whole number from {low} to {high}"
    return _form(lambda value: type(value) is int and low <= value <= high, words)


def between(low: float, high: float) -> Form:
    """A number above `low` and below `high`."""
    return _form(lambda value: is_number(value) and low < value < high, f"a number between {low} and {high}")


def one_of(*words: str) -> Form:
    return _form(lambda value: isinstance(value, str) and value in words, " or ".join(words))


def maybe(form: Form) -> Form:
    """Null, or of a form."""
    return lambda value, place: None if value is None else form(value, place)


def several(form: Form, least: int = 0) -> Form:
    """A list, every one of a form."""

    def wrong(value: Any, place: str) -> str | None:
        if not isinstance(value, list) or len(value) < least:
            return f"{place} is {repr(value)[:SHOWN]}, not a list{f' of {least} or more' if least else ''}"
        return next((fault for i, one in enumerate(value) if (fault := form(one, f"{place}[{i}]"))), None)

    return wrong


def each(form: Form) -> Form:
    """Keys of any name, every value of a form."""

    def wrong(value: Any, place: str) -> str | None:
        if not isinstance(value, dict):
            return f"{place} is {repr(value)[:SHOWN]}, not keys and values"
        return next((fault for key, one in value.items() if (fault := form(one, _within(place, key)))), None)

    return wrong


def fields(needed: Mapping[str, Form], beside: Mapping[str, Form] | None = None) -> Form:
    """Keys and values: all of `needed`, and where they are there, those of `beside`; others are anything."""

    def wrong(value: Any, place: str) -> str | None:
        if not isinstance(value, dict):
            return f"{place or 'it'} is {repr(value)[:SHOWN]}, not keys and values"
        missing = [key for key in needed if key not in value]
        if missing:
            return f"{place or 'it'} has no {missing[0]}"
        forms = {**needed, **{key: form for key, form in (beside or {}).items() if key in value}}
        return next((fault for key, form in forms.items() if (fault := form(value[key], _within(place, key)))), None)

    return wrong


def _within(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key
