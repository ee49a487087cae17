"""A target that exists is complete: write beside it, flush to disk, rename last."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from pixseq.errors import PixseqError, UsageError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def partial_path(target: str | Path) -> Path:
    """Where an unfinished target is written: NAME.partial beside it."""
    target = Path(target)
    return target.with_name(target.name + ".partial")


def check_target(target: str | Path, overwrite: bool) -> Path:
    """Called before any work. Raises PixseqError if the target exists (without overwrite) or cannot be written."""
    target = Path(target)
    if target.name in ("", ".."):
        raise UsageError(f"{target} cannot be a target", "name the file or folder to make")
    if target.exists() and not overwrite:
        raise PixseqError(f"{target} already exists", "choose another --out, or replace it with --overwrite")
    if target.is_dir() and not _is_ours(target):
        raise PixseqError(
            f"{target} is a folder that pixseq did not make",
            "choose another --out: --overwrite replaces artifacts only",
        )
    parent = target.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PixseqError(f"cannot make the folder {parent}: {error.strerror}", "choose another --out") from None
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PixseqError(f"cannot write in {parent}: permission denied", "choose another --out")
    return target


def check_targets(targets: Iterable[str | Path | None], overwrite: bool) -> None:
    """check_target of several, of which some may not be asked for. Raises UsageError where two are one path."""
    asked = [Path(target) for target in targets if target is not None]
    for i, target in enumerate(asked):
        check_target(target, overwrite)
        if target.resolve() in [other.resolve() for other in asked[:i]]:
            raise UsageError(f"{target} is named as a target twice", "give each result a path of its own")


def _is_ours(folder: Path) -> bool:
    """An artifact, an exported model, a folder of numbered pictures, or nothing: what --overwrite may replace."""
    names = {path.name for path in folder.iterdir()}
    if "zarr.json" in names or {"manifest.json", "codec.json"} <= names:
        return True
    if {"config.json", "model.safetensors"} <= names:
        return '"pixseq"' in (folder / "config.json").read_text(encoding="utf-8", errors="replace")
    return all(re.fullmatch(r"[0-9]{6,}[.]png", name) for name in names)


@contextlib.contextmanager
def writing(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields the partial path to write a file or a folder at; publishes it on success, removes it on any failure."""
    target = check_target(target, overwrite)
    partial = partial_path(target)
    remove(partial)
    try:
        with _disk_full_said(target):
            yield partial
            publish(partial, target)
    except BaseException:
        remove(partial)
        raise


@contextlib.contextmanager
def resuming(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields the partial folder, locked, with whatever an interrupted run left in it; publishes it on success.

    On a failure it stays, so that its stage can go on. Raises PixseqError while another process writes there.
    """
    target = check_target(target, overwrite)
    partial = partial_path(target)
    partial.mkdir(exist_ok=True)
    with lock(partial), _disk_full_said(target):
        yield partial
        publish(partial, target)


@contextlib.contextmanager
def _disk_full_said(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise PixseqError(
            f"the disk is full: {target} could not be written",
            f"free space on the disk that holds {target.parent.resolve()}, or choose another --out",
        ) from error


@contextlib.contextmanager
def lock(partial: Path) -> Iterator[None]:
    """One writer for one partial folder; the lock goes when the process does."""
    handle = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise PixseqError(
            f"another process is writing {partial}", "wait for it to end, or choose another --out"
        ) from None
    try:
        yield
    finally:
        os.close(handle)


def clear(folder: Path) -> None:
    """Remove what is in a folder, and keep the folder (and a lock on it)."""
    for child in folder.iterdir():
        remove(child)


def publish(partial: Path, target: Path) -> None:
    """Flush `partial` to disk and rename it to `target`; what stood there before is swapped out in the same step."""
    flush(partial)
    if target.exists() and (target.is_dir() or partial.is_dir()):
        _exchange(partial, target)
        remove(partial)
    else:
        os.replace(partial, target)
    _fsync(target.parent)


def write_text(path: Path, text: str) -> None:
    """A small file, whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    _fsync(new)
    os.replace(new, path)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """fsync a file, or a folder and all in it."""
    if path.is_dir():
        for folder, _, names in os.walk(path):
            for name in names:
                _fsync(Path(folder, name))
            _fsync(Path(folder))
    else:
        _fsync(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(a: Path, b: Path) -> None:
    """Swap two names atomically where the system can (Linux renameat2), else by two renames."""
    at_fdcwd, rename_exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 and renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0:
        return
    aside = b.with_name(b.name + ".old.partial")
    remove(aside)
    os.rename(b, aside)
    os.rename(a, b)
    os.rename(aside, a)
