"""Who works in a folder, and at what: the lock on it, which goes with its process, and the records that stay in it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pixseq.artifacts import disk
from pixseq.artifacts.layout import OWNER, RECIPE
from pixseq.bounded.structure import read_json
from pixseq.errors import PixseqError

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EINVAL)  # some network disks
MOST_BYTES = 1 << 20  # of an owner's record


def lock(handle: int, folder: Path) -> None:
    """Lock an open folder, or close it and raise PixseqError, which names who holds it; OSError where it fails.

    Where its disk has no locks, it goes without.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        owner = read_owner(folder)
        told = f": {owner['command']}, process {owner['process']} on {owner['host']}" if owner else ""
        raise PixseqError(
            f"another process is writing {folder}{told}", "wait for it to end, or choose another --out"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(handle)
            raise


@contextlib.contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """One process at a time in a folder that is there; others wait."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield
    finally:
        os.close(handle)


def write_owner(folder: Path, record: Mapping[str, Any]) -> None:
    """Record that this process makes what is in a folder; `record` has the command, and whether it is resumable."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    more = {"process": os.getpid(), "host": platform.node(), "began": now}
    disk.write_text(folder / OWNER, json.dumps({**record, **more}, indent=1) + "\n")


def read_owner(folder: Path) -> dict[str, Any] | None:
    """Who is making what is in a folder; None where no such record is."""
    path = folder / OWNER
    try:
        found = None if path.is_symlink() else read_json(path, "", MOST_BYTES)
    except (OSError, PixseqError):
        return None
    kinds = {"command": str, "resumable": bool, "process": int, "host": str}
    fine = isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in kinds.items())
    return found if fine else None


def read_recipe(folder: Path) -> Any:
    """What the artifact in a folder was begun with; None where that is not told."""
    path = folder / RECIPE
    try:
        return None if path.is_symlink() else read_json(path, "")
    except (OSError, PixseqError):
        return None


def forget_owner(folder: Path) -> None:
    """Remove both records, the recipe first: with the owner's alone nothing is believed to be finished."""
    for name in (RECIPE, OWNER):
        (folder / name).unlink(missing_ok=True)
    disk.fsync(folder)
