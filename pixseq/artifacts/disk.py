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


def write_text(path: Path, text: str) -> None:
    """A small file, whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    fsync(new)
    os.replace(new, path)


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
        raise PixseqError(
            f"the disk is full: {error.filename or target} could not be written",
            f"free space on the disk that holds {target.parent.resolve()}, or choose another --out",
        ) from error
