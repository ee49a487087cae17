"""What pixseq writes into a folder, by name: what --overwrite may replace, and all that is ever deleted.

A file of any other name is somebody else's. It is named in an error and stays.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

OWNER = "owner.json"  # of an unfinished target: who makes it, see owning.own
RECIPE = "recipe.json"  # of an unfinished training run or store: what must be the same to go on
MADE = "made"  # in a partial folder: the file or folder that a command without a resume point makes
REPLACED = "replaced"  # in a partial folder: what had the target's name, where two names cannot be swapped at once

PARTIAL = ".partial"  # ends the name of what is unfinished

MOST_CONFIG_BYTES = 16 << 20

_UNFINISHED = rf"({OWNER}|{RECIPE})(\.new)?"
_WEIGHTS = r"(model|best|last|ema|best-\d+|model-\d{5}-of-\d{5})\.safetensors"
# Names under which these libraries write a file before it has its own: what a kill or a full disk leaves.
_ZARR_WRITES, _SAFETENSORS_WRITES = r"[0-9a-f]{32}\.partial", r"\.tmp[0-9A-Za-z]{6}"
DEBRIS = re.compile(rf"(.+\.)?{_ZARR_WRITES}|{_SAFETENSORS_WRITES}")
_FILES = {
    "checkpoint": "|".join(
        (
            r"(manifest|codec)\.json(\.new)?|config\.yaml(\.new)?|(log|refit)\.jsonl(\.new)?",
            rf"{_WEIGHTS}(\.new)?|{_SAFETENSORS_WRITES}|(resume/)?state\.pt(\.new)?",
            r"(resume/)?refit/(log\.jsonl|(resume/)?state\.pt)(\.new)?",  # a second run that follows the first
        )
    ),
    "store": rf"([a-z_]+/)?zarr\.(json|(json\.)?{_ZARR_WRITES})|[a-z_]+/c(/\d+)*(\.{_ZARR_WRITES})?",
    "export": r"README\.md|(config|generation_config|preprocessor_config|model\.safetensors\.index)\.json"
    rf"|{_WEIGHTS}|{_SAFETENSORS_WRITES}",
    "pictures": r"[0-9]{6,}\.png",
    "plan": r"manifest\.json",
    "empty": r"(?!)",
}
_FOLDERS = {
    "checkpoint": r"resume|(resume/)?refit(/resume)?",
    "store": r"[a-z_]+(/c(/\d+)*)?",
    "export": r"(?!)",
    "pictures": r"(?!)",
    "plan": r"cells",
    "empty": r"(?!)",
}

_MARKS = {  # what tells a folder of a kind among others
    "store": ("zarr.json",),
    "checkpoint": ("manifest.json", "codec.json"),
    "export": ("config.json", "model.safetensors"),
    "plan": ("manifest.json", "cells"),
}
DRAWN = b"pixseq\0"  # in the first bytes of every PNG that pixseq writes


def partial_path(target: str | Path) -> Path:
    """Where an unfinished target is made: NAME.partial beside it."""
    target = Path(target)
    return target.with_name(target.name + PARTIAL)


def is_partial(path: Path) -> bool:
    """Whether it has the name of what is unfinished."""
    return path.name.endswith(PARTIAL)


def holds_work(partial: Path) -> bool:
    """Whether there is more in the folder than the records of who owns it and of what is to be made."""
    return any(path.name.removesuffix(".new") not in (OWNER, RECIPE) for path in partial.iterdir())


def _pattern(names: dict[str, str], kind: str | None) -> re.Pattern:
    """Of one kind of folder; None: of any."""
    return re.compile("|".join((_UNFINISHED, *(names.values() if kind is None else [names[kind]]))))


def _entries(folder: Path, kind: str | None = None) -> Iterator[tuple[Path, bool]]:
    """All that is in a folder, the deepest first, each with whether pixseq gives such names. No link is followed.

    Of no `kind`: in an artifact or in a partial folder with one.
    """
    files_of, folders_of = _pattern(_FILES, kind), _pattern(_FOLDERS, kind)
    for here, folders, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(here, name)
            yield path, _is_ours(path, folder, files_of) and path.is_file()
        for name in folders:
            path = Path(here, name)
            yield path, _is_ours(path, folder, folders_of)


def _is_ours(path: Path, folder: Path, names: re.Pattern) -> bool:
    name = path.relative_to(folder).as_posix()
    for prefix in (MADE, REPLACED):
        if name == prefix:
            return not path.is_symlink()
        name = name.removeprefix(f"{prefix}/")
    return not path.is_symlink() and bool(names.fullmatch(name))


def foreign(folder: Path, kind: str | None = None) -> Path | None:
    """Something in `folder` that pixseq did not make, or None; of a `kind`: that it does not put into such a folder."""
    return next((path for path, ours in _entries(folder, kind) if not ours), None)


def kind_of(folder: Path) -> str | None:
    """store, checkpoint, export, pictures (numbered) or empty; None for a folder that pixseq did not make."""
    names = {path.name for path in folder.iterdir()}
    if "zarr.json" in names:
        return "store"
    if {"manifest.json", "codec.json"} <= names:
        return "checkpoint"
    if {"config.json", "model.safetensors"} <= names and (folder / "config.json").is_file():
        with (folder / "config.json").open("rb") as file:
            return "export" if b'"pixseq"' in file.read(MOST_CONFIG_BYTES) else None
    if names <= {OWNER}:
        return "empty"
    return "pictures" if all(_is_drawn(folder / name) for name in names) else None


def _is_drawn(path: Path) -> bool:
    """Whether it is a numbered picture of ours: others have folders of such names too."""
    if not re.fullmatch(r"[0-9]{6,}[.]png", path.name) or not path.is_file():
        return False
    with path.open("rb") as file:
        return DRAWN in file.read(64)


def artifact_of(path: Path) -> Path | None:
    """The artifact of which a file or folder of this name would be a part, or None."""
    place = path.parent.resolve() / path.name
    for folder in place.parents:
        for kind, names in _MARKS.items():
            if all((folder / name).exists() for name in names) and _is_part(place.relative_to(folder), kind):
                return folder
    return None


def _is_part(name: Path, kind: str) -> bool:
    return bool(
        _pattern(_FILES, kind).fullmatch(name.as_posix()) or _pattern(_FOLDERS, kind).fullmatch(name.as_posix())
    )


def is_of_plan(path: Path, folder: Path) -> bool:
    """Whether what lies below a folder is the plan of a scaling study, or of its cells; what is made of them is not."""
    marks = _MARKS["plan"]
    return all((folder / name).exists() for name in marks) and path.relative_to(folder).parts[0] in marks


def delete(path: Path, keep: bool = False) -> None:
    """Remove a file, a link (never what it points to), or of a folder what pixseq made; the rest and its folders stay.

    `keep`: the folder itself stays, with the lock on it and its owner's record.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for entry, ours in _entries(path):
        if not ours or (keep and entry == path / OWNER):
            continue
        if entry.is_dir():
            _remove_empty(entry)
        else:
            entry.unlink(missing_ok=True)
    if not keep:
        _remove_empty(path)


def delete_debris(folder: Path) -> None:
    """Remove what libraries had not ended to write, of a folder in which nothing is foreign."""
    for entry, ours in _entries(folder):
        if ours and DEBRIS.fullmatch(entry.name):
            entry.unlink(missing_ok=True)


def _remove_empty(folder: Path) -> None:
    """A folder that still holds somebody's file stays."""
    if not any(folder.iterdir()):
        folder.rmdir()
