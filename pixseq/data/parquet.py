"""Hugging Face parquet: shards with an image column of struct{bytes, path}, and a label column of ClassLabel.

pyarrow is an extra. Only the two columns are read, from one row group at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pixseq.data.records import Encoded, Source, parts, reading, shards_of_split, shown
from pixseq.errors import PixseqError

ROWS = 256  # of a row group held at a time
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")


def open_parquet(path: Path, wanted: str, files: list[Path]) -> Source:
    """Raises PixseqError without pyarrow, and where it is not clear which column is the picture or the label."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise PixseqError(
            f"{shown(path)} is parquet, and pyarrow is not installed", "pip install 'pixseq[parquet]'"
        ) from None

    split, files = shards_of_split(path, files, wanted)
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
    image, label, class_names = _columns(files[0], schema)

    def read(start: int, stop: int | None) -> Iterator[Encoded]:
        for which, low, high in parts(counts, start, stop):
            file, group, first = groups[which]
            for row, (picture, target) in enumerate(_rows(file, group, image, label)):
                if low <= row < high:
                    if label and target is None:
                        raise PixseqError(f"{shown(file)}, row {first + row} has no label", "label all rows or none")
                    # A missing picture is an empty one: --on-error decides about it like about any other.
                    data = (picture.get("bytes") if isinstance(picture, dict) else picture) or b""
                    yield Encoded(f"{file}, row {first + row}", data, target)

    file, group, _ = groups[next(i for i, n in enumerate(counts) if n)]
    if label and next(_rows(file, group, image, label))[1] in (None, -1):
        label = class_names = None  # test sets whose labels are held back carry -1
    known = (lambda: _classes(files, label)) if label else None
    return Source("parquet", str(path), split, sum(counts), class_names, bool(label), read, labels=known, seeks=True)


def _rows(file: Path, group: int, image: str, label: str | None) -> Iterator[tuple[Any, int | None]]:
    import pyarrow.parquet as pq

    with reading(file), pq.ParquetFile(file) as shard:
        columns = [image, *([label] if label else [])]
        for batch in shard.iter_batches(ROWS, row_groups=[group], columns=columns, use_threads=False):
            pictures = batch.column(image).to_pylist()
            yield from zip(pictures, batch.column(label).to_pylist() if label else [None] * len(pictures))


def _classes(files: list[Path], label: str) -> np.ndarray:
    """Numbers that tell the classes of all rows apart, of labels of any type; -1 for none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = []
    for file in files:
        with reading(file), pq.ParquetFile(file) as shard:
            columns += shard.read([label], use_threads=False).column(0).chunks
    return pa.chunked_array(columns).combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy()


def _columns(file: Path, schema: Any) -> tuple[str, str | None, list[str] | None]:
    """The names of the image and label columns, and the class names if Hugging Face's metadata has them."""
    import pyarrow.types as types

    features = {}
    if b"huggingface" in (schema.metadata or {}):
        with reading(file):
            features = json.loads(schema.metadata[b"huggingface"]).get("info", {}).get("features", {})

    def binary(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    def holds_bytes(kind: Any) -> bool:
        return types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and binary(kind.field("bytes").type)

    def is_label(name: str) -> bool:
        return name in LABEL_COLUMNS or features.get(name, {}).get("_type") == "ClassLabel"

    columns = {field.name: field.type for field in schema}
    pictures = [name for name, kind in columns.items() if holds_bytes(kind) or binary(kind)]
    labels = [name for name, kind in columns.items() if types.is_integer(kind) and is_label(name)]
    if not pictures:
        raise PixseqError(
            f"{shown(file)} has no column of pictures: it has {shown(', '.join(columns))}",
            "a picture is binary, or a struct with bytes as Hugging Face writes it",
        )
    image = _the_one(file, "pictures", pictures, IMAGE_COLUMNS)
    label = _the_one(file, "labels", labels, LABEL_COLUMNS) if labels else None
    names = features.get(label, {}).get("names") if label else None
    return image, label, [shown(name) for name in names] if names else None


def _the_one(file: Path, what: str, found: list[str], usual: tuple[str, ...]) -> str:
    if len(found) == 1:
        return found[0]
    for name in usual:
        if name in found:
            return name
    raise PixseqError(
        f"{shown(file)} has several columns of {what}: {shown(', '.join(found))}", f"name the one meant {usual[0]}"
    )
