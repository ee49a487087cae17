"""What a command may make: looked at before any work."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pixseq.artifacts import manifest
from pixseq.artifacts.layout import artifact_of, foreign, is_of_plan, is_partial, kind_of
from pixseq.errors import PixseqError, UsageError


def check_targets(targets: Iterable[str | Path | None], overwrite: bool) -> None:
    """check_target of several, of which some may not be asked for. Raises UsageError where two are one path."""
    asked = [Path(target) for target in targets if target is not None]
    for i, target in enumerate(asked):
        check_target(target, overwrite)
        if target.resolve() in [other.resolve() for other in asked[:i]]:
            raise UsageError(f"{target} is named as a target twice", "give each result a path of its own")


def check_target(target: str | Path, overwrite: bool) -> Path:
    """The target as a path, in a folder that is made for it.

    Raises PixseqError where it exists (without overwrite), is not pixseq's to replace, or cannot be written;
    UsageError for what is no name of a target.
    """
    target = Path(target)
    if target.name in ("", ".."):
        raise UsageError(f"{target} cannot be a target", "name the file or folder to make")
    if is_partial(target):
        raise UsageError(f"{target} has the name of what is unfinished", "choose a name that ends otherwise")
    whole = artifact_of(target)
    if whole is not None:
        raise UsageError(f"{target} is the name of a part of {whole}, which would be broken", "choose another --out")
    if os.path.lexists(target) and not overwrite:
        raise PixseqError(f"{target} already exists", "choose another --out, or replace it with --overwrite")
    if target.is_dir():
        check_replaceable(target)
    elif os.path.lexists(target) and not target.is_file():
        raise PixseqError(f"{target} is neither a file nor a folder", "choose another --out")
    parent = target.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PixseqError(f"cannot make the folder {parent}: {error.strerror}", "choose another --out") from None
    if not os.access(parent, os.W_OK | os.X_OK):
        read_only = os.statvfs(parent).f_flag & os.ST_RDONLY
        why = "its file system is read-only" if read_only else "permission denied"
        raise PixseqError(f"cannot write in {parent}: {why}", "choose another --out")
    return target


def check_replaceable(folder: Path) -> None:
    """Raises PixseqError for a folder that pixseq did not make, or that holds what it did not put there."""
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
