"""Which column of a parquet file holds the pictures, and which the labels: by type, metadata and name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixseq.bounded.structure import parse_json
from pixseq.data import labels
from pixseq.data.records import Wanted
from pixseq.errors import PixseqError
from pixseq.text import few, shown

IMAGE_COLUMNS = ("image", "img", "images", "picture", "jpg", "png", "jpeg", "webp")
# Texts of such a name are paths of pictures.
PATH_COLUMNS = (
    *IMAGE_COLUMNS, "image_path", "img_path", "image_file", "file_name", "filename", "file_path", "filepath", "path",
    "file",
)  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """The columns to read. `names` are the classes of Hugging Face's metadata; `why` tells of no labels."""

    image: str
    label: str | None
    names: list[str] | None
    why: str


def find_columns(file: Path, schema: Any, wanted: Wanted) -> Columns:
    """Raises PixseqError where it is not clear which column is meant, and where the one asked for is none."""
    features = {}
    if b"huggingface" in (schema.metadata or {}):
        features = _features(schema.metadata[b"huggingface"])
    columns = {field.name: field.type for field in schema}
    image = _image(file, columns)
    if not wanted.labels:
        return Columns(image, None, None, "none were asked for")
    usable = [name for name, kind in columns.items() if name != image and holds_labels(kind)]
    if wanted.label_column is not None:
        if wanted.label_column not in usable:
            raise PixseqError(
                f"{shown(file)} has no labels in a column {shown(wanted.label_column)}",
                f"columns that could hold them: {few(usable) or 'none'}; of all its columns: {few(columns)}",
            )
        label: str | None = wanted.label_column
    else:
        classed = [name for name in usable if features.get(name, {}).get("_type") == "ClassLabel"]
        label = _label(file, usable, classed)
    if label is None:
        others = [name for name in usable if name not in PATH_COLUMNS]
        odd = [f"{name} ({columns[name]})" for name in columns if name.lower() in labels.NAMES and name not in usable]
        if odd:
            return Columns(image, None, None, f"of {few(odd)} no class can be told")
        could = f"; could be: {few(others)} (--label-column NAME)" if others else ""
        return Columns(image, None, None, f"no column is called like labels{could}")
    names = features.get(label, {}).get("names")
    names = names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
    return Columns(image, label, [shown(name) for name in names] if names else None, f"the column {shown(label)}")


def _features(text: bytes) -> dict[str, dict[str, Any]]:
    """What Hugging Face's metadata say of each column; nothing where they are of another form."""
    try:
        found = parse_json(text)
    except ValueError:
        return {}
    for key in ("info", "features"):
        found = found.get(key) if isinstance(found, dict) else None
    return {name: each for name, each in found.items() if isinstance(each, dict)} if isinstance(found, dict) else {}


def _label(file: Path, usable: list[str], classed: list[str]) -> str | None:
    """By its type in Hugging Face's metadata, a usual name, or a usual word in a longer name."""
    for found in (classed, usable):
        for name in labels.NAMES:
            for column in found:
                if column.lower() == name:
                    return column
        if len(found) == 1 and found is classed:
            return found[0]
    spaced = {name: re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower() for name in usable}  # className
    found = classed or [name for name in usable if set(re.split(r"[^a-z]+", spaced[name])) & labels.WORDS]
    if len(found) > 1:
        raise PixseqError(
            f"{shown(file)} has several columns of labels: {few(found)}", "choose one with --label-column NAME"
        )
    return found[0] if found else None


def _image(file: Path, columns: dict[str, Any]) -> str:
    pictures = [name for name, kind in columns.items() if holds_pictures(kind)]
    usual: tuple[str, ...] = IMAGE_COLUMNS
    if not pictures:
        pictures = [name for name, kind in columns.items() if is_text(kind) and name.lower() in PATH_COLUMNS]
        usual = PATH_COLUMNS
    if not pictures:
        raise PixseqError(
            f"{shown(file)} has no column of pictures: it has {shown(', '.join(columns))}",
            "a picture is binary, or a struct with bytes or a path as Hugging Face writes it; a text column of paths "
            f"is called {', '.join(PATH_COLUMNS[:2])}, file_name or path",
        )
    if len(pictures) == 1:
        return pictures[0]
    for name in usual:
        if name in pictures:
            return name
    raise PixseqError(
        f"{shown(file)} has several columns of pictures: {shown(', '.join(pictures))}", "name the one meant image"
    )


# -------------------------------------------------------------------------------------------------------------- types


def holds_pictures(kind: Any) -> bool:
    """Bytes, a struct with bytes or a path, or a list of these."""
    kind = _element(kind)
    return _is_any(kind, "is_binary", "is_large_binary") or _has_bytes(kind)


def _has_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    if not types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    return _is_any(kind.field("bytes").type, "is_binary", "is_large_binary", "is_null")


def holds_labels(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return is_text(kind) or _is_any(kind, "is_integer", "is_boolean", "is_floating", "is_null")


def is_text(kind: Any) -> bool:
    return _is_any(kind, "is_string", "is_large_string")


def _element(kind: Any) -> Any:
    return kind.value_type if _is_any(kind, "is_list", "is_large_list", "is_fixed_size_list") else kind


def _is_any(kind: Any, *names: str) -> bool:
    import pyarrow.types as types

    tests: list[Callable[[Any], bool]] = [getattr(types, name) for name in names]
    return any(test(kind) for test in tests)
