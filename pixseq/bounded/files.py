"""Files of which only so much is read, and never one that would make a reader wait: pipes, sockets, devices."""

from __future__ import annotations

import io
import os
import stat
import zipfile
from pathlib import Path
from typing import BinaryIO

from pixseq.errors import PixseqError

FREE, FOLDED = 1 << 26, 64  # bytes of a file: so many times its data, and this
OTHERS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def open_regular(path: str | Path) -> BinaryIO:
    """A file to read. Raises PixseqError for what is no file, without waiting for it, and OSError."""
    return open(_opened(path)[0], "rb")


def open_small(path: str | Path, most: int) -> BinaryIO:
    """The same, in memory if it has at most `most` bytes: read in one call, where a stream takes several."""
    handle, size = _opened(path)
    if size > most:
        return open(handle, "rb")
    try:
        data = os.read(handle, size)
        while len(data) < size and (more := os.read(handle, size - len(data))):  # as some network disks give it
            data += more
    finally:
        os.close(handle)
    return io.BytesIO(data)


def _opened(path: str | Path) -> tuple[int, int]:
    """A file's handle and size."""
    try:
        # Without O_NONBLOCK a pipe opens when somebody writes to it.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if os.path.exists(path) and not os.path.isfile(path):  # a socket has no opening
            raise _no_file(path, os.stat(path).st_mode) from None
        raise error
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise _no_file(path, status.st_mode)
    return handle, status.st_size


def _no_file(path: str | Path, mode: int) -> PixseqError:
    return PixseqError(f"{path} is {OTHERS.get(stat.S_IFMT(mode), 'something else')}, not a file", "name a file")


def check_holes(file: BinaryIO) -> None:
    """Raises ValueError for a file that is large by its holes: they take no room on the disk, and all of it in memory.

    A file system that knows no holes tells of none.
    """
    size = os.fstat(file.fileno()).st_size
    if size <= FREE or not hasattr(os, "SEEK_DATA"):
        return
    at = held = 0
    while at < size and size > FREE + FOLDED * held:
        try:
            begin = os.lseek(file.fileno(), at, os.SEEK_DATA)
        except OSError:  # no data from here on
            break
        at = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
        held += at - begin
    file.seek(0)
    if size > FREE + FOLDED * held:
        raise ValueError(f"it has {size:,} bytes, and {held:,} without its holes")


def read_bytes(path: str | Path, most: int) -> bytes:
    """All of a file of at most `most` bytes. Raises PixseqError for another, and OSError."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            check_holes(file)
        except ValueError as error:
            raise PixseqError(f"{path} is not read: {error}", "copy it again, from where it is whole") from None
        data = file.read(size + 1) if size <= most else b""  # which takes room for so much before it reads
    if max(size, len(data)) > most:  # it may grow meanwhile
        raise PixseqError(f"{path} has {size:,} bytes, more than the {most:,} that are read", "is it the right file?")
    return data


def check_members(archive: zipfile.ZipFile, size: int, most: int) -> None:
    """Raises ValueError for a zip of `size` bytes whose members would unfold, declare more than it has, or are more
    than `most`. Its module makes room for what a member declares before it reads.
    """
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("it is a compressed archive, which torch never writes")
    declared = max(sum(getattr(member, part) for member in members) for part in ("file_size", "compress_size"))
    if declared > size or len(members) > most:
        raise ValueError(f"it declares {declared:,} bytes in {len(members):,} members, and has {size:,}")
