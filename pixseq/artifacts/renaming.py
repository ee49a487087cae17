"""Renames that replace nothing by accident, and leave a target its old name or its new one whenever they are killed."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from pixseq.artifacts.layout import MADE, REPLACED, delete
from pixseq.errors import PixseqError

NOREPLACE, EXCHANGE = 1, 2  # of Linux's renameat2


def renamed(a: Path, b: Path, how: int) -> bool:
    """Rename in a way that only Linux can; False where it cannot. Raises FileExistsError."""
    at_fdcwd = -100
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), how) == 0:
        return True
    if ctypes.get_errno() == errno.EEXIST:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(b))
    return False


def give_name(partial: Path, target: Path) -> None:
    """Give a target its name. Raises PixseqError where something has it already."""
    try:
        if os.path.lexists(target):
            raise FileExistsError
        if not renamed(partial, target, NOREPLACE):
            os.replace(partial, target)
    except FileExistsError:
        raise PixseqError(
            f"{target} appeared while it was made here, by another hand",
            "move it elsewhere, or repeat the command with --overwrite (and --resume, where it has that)",
        ) from None


def exchange(partial: Path, target: Path) -> Path:
    """Swap two names and return where the old target now is.

    In one step where the system can, else by two renames: the old one goes into the folder of the new one, from where
    `restore` and `atomic.finish_publishing` know it.
    """
    if renamed(partial, target, EXCHANGE):
        return partial
    folder = partial.parent if partial.name == MADE else partial
    try:
        os.rename(target, folder / REPLACED)
        os.rename(partial, target)
    except BaseException:
        restore(folder, target)
        raise
    return (folder if partial.name == MADE else target) / REPLACED


def restore(partial: Path, target: Path) -> None:
    """Give a target its name back that was moved aside by a publication that did not end."""
    old = partial / REPLACED
    if not os.path.lexists(old):
        return
    if os.path.lexists(target):
        delete(old)
    else:
        os.rename(old, target)
