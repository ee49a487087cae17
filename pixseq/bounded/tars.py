"""Tars of which no header takes more memory than a header needs: tarfile reads long names and pax records whole."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Self

from pixseq.bounded.files import open_regular

MOST_HEADER = 1 << 18  # bytes of a long name or of records about a member
HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class TarMember(tarfile.TarInfo):
    """Refuses headers that are longer than any use, and holes, which are no files of data sets."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        found = super().frombuf(buf, encoding, errors)
        if found.type in HEADERS and found.size > MOST_HEADER:
            raise tarfile.ReadError(f"a header in it declares {found.size:,} bytes")
        if found.size < 0:
            raise tarfile.ReadError(f"a member declares {found.size} bytes")
        if found.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(f"{found.name} is stored with holes, which are not read: pack it without --sparse")
        return found

    def _proc_gnusparse_00(self, *args: object) -> None:
        raise tarfile.ReadError(f"{self.name} is stored with holes, which are not read: pack it without --sparse")

    _proc_gnusparse_01 = _proc_gnusparse_10 = _proc_gnusparse_00


@contextmanager
def open_tar(path: str | Path, mode: Literal["r:", "r:*", "r|*"]) -> Iterator[tarfile.TarFile]:
    """A tar to read, by one of tarfile's modes. Raises what tarfile raises."""
    with open_regular(path) as file, tarfile.open(fileobj=file, mode=mode, tarinfo=TarMember) as tar:
        yield tar
