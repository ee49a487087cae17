"""What is written is on the disk before it counts, and a full disk is named."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from pixseq.errors import PixseqError

FLUSHED_AT_ONCE = 8  # files: one by one a hundred take half a second
FLUSHED_SOON = 1024  # that wait for their turn: a million chunks would take a gigabyte
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def swapping_in(path: Path) -> Iterator[Path]:
    """Yields where to write a file that takes the place of `path` in one step, when it is on the disk.

    Leaves `path` as it was on any failure. Raises PixseqError where the disk is full, and OSError.
    """
    new = path.with_name(path.name + ".new")
    try:
        with naming_full(path):
            yield new
            fsync(new)
            os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """A small file, whole or not at all. Raises as `swapping_in` does."""
    with swapping_in(path) as new:
        new.write_text(text)


def flush(path: Path) -> None:
    """fsync a file, or a folder and all in it, some side by side, so that many share one commit of the disk's."""
    from concurrent.futures import ThreadPoolExecutor

    if path.is_dir():
        with ThreadPoolExecutor(FLUSHED_AT_ONCE, "flushing") as pool:
            for folders in (False, True):
                below = (entry.path for entry in _below(path) if entry.is_dir(follow_symlinks=False) == folders)
                while some := list(islice(below, FLUSHED_SOON)):
                    list(pool.map(fsync, some))
    fsync(path)


def _below(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """All files and folders in a folder, at whatever depth."""
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry
            if entry.is_dir(follow_symlinks=False):
                yield from _below(entry.path)


def fsync(path: str | Path) -> None:
    """Of one file, or of the names in one folder."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder where one may write and not look
        os.sync()
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def naming_full(target: Path) -> Iterator[None]:
    """Raises PixseqError, in place of OSError, where there is no space for what is written meanwhile for `target`."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise full(error.filename or target) from error


def full(path: str | Path) -> PixseqError:
    """What is said where there is no space for `path`."""
    return PixseqError(
        f"the disk is full: {path} could not be written",
        "make room there and repeat the command (with --resume, where it has that), or choose another --out",
    )
