"""What was made gets its name: all is flushed to disk and renamed last, and nothing is replaced by accident.

Whenever that is killed, the target is the old one or the new one; the next command finishes what was begun, or undoes
it.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from pixseq.artifacts import disk, locking
from pixseq.artifacts.layout import MADE, REPLACED, delete, partial_path
from pixseq.artifacts.targets import check_replaceable
from pixseq.errors import PixseqError

NOREPLACE, EXCHANGE = 1, 2  # of Linux's renameat2


def publish(partial: Path, target: Path, overwrite: bool) -> None:
    """Flush `partial` to disk and rename it to `target`; with `overwrite` what stood there before is swapped out in the
    same step.

    A folder takes its owner's record along, which tells what it replaces: after a kill between the swap and the end,
    the next command knows what stands at NAME.partial, and finishes. Raises PixseqError where the target appeared
    while it was made, or somebody put a file into it.
    """
    swap = os.path.lexists(target) and overwrite
    if swap and target.is_dir():
        check_replaceable(target)
    owner = locking.read_owner(partial) if partial.is_dir() else None
    if swap and owner is not None:
        locking.write_owner(partial, {**owner, "replaces": _number(target)})
    disk.flush(partial)
    if swap:
        old = _exchange(partial, target)
    else:
        _give_name(partial, target)
    disk.fsync(target.parent)
    if swap:
        delete(old)
    if owner is not None:
        locking.forget_owner(target)


def _number(path: Path) -> list[int]:
    """What stays the same of a file or folder when it is renamed."""
    found = path.lstat()
    return [found.st_dev, found.st_ino]


# ---- renaming


def _give_name(partial: Path, target: Path) -> None:
    """Give a target its name. Raises PixseqError where something has it already."""
    try:
        if os.path.lexists(target):
            raise FileExistsError
        if not _renamed(partial, target, NOREPLACE):
            os.replace(partial, target)
    except FileExistsError:
        raise PixseqError(
            f"{target} appeared while it was made here, by another hand",
            "move it elsewhere, or repeat the command with --overwrite (and --resume, where it has that)",
        ) from None


def _exchange(partial: Path, target: Path) -> Path:
    """Swap two names and return where the old target now is.

    In one step where the system can, else by two renames: the old one goes into the folder of the new one, from where
    `restore` and `finish` know it.
    """
    if _renamed(partial, target, EXCHANGE):
        return partial
    folder = partial.parent if partial.name == MADE else partial
    try:
        os.rename(target, folder / REPLACED)
        os.rename(partial, target)
    except BaseException:
        restore(folder, target)
        raise
    return (folder if partial.name == MADE else target) / REPLACED


def _renamed(a: Path, b: Path, how: int) -> bool:
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


# ---- after a kill


def restore(partial: Path, target: Path) -> None:
    """Give a target its name back that was moved aside by a publication that did not end."""
    old = partial / REPLACED
    if not os.path.lexists(old):
        return
    if os.path.lexists(target):
        delete(old)
    else:
        os.rename(old, target)


def is_being_published(target: Path) -> bool:
    """Whether the publication of `target` goes on, or was killed when that had its name and before all was tidy."""
    return target.is_dir() and locking.read_owner(target) is not None


def finish(target: Path) -> None:
    """Do what a publication that was killed after its swap had still to do. Raises PixseqError while it goes on."""
    handle = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    locking.lock(handle, target)
    try:
        partial, owner = partial_path(target), locking.read_owner(target)
        if owner is not None and os.path.lexists(partial) and owner.get("replaces") == _number(partial):
            delete(partial)
        if os.path.lexists(target / REPLACED):
            delete(target / REPLACED)
        locking.forget_owner(target)
    finally:
        os.close(handle)
