"""A target that exists is complete, and has one owner from begin to publish.

Who makes NAME works in the folder NAME.partial beside it, which it holds locked and whose owner.json says who that is.
A stage that can go on where it was killed builds its artifact in that very folder, any other as the one thing inside.
What an interrupted command left belongs to that command: another one refuses.
Nothing that pixseq did not make is ever deleted, and no link is followed.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from pixseq.artifacts import disk, locking, publishing
from pixseq.artifacts.layout import MADE, delete, delete_debris, foreign, holds_work, partial_path
from pixseq.artifacts.targets import check_apart, check_replaceable, check_target, check_targets
from pixseq.errors import PixseqError
from pixseq.text import word

P = ParamSpec("P")
R = TypeVar("R")

SOURCES = {"source", "prompt"}  # arguments that name images by a path or by a word

_owned: dict[Path, bool] = {}  # the targets that this process owns, and whether it may replace what stands there


def owns(command: str, *outputs: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For a stage's run(..., overwrite): it owns the targets that these of its arguments name while it runs.

    So two commands with one target never both compute for hours, and the second is told at once. None of them may be
    what it reads. The stage raises as `check_apart`, `check_targets` and `own` do.
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
def writing(target: str | Path, overwrite: bool = False, command: str = "another command") -> Iterator[Path]:
    """Yields a path to write a file or a folder at; publishes it on success, and leaves nothing on any failure.

    Raises PixseqError as `own` and `publish` do.
    """
    target = Path(target)
    with own(target, overwrite, command) as partial:
        yield partial / MADE
        publishing.publish(partial / MADE, target, _owned[_key(target)])


@contextlib.contextmanager
def resuming(target: str | Path, overwrite: bool = False, command: str = "another command") -> Iterator[Path]:
    """Yields the partial folder with whatever an interrupted run of the same command left; publishes it on success.

    Raises PixseqError as `own` and `publish` do.
    """
    target = Path(target)
    with own(target, overwrite, command, resumable=True) as partial:
        yield partial
        publishing.publish(partial, target, _owned[_key(target)])


@contextlib.contextmanager
def own(target: str | Path, overwrite: bool, command: str, resumable: bool = False) -> Iterator[Path]:
    """Own `target` meanwhile: yields its partial folder, locked. Where this process owns it already, nothing changes.

    Of a `resumable` command it holds what an interrupted run of the same command left, and stays after a failure where
    there is something to go on with. Any other command begins with a clear folder and leaves none.
    Raises PixseqError where another process works there (it is named), where another command left something to go on
    with, for links and files that are not pixseq's, where the disk is full, and as `check_target` does.
    """
    key = _key(target)
    if key in _owned:
        yield partial_path(target)
        return
    target = check_target(target, overwrite)
    partial = partial_path(target)
    with disk.naming_full(target):
        handle = _locked(target, partial)
        keep = True  # what another run left
        try:
            check_target(target, overwrite)  # again: whoever held it before may have published in between
            _take(partial, command, resumable)
            _owned[key], keep = overwrite, resumable
            yield partial
        finally:
            _owned.pop(key, None)
            _leave(target, partial, handle, keep)


def _key(target: str | Path) -> Path:
    return Path(os.path.abspath(target))


def _locked(target: Path, partial: Path) -> int:
    """A handle of the partial folder with the lock on it; what an interrupted publication left is tidied first.

    A folder that is renamed away between its opening and its locking is not ours: hence the comparison.
    """
    while True:
        if publishing.is_being_published(target):
            publishing.finish(target)
        handle = _open_locked(partial)
        same = os.path.lexists(partial) and os.path.samestat(os.fstat(handle), os.lstat(partial))
        if same and not publishing.is_being_published(target):
            publishing.restore(partial, target)
            return handle
        os.close(handle)


def _open_locked(partial: Path) -> int:
    made = False
    try:
        partial.mkdir(exist_ok=True)
        made = True
        handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if made and isinstance(error, FileNotFoundError):
            return _open_locked(partial)  # published in between
        if partial.is_symlink() or partial.is_file():
            what = "a link" if partial.is_symlink() else "a file"
            raise PixseqError(
                f"{partial}, where the unfinished target would be made, is {what} that pixseq did not make",
                "move it elsewhere, or choose another --out",
            ) from None
        raise PixseqError(f"cannot make {partial}: {error.strerror}", "choose another --out") from None
    locking.lock(handle, partial)
    return handle


def _take(partial: Path, command: str, resumable: bool) -> None:
    """Make the locked folder this command's, or refuse to."""
    _check_ours(partial)
    owner = locking.read_owner(partial)
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
    locking.write_owner(partial, {"command": command, "resumable": resumable})


def _check_ours(partial: Path) -> None:
    theirs = foreign(partial)
    if theirs is not None:
        raise PixseqError(
            f"{partial} holds {theirs.relative_to(partial)}, which pixseq did not make",
            "move it elsewhere, or choose another --out",
        )


def _leave(target: Path, partial: Path, handle: int, keep: bool) -> None:
    """Let go of a partial folder; `keep`: it stays where there is something in it to go on with."""
    try:
        if partial.is_dir() and os.path.samestat(os.fstat(handle), os.lstat(partial)):
            publishing.restore(partial, target)
            if not (keep and holds_work(partial)):
                delete(partial)
    finally:
        os.close(handle)


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
        check_replaceable(target)
    delete(target)
