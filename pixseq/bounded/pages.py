"""The pages of a column of parquet, by their headers: what each unfolds to, before pyarrow takes the memory.

A header is a struct in Thrift's compact protocol: fields 1 to 3 are the page's type and its size unfolded and packed.
A page of a dictionary may be small and its one value large, and every row of the column that value again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pixseq.bounded.files import open_regular

MOST_PAGE, FOLDED = 1 << 27, 64  # bytes of a page, unless it has so many times less packed: pictures do not shrink
DICTIONARY = 2  # the type of such a page
MOST_BATCH = 1 << 27  # ... and of the rows that are held at a time
HEAD = 1 << 16  # bytes: a header holds statistics, which are cut to little
DEEPEST = 8


def rows_at_once(path: str | Path, columns: list[Any], most: int) -> int:
    """How many rows of the column chunks (pyarrow's metadata of them) are surely held in MOST_BATCH, 1 to `most`.

    Raises ValueError for a page that is too large, and for headers that are none.
    """
    row = 1
    for column in columns:
        for page in _pages(path, column):
            if page.unfolded > MOST_PAGE and page.unfolded > FOLDED * page.packed:
                raise ValueError(f"it holds a page that unfolds from {page.packed:,} to {page.unfolded:,} bytes")
            row = max(row, page.unfolded // (1 if page.kind == DICTIONARY else max(page.values, 1)))
    return max(min(MOST_BATCH // row, most), 1)


class Page(NamedTuple):
    """Its type, its bytes unfolded and packed, and how many values it holds; 0: not told."""

    kind: int
    unfolded: int
    packed: int
    values: int


def _pages(path: str | Path, column: Any) -> Iterator[Page]:
    starts = [column.data_page_offset, column.dictionary_page_offset if column.has_dictionary_page else None]
    at = min(start for start in starts if start is not None)
    end = at + column.total_compressed_size
    with open_regular(path) as file:
        while at < end:
            file.seek(at)
            header = Header(file.read(HEAD))
            page = header.page()
            yield page
            at += header.at + page.packed


class Header:
    """Reads forward through one header; `at` is where it ends. Whatever is wrong with it is a ValueError."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def page(self) -> Page:
        found = self._struct(0)
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

    def _struct(self, depth: int) -> dict[int, Any]:
        """Its fields by number: whole numbers and structs."""
        if depth > DEEPEST:
            raise ValueError("a page in it is nested without end")
        fields, number = {}, 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            fields[number] = self._value(head & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):  # a truth value is in its type
            return None
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 12:
            return self._struct(depth + 1)
        if kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            for _ in range(count):
                self._value(3 if head & 15 in (1, 2) else head & 15, depth + 1)
        elif kind in (3, 7, 8):
            length = {3: 1, 7: 8}.get(kind) or self._varint()
            self.at += length
        else:
            raise ValueError("a page in it has a field of no known type")
        return None
