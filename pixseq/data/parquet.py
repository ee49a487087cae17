"""Hugging Face parquet: shards with a column of pictures, and one of labels; which ones is in parquet_columns.py.

pyarrow is an extra. Only the two columns are read, from one row group at a time; that of the labels also once on
opening, to know the classes of texts and how many rows have none. Pictures may be paths, below the file's folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from pixseq.bounded.pages import rows_at_once
from pixseq.data.labels import Value, is_missing, names_of, number
from pixseq.data.parquet_columns import Columns, find_columns
from pixseq.data.records import ImageFile, Source, Wanted, reading, spans
from pixseq.data.shards import shards_of_split
from pixseq.errors import PixseqError
from pixseq.text import shown

FREE_ROWS = 1 << 20  # beside one a byte: a row with a picture takes more
ROWS = 256  # of a row group held at a time
LABEL_ROWS = 1 << 16  # where only labels are read


@dataclass(frozen=True)
class ColumnLabels:
    """What a column of labels holds. `classes` numbers its texts, None where it holds numbers."""

    names: list[str] | None
    classes: dict[str, int] | None
    notes: list[str]


def open_parquet(path: Path, wanted: Wanted, files: list[Path]) -> Source:
    """Raises PixseqError without pyarrow, and where it is not clear which column is the picture or the label."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise PixseqError(f"{shown(path)} is parquet, and pyarrow is not installed", "pip install pyarrow") from None

    of_all_splits = files
    split, files, notes = shards_of_split(path, files, wanted)
    groups: list[tuple[Path, int, int]] = []  # file, row group, number of its first row in the file
    counts: list[int] = []
    schema = None
    for file in files:
        with reading(file):
            shard = pq.ParquetFile(file)
        if schema is not None and shard.schema_arrow.names != schema.names:
            raise PixseqError(f"{shown(file)} has other columns than {shown(files[0])}", "name shards of one set")
        schema = shard.schema_arrow
        rows = 0
        for group in range(shard.metadata.num_row_groups):
            groups.append((file, group, rows))
            counts.append(shard.metadata.row_group(group).num_rows)
            rows += counts[-1]
    if not sum(counts):
        raise PixseqError(f"{shown(path)} has no rows")
    most = FREE_ROWS + sum(file.stat().st_size for file in files)
    if not 0 < sum(counts) <= most or min(counts) < 0:
        raise PixseqError(
            f"{shown(path)} is damaged: it declares {sum(counts):,} rows, more than its bytes can hold",
            "copy or download it again",
        )
    columns = find_columns(files[0], schema, wanted)
    labels = _survey(columns, files, of_all_splits, wanted.skip)
    why = columns.why
    if columns.label and labels is None:
        why = f"all {sum(counts)} rows of {columns.why} are empty or -1"

    def read(start: int, stop: int | None) -> Iterator[ImageFile]:
        label, classes = columns.label if labels else None, labels.classes if labels else None
        asked = ((*groups[which], low, high) for which, low, high in spans(counts, start, stop))
        for file, of_file in groupby(asked, lambda each: each[0]):
            for row, picture, value in _rows(file, (each[1:] for each in of_file), columns.image, label):
                target = None if label is None or is_missing(value) else number(value, classes)
                name = f"{file}, row {row}"
                data = _data(name, picture, file.parent, wanted.skip)
                beside = f" ({os.path.relpath(data, file.parent)})" if isinstance(data, str) else ""
                yield ImageFile(name + beside, data, target)

    names, has_labels = labels.names if labels else None, labels is not None
    notes += labels.notes if labels else []
    column = columns.label
    known = None if labels is None or column is None else lambda: _classes(files, column)
    return Source("parquet", str(path), split, sum(counts), names, has_labels, read, notes, known, True, why, files)


def _rows(
    file: Path, groups: Iterable[tuple[int, int, int, int]], image: str, label: str | None
) -> Iterator[tuple[int, Any, Value]]:
    """The number of a row in a file, its picture and its label, of `groups`: a row group, the number of its first row,
    and from which of its rows to which.
    """
    import pyarrow.parquet as pq

    columns = [image, *([label] if label else [])]
    with reading(file), pq.ParquetFile(file) as shard:
        for group, first, low, high in groups:
            rows, row = rows_at_once(file, columns, ROWS, group), first
            for batch in shard.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
                pictures = batch.column(image).to_pylist()
                values = batch.column(label).to_pylist() if label else [None] * len(pictures)
                for picture, value in zip(pictures, values):
                    if low <= row - first < high:
                        yield row, picture, value
                    row += 1


def _classes(files: list[Path], label: str) -> np.ndarray:
    """Numbers that tell the classes of all rows apart, of labels of any type; -1 for none."""
    numbers: dict[Value, int] = {None: -1}
    values = (value for file in files for value in _values(file, label))
    return np.fromiter((numbers.setdefault(value, len(numbers) - 1) for value in values), np.int64)


# ------------------------------------------------------------------------------------------------------------ labels


def _survey(columns: Columns, files: list[Path], of_all_splits: list[Path], skip: bool) -> ColumnLabels | None:
    """What the column of labels holds; None where there is none, or no row has a label.

    Texts are numbered over all splits, so that a class that one of them lacks shifts no label. Raises PixseqError for
    values that are no classes, and, unless `skip`, for rows without a label.
    """
    if columns.label is None:
        return None
    values, missing, first, rows = set(), 0, None, 0
    for file in files:
        for row, value in enumerate(_values(file, columns.label)):
            rows += 1
            if is_missing(value):
                missing, first = missing + 1, first or (file, row)
            else:
                values.add(value)
    if not values:
        return None
    classes, names = None, columns.names
    if any(isinstance(value, str) for value in values):
        elsewhere = [file for file in of_all_splits if file not in files]
        values |= {v for file in elsewhere for v in _values(file, columns.label) if not is_missing(v)}
        names = names_of(map(str, values))
        classes = {name: i for i, name in enumerate(names)} if names else None
        names = [shown(name) for name in names] if names else None
    for value in values:
        try:
            number(value, classes)
        except ValueError as error:
            raise PixseqError(
                f"{shown(files[0])}, column {shown(columns.label)}: {error}",
                "choose another with --label-column NAME, or read no labels with --label-column none",
            ) from None
    if not missing:
        return ColumnLabels(names, classes, [])
    assert first is not None  # one at least is missing
    file, row = first
    said = f"{shown(file)}, row {row} has no label: {missing} of {rows} rows of {columns.why} are empty or -1"
    if skip:
        return ColumnLabels(names, classes, [f"{said}; they are passed over"])
    raise PixseqError(said, "pass over such rows with --on-error skip, or read no labels with --label-column none")


def _values(file: Path, column: str) -> Iterator[Value]:
    """A column of labels; nothing where another split's files do not have it."""
    import pyarrow.parquet as pq

    with reading(file), pq.ParquetFile(file) as shard:
        if column not in shard.schema_arrow.names:
            return
        rows = rows_at_once(file, [column], LABEL_ROWS)
        for batch in shard.iter_batches(rows, columns=[column], use_threads=False):
            yield from batch.column(column).to_pylist()


# ---------------------------------------------------------------------------------------------------------- pictures


def _data(name: str, picture: Any, folder: Path, skip: bool) -> bytes | str:
    """The bytes of a picture, or the path of its file. A missing one is empty: --on-error decides about it."""
    if isinstance(picture, list):
        if len(picture) > 1 and not skip:
            raise PixseqError(
                f"{shown(name)} has {len(picture)} pictures, where one is meant",
                "pass over such rows with --on-error skip",
            )
        picture = picture[0] if len(picture) == 1 else None
    if isinstance(picture, dict):
        picture = picture.get("bytes") or picture.get("path")
    return _below(name, picture, folder) if isinstance(picture, str) and picture else picture or b""


def _below(name: str, path: str, folder: Path) -> str:
    """A path as a parquet file gives it: of a picture below the file's own folder, whatever it says."""
    parts = PurePath(path)
    if parts.is_absolute() or ".." in parts.parts or "://" in path:
        raise PixseqError(
            f"{shown(name)} points to {shown(path)}, outside the parquet file's folder",
            "only pictures below that folder are read: lay them there and give relative paths, or store the bytes",
        )
    return os.path.join(folder, path)
