"""The pages of a column of parquet, by their headers: what each unfolds to, before pyarrow takes the memory.

A header is a struct in Thrift's compact protocol: fields 1 to 3 are the page's type and its size unfolded and packed.
A page of a dictionary may be small and its one value large, and every row of the column that value again.

Where the pages lie is told by the footer, a struct too. It is read here as well: pyarrow's own view of a column chunk
ends the process where its statistics do not fit its levels.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from pixseq.bounded.files import open_regular

MOST_PAGE, FOLDED = 1 << 27, 64  # bytes of a page, unless it has so many times less packed: pictures do not shrink
DICTIONARY = 2  # the type of such a page
MOST_BATCH = 1 << 27  # ... and of the rows that are held at a time
MOST_FOOTER = 1 << 26  # bytes
HEAD = 1 << 16  # bytes: a header holds statistics, which are cut to little
DEEPEST = 16

# Which fields are kept, by their numbers. Of a page: see above; 5 and 8 are data pages of both versions, their 1 the
# number of values. Of a footer: row groups (4), column chunks (1), what is told of one (3): its path, its bytes, and
# where its data and its dictionary begin.
Wanted = Mapping[int, "Wanted"]
PAGE: Wanted = {1: {}, 2: {}, 3: {}, 5: {1: {}}, 8: {1: {}}}
FOOTER: Wanted = {4: {1: {3: {3: {}, 7: {}, 9: {}, 11: {}}}}}


def rows_at_once(path: str | Path, columns: Collection[str], most: int, group: int | None = None) -> int:
    """How many rows of columns are surely held in MOST_BATCH, 1 to `most`; of one row group, or of all.

    Raises ValueError for a page that is too large, and for headers that are none.
    """
    row = 1
    for chunk in _chunks(path, columns, group):
        for page in _pages(path, chunk):
            if page.unfolded > MOST_PAGE and page.unfolded > FOLDED * page.packed:
                raise ValueError(f"it holds a page that unfolds from {page.packed:,} to {page.unfolded:,} bytes")
            row = max(row, page.unfolded // (1 if page.kind == DICTIONARY else max(page.values, 1)))
    return max(min(MOST_BATCH // row, most), 1)


class Chunk(NamedTuple):
    """Where the pages of a column lie in a row group."""

    start: int
    end: int


def _chunks(path: str | Path, columns: Collection[str], group: int | None) -> list[Chunk]:
    """Those of the top-level columns, and of what lies inside them. Raises ValueError."""
    status = os.stat(path)
    groups = _row_groups(path, status.st_size, status.st_mtime_ns)
    found = []
    for each in groups[slice(None) if group is None else slice(group, group + 1)]:
        for column in _listed(each.get(1)):
            told = column.get(3)
            if not isinstance(told, dict):
                raise ValueError("a column in it is told nothing of")
            names: Any
            names, bytes_, *starts = (told.get(field) for field in (3, 7, 9, 11))
            begun = [start for start in starts if start is not None]
            if not isinstance(names, list) or not all(isinstance(n, int) and n >= 0 for n in (bytes_, *begun)):
                raise ValueError("a column in it has no place")
            if names and names[0] in {name.encode() for name in columns}:
                found.append(Chunk(min(begun), min(begun) + bytes_))
    return found


@lru_cache(maxsize=1)  # readers come for one row group after the other
def _row_groups(path: str | Path, size: int, changed: int) -> list[Any]:
    """What the footer of a file of that size, `changed` when, tells of its row groups."""
    with open_regular(path) as file:
        file.seek(max(size - 8, 0))
        tail = file.read(8)
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != b"PAR1" or length > min(size - 8, MOST_FOOTER):
            raise ValueError("it has no footer that can be read")
        file.seek(size - 8 - length)
        return _listed(PageHeader(file.read(length)).struct(FOOTER).get(4))


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ValueError("its footer lists no row groups and columns")
    return value


class Page(NamedTuple):
    """Its type, its bytes unfolded and packed, and how many values it holds; 0: not told."""

    kind: int
    unfolded: int
    packed: int
    values: int


def _pages(path: str | Path, chunk: Chunk) -> Iterator[Page]:
    at = chunk.start
    with open_regular(path) as file:
        while at < chunk.end:
            file.seek(at)
            header = PageHeader(file.read(HEAD))
            page = header.page()
            yield page
            at += header.at + page.packed


class PageHeader:
    """Reads forward through one struct; `at` is where it ends. Whatever is wrong with it is a ValueError."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def page(self) -> Page:
        found = self.struct(PAGE)
        kind: Any
        unfolded: Any
        packed: Any
        kind, unfolded, packed = (found.get(field) for field in (1, 2, 3))
        if not all(isinstance(n, int) and n >= 0 for n in (kind, unfolded, packed)):
            raise ValueError("a page in it has no sizes")
        about = found.get(5) or found.get(8)  # data pages of both versions
        values = about.get(1) if isinstance(about, dict) else None
        return Page(kind, unfolded, packed, values if isinstance(values, int) else 0)

    def _byte(self) -> int:
        if self.at >= len(self.data):
            raise ValueError("a page in it is cut short")
        self.at += 1
        return self.data[self.at - 1]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number in it has no end")

    def _signed(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)

    def struct(self, wanted: Wanted, depth: int = 0) -> dict[int, Any]:
        """Its wanted fields by number: whole numbers, texts as bytes, lists and structs."""
        if depth > DEEPEST:
            raise ValueError("a struct in it is nested without end")
        fields, number = {}, 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            value = self._value(head & 15, wanted.get(number), depth)
            if number in wanted:
                fields[number] = value
        return fields

    def _value(self, kind: int, wanted: Wanted | None, depth: int) -> Any:
        if kind in (1, 2):  # a truth value is in its type
            return None
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 12:
            return self.struct(wanted or {}, depth + 1)
        if kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            each = 3 if head & 15 in (1, 2) else head & 15
            values = (self._value(each, wanted, depth + 1) for _ in range(count))
            if wanted is not None:
                return list(values)
            for _ in values:
                pass
            return None
        if kind not in (3, 7, 8):
            raise ValueError("a struct in it has a field of no known type")
        length = {3: 1, 7: 8}.get(kind) or self._varint()
        self.at += length
        return self.data[self.at - length : self.at] if wanted is not None else None
