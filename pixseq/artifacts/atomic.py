"""A target that exists is complete, and has one owner from begin to publish.

Who makes NAME works in the folder NAME.partial beside it, which it holds locked and whose owner.json says who that is.
A stage that can go on where it was killed builds its artifact in that very folder, any other as the one thing inside.
All is flushed to disk and renamed last; what it replaces keeps its name until then. What an interrupted command left
belongs to that command: another one refuses.
Nothing that pixseq did not make is ever deleted, and no link is followed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import inspect
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from pixseq.artifacts import manifest
from pixseq.artifacts.layout import (
    MADE,
    OWNER,
    RECIPE,
    REPLACED,
    artifact_of,
    delete,
    delete_debris,
    foreign,
    is_of_plan,
    kind_of,
)
from pixseq.artifacts.renaming import exchange, give_name, restore
from pixseq.bounded.structure import read_json
from pixseq.errors import PixseqError, UsageError
from pixseq.text import word

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EINVAL)  # some network disks

SOURCES = {"source", "prompt"}  # arguments that name images by a path or by a word
MOST_BYTES = 1 << 20  # of an owner's record
FLUSHED_AT_ONCE = 8  # files: one by one a hundred take half a second
FLUSHED_SOON = 1024  # that wait for their turn: a million chunks would take a gigabyte


@dataclass(frozen=True)
class _Owned:
    partial: Path
    overwrite: bool


_owned: dict[Path, _Owned] = {}  # by the targets that this process owns


def partial_path(target: str | Path) -> Path:
    """Where an unfinished target is made: NAME.partial beside it."""
    target = Path(target)
    return target.with_name(target.name + ".partial")


# ---- before any work


def check_target(target: str | Path, overwrite: bool) -> Path:
    """Raises PixseqError if the target exists (without overwrite), cannot be written, or somebody is making it."""
    target = Path(target)
    if target.name in ("", ".."):
        raise UsageError(f"{target} cannot be a target", "name the file or folder to make")
    if target.name.endswith(".partial"):
        raise UsageError(f"{target} has the name of what is unfinished", "choose a name that ends otherwise")
    whole = artifact_of(target)
    if whole is not None:
        raise UsageError(f"{target} is the name of a part of {whole}, which would be broken", "choose another --out")
    if os.path.lexists(target) and not overwrite:
        raise PixseqError(f"{target} already exists", "choose another --out, or replace it with --overwrite")
    if target.is_dir():
        _check_replaceable(target)
    elif os.path.lexists(target) and not target.is_file():
        raise PixseqError(f"{target} is neither a file nor a folder", "choose another --out")
    parent = target.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PixseqError(f"cannot make the folder {parent}: {error.strerror}", "choose another --out") from None
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PixseqError(f"cannot write in {parent}: permission denied", "choose another --out")
    return target


def _check_replaceable(folder: Path) -> None:
    kind = kind_of(folder)
    if kind is None:
        raise PixseqError(
            f"{folder} is a folder that pixseq did not make",
            "choose another --out: --overwrite replaces artifacts only",
        )
    theirs = foreign(folder, kind)
    if theirs is not None:
        raise PixseqError(
            f"{folder} holds {theirs.relative_to(folder)}, which pixseq did not make and --overwrite would delete",
            "move it elsewhere, or choose another --out",
        )


def check_targets(targets: Iterable[str | Path | None], overwrite: bool) -> None:
    """check_target of several, of which some may not be asked for. Raises UsageError where two are one path."""
    asked = [Path(target) for target in targets if target is not None]
    for i, target in enumerate(asked):
        check_target(target, overwrite)
        if target.resolve() in [other.resolve() for other in asked[:i]]:
            raise UsageError(f"{target} is named as a target twice", "give each result a path of its own")


def check_apart(targets: Iterable[str | Path | None], inputs: Iterable[Any]) -> None:
    """Raises UsageError where a target is one of the paths among what a command reads, a folder that holds one, or
    stands in one. What pixseq made stands in a folder of pictures by chance, and may be made again.
    """
    flat = [one for each in inputs for one in (each if isinstance(each, list | tuple) else [each])]
    read = [Path(each).resolve() for each in flat if isinstance(each, str | Path) and os.path.exists(each)]
    for target in targets:
        if target is None or not os.path.exists(target):
            continue
        place = Path(target).resolve()
        within = [each for each in read if each in place.parents]
        if any(place in (each, *each.parents) for each in read) or (within and not _is_result(place, within)):
            raise UsageError(f"{target} is what this command reads, and would be replaced", "choose another --out")


def _is_result(place: Path, within: Iterable[Path]) -> bool:
    """Whether it is an artifact, or a folder that pixseq made, and not of a plan among those folders."""
    if any(is_of_plan(place, folder) for folder in within):
        return False
    try:
        return place.is_dir() or bool(manifest.read(place))  # of a folder check_target tells more
    except PixseqError:
        return False


# ---- owning

P = ParamSpec("P")
R = TypeVar("R")


def owns(command: str, *outputs: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For a stage's run(..., overwrite): it owns the targets that these of its arguments name while it runs.

    So two commands with one target never both compute for hours, and the second is told at once. None of them may be
    what it reads.
    """

    def owning(run: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(run)
        paths = {name for name, each in signature.parameters.items() if "Path" in str(each.annotation)}

        def inputs(given: Mapping[str, Any]) -> list[Any]:
            return [given[name] for name in (paths | given.keys() & SOURCES) - set(outputs)]

        @functools.wraps(run)
        def owned(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            overwrite = given.arguments["overwrite"]
            targets = [given.arguments[name] for name in outputs if given.arguments[name] is not None]
            check_apart(targets, inputs(given.arguments))
            check_targets(targets, overwrite)
            with contextlib.ExitStack() as stack:
                for target in targets:
                    stack.enter_context(own(target, overwrite, command))
                return run(*args, **kwargs)

        return owned

    return owning


@contextlib.contextmanager
def own(target: str | Path, overwrite: bool, command: str, resumable: bool = False) -> Iterator[Path]:
    """Own `target` meanwhile: yields its partial folder, locked.

    Of a `resumable` command it holds what an interrupted run of the same command left, and stays after a failure where
    there is something to go on with. Any other command begins with a clear folder and leaves none.
    Raises PixseqError where another process works there (it is named), where another command left something to go on
    with, and for links and files that are not pixseq's.
    """
    key = Path(os.path.abspath(target))
    if key in _owned:
        yield _owned[key].partial
        return
    target = check_target(target, overwrite)
    partial = partial_path(target)
    with _disk_full_said(target):
        handle = _locked(target, partial)
        keep = True  # what another run left
        try:
            check_target(target, overwrite)  # again: whoever held it before may have published in between
            _take(partial, command, resumable)
            _owned[key], keep = _Owned(partial, overwrite), resumable
            yield partial
        finally:
            _owned.pop(key, None)
            _leave(target, partial, handle, keep)


def _leave(target: Path, partial: Path, handle: int, keep: bool) -> None:
    """Let go of a partial folder; `keep`: it stays where there is something in it to go on with."""
    try:
        if partial.is_dir() and os.path.samestat(os.fstat(handle), os.lstat(partial)):
            restore(partial, target)
            if not (keep and holds_work(partial)):
                delete(partial)
    finally:
        os.close(handle)


def _locked(target: Path, partial: Path) -> int:
    """A handle of the partial folder with the lock on it; what an interrupted publication left is tidied first.

    A folder that is renamed away between its opening and its locking is not ours: hence the comparison.
    """
    while True:
        if _is_new(target):
            finish_publishing(target)
        handle = _open_locked(partial)
        same = os.path.lexists(partial) and os.path.samestat(os.fstat(handle), os.lstat(partial))
        if same and not _is_new(target):
            restore(partial, target)
            return handle
        os.close(handle)


def _open_locked(partial: Path) -> int:
    try:
        partial.mkdir(exist_ok=True)
        handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return _open_locked(partial)  # published in between
    except OSError as error:
        if partial.is_symlink() or partial.is_file():
            what = "a link" if partial.is_symlink() else "a file"
            raise PixseqError(
                f"{partial}, where the unfinished target would be made, is {what} that pixseq did not make",
                "move it elsewhere, or choose another --out",
            ) from None
        raise PixseqError(f"cannot make {partial}: {error.strerror}", "choose another --out") from None
    _lock(handle, partial)
    return handle


def _lock(handle: int, folder: Path) -> None:
    """Lock an open folder, or close it and raise PixseqError. The lock goes when the process does."""
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


def give_up(target: str | Path) -> None:
    """Delete what an interrupted command left of `target`. Raises PixseqError as `own` does."""
    target = Path(target)
    partial = partial_path(target)
    if not os.path.lexists(partial):
        return
    handle = _locked(target, partial)
    try:
        _check_ours(partial)
        delete(partial)
    finally:
        os.close(handle)


def discard(target: str | Path) -> None:
    """Delete an artifact and what is unfinished of it. Raises PixseqError where either is not pixseq's alone."""
    target = Path(target)
    give_up(target)
    if target.is_dir() and not target.is_symlink():
        _check_replaceable(target)
    delete(target)


def holds_work(partial: Path) -> bool:
    """Whether there is more in the folder than the records of who owns it and of what is to be made."""
    return any(path.name.removesuffix(".new") not in (OWNER, RECIPE) for path in partial.iterdir())


def _check_ours(partial: Path) -> None:
    theirs = foreign(partial)
    if theirs is not None:
        raise PixseqError(
            f"{partial} holds {theirs.relative_to(partial)}, which pixseq did not make",
            "move it elsewhere, or choose another --out",
        )


def _take(partial: Path, command: str, resumable: bool) -> None:
    """Make the locked folder this command's, or refuse to."""
    _check_ours(partial)
    owner = read_owner(partial)
    if owner is None and holds_work(partial):
        raise PixseqError(
            f"{partial} does not tell which command began it", "remove or rename it, or choose another --out"
        )
    mine = owner is not None and owner["command"] == command
    if owner is not None and holds_work(partial) and owner["resumable"] and not (mine and resumable):
        raise PixseqError(
            f"{partial} holds an interrupted {owner['command']}, and this is {command}",
            f"go on with that by its command and --resume, choose another --out, or give it up: rm -r {word(partial)}",
        )
    if resumable and mine:
        delete_debris(partial)
    else:
        delete(partial, keep=True)
    _write_owner(partial, {"command": command, "resumable": resumable})


def _write_owner(folder: Path, record: Mapping[str, Any]) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    more = {"process": os.getpid(), "host": platform.node(), "began": now}
    write_text(folder / OWNER, json.dumps({**record, **more}, indent=1) + "\n")


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


# ---- writing


@contextlib.contextmanager
def writing(target: str | Path, overwrite: bool = False, command: str = "another command") -> Iterator[Path]:
    """Yields a path to write a file or a folder at; publishes it on success, and leaves nothing on any failure."""
    target = Path(target)
    with own(target, overwrite, command) as partial:
        yield partial / MADE
        publish(partial / MADE, target)


@contextlib.contextmanager
def resuming(target: str | Path, overwrite: bool = False, command: str = "another command") -> Iterator[Path]:
    """Yields the partial folder with whatever an interrupted run of the same command left; publishes it on success."""
    target = Path(target)
    with own(target, overwrite, command, resumable=True) as partial:
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
            f"the disk is full: {error.filename or target} could not be written",
            f"free space on the disk that holds {target.parent.resolve()}, or choose another --out",
        ) from error


@contextlib.contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """One process at a time in a folder that is there; others wait. The lock goes when the process does."""
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


def publish(partial: Path, target: Path) -> None:
    """Flush `partial` to disk and rename it to `target`; what stood there before is swapped out in the same step.

    A folder takes its owner's record along, which tells what it replaces: after a kill between the swap and the end,
    the next command knows what stands at NAME.partial, and finishes. Raises PixseqError where the target appeared
    while it was made, or somebody put a file into it.
    """
    owned = _owned.get(Path(os.path.abspath(target)))
    swap = os.path.lexists(target) and (owned is None or owned.overwrite)
    if swap and target.is_dir():
        _check_replaceable(target)
    owner = read_owner(partial) if partial.is_dir() else None
    if swap and owner is not None:
        _write_owner(partial, {**owner, "replaces": _number(target)})
    flush(partial)
    if swap:
        old = exchange(partial, target)
    else:
        give_name(partial, target)
    _fsync(target.parent)
    if swap:
        delete(old)
    if owner is not None:
        _forget_owner(target)


def _number(path: Path) -> list[int]:
    """What stays the same of a file or folder when it is renamed."""
    found = path.lstat()
    return [found.st_dev, found.st_ino]


def _is_new(target: Path) -> bool:
    """Whether the publication of `target` goes on, or was killed when that had its name and before all was tidy."""
    return target.is_dir() and read_owner(target) is not None


def finish_publishing(target: Path) -> None:
    """Do what a publication that was killed after its swap had still to do. Raises PixseqError while it goes on."""
    handle = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    _lock(handle, target)
    try:
        partial, owner = partial_path(target), read_owner(target)
        if owner is not None and os.path.lexists(partial) and owner.get("replaces") == _number(partial):
            delete(partial)
        if os.path.lexists(target / REPLACED):
            delete(target / REPLACED)
        _forget_owner(target)
    finally:
        os.close(handle)


def _forget_owner(target: Path) -> None:
    """Recipe first: with the owner's record alone nothing is believed to be finished."""
    for name in (RECIPE, OWNER):
        (target / name).unlink(missing_ok=True)
    _fsync(target)


def write_text(path: Path, text: str) -> None:
    """A small file, whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    _fsync(new)
    os.replace(new, path)


def flush(path: Path) -> None:
    """fsync a file, or a folder and all in it, some side by side, so that many share one commit of the disk's."""
    from concurrent.futures import ThreadPoolExecutor

    if path.is_dir():
        with ThreadPoolExecutor(FLUSHED_AT_ONCE, "flushing") as pool:
            for folders in (False, True):
                below = (entry.path for entry in _below(path) if entry.is_dir(follow_symlinks=False) == folders)
                while some := list(islice(below, FLUSHED_SOON)):
                    list(pool.map(_fsync, some))
    _fsync(path)


def _below(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """All files and folders in a folder, at whatever depth."""
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry
            if entry.is_dir(follow_symlinks=False):
                yield from _below(entry.path)


def _fsync(path: str | Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder where one may write and not look
        os.sync()
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
