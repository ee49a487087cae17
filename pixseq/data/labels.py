"""Labels as files hold them, as class numbers: whole numbers of any type, truth values, and texts."""

from __future__ import annotations

import math
from collections.abc import Iterable

from pixseq.text import shown

# What a column, key or member that holds labels is called, the likeliest first.
NAMES = (
    "label", "labels", "fine_label", "fine_labels", "cls", "class", "classes", "target", "targets", "y", "class_id",
    "class_idx", "class_index", "class_label", "label_id", "category", "category_id", "categories",
    "class_name", "label_name", "species",
)  # fmt: skip
WORDS = {"label", "labels", "class", "classes", "cls", "category", "target", "targets", "species"}  # in longer names

Value = int | float | bool | str | None
MOST = (1 << 31) - 1


def is_missing(value: Value) -> bool:
    """Whether a value says that there is no label: none at all, NaN, an empty text, and -1 as held-back labels are."""
    if isinstance(value, str):
        return value.strip() in ("", "-1")
    return value in (None, -1) or (isinstance(value, float) and math.isnan(value))


def names_of(texts: Iterable[str]) -> list[str] | None:
    """The classes of labels that are texts, without blanks around them, sorted; None where all texts are whole numbers,
    which stay numbers.
    """
    found = sorted({text.strip() for text in texts})
    return None if all(text.isascii() and text.isdigit() for text in found) else found


def number(value: Value, classes: dict[str, int] | None) -> int:
    """The class number of a label that is not missing. Raises ValueError for what is no class."""
    if isinstance(value, str):
        if classes is not None:
            return classes[value.strip()]
        value = int(value)
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{value} is no class, which is a whole number or a text")
    if not isinstance(value, int | float):
        raise ValueError(f"{shown(value)[:40]} is no class, which is a whole number or a text")
    if abs(value) > MOST:
        raise ValueError(f"{value} is no class, which is a whole number from 0 to {MOST:,}, or a text")
    return int(value)
