"""What pixseq writes into a folder, by name: what --overwrite may replace, and all that is ever deleted.

A file of any other name is somebody else's. It is named in an error and stays.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

OWNER = "owner.json"  # of an unfinished target: who makes it, see atomic.own
RECIPE = "recipe.json"  # of an unfinished training run: what must be the same to go on
MADE = "made"  # in a partial folder: the file or folder that a command without a resume point makes

_WEIGHTS = r"(model|best|last|ema|best-\d+|model-\d{5}-of-\d{5})\.safetensors"
_FILES = re.compile(
    "|".join(
        (
            rf"{OWNER}(\.new)?|(manifest|codec|recipe)\.json(\.new)?|config\.yaml(\.new)?|(log|refit)\.jsonl(\.new)?",
            rf"{_WEIGHTS}(\.new)?|(resume/)?state\.pt(\.new)?",
            r"(resume/)?refit/(log\.jsonl|(resume/)?state\.pt)(\.new)?",  # a second run that follows the first
            # zarr writes each file under a name with a random suffix first
            r"([a-z_]+/)?zarr\.json(\.[0-9a-f]{32}\.partial)?|[a-z_]+/c(/\d+)*(\.[0-9a-f]{32}\.partial)?",
            r"README\.md|(config|generation_config|preprocessor_config|model\.safetensors\.index)\.json",
            r"[0-9]{6,}\.png",
        )
    )
)
_FOLDERS = re.compile(r"resume|(resume/)?refit(/resume)?|cells|[a-z_]+(/c(/\d+)*)?")


def _is_ours(path: Path, folder: Path, names: re.Pattern) -> bool:
    """Whether pixseq gives such names in an artifact, or in a partial folder with one."""
    name = path.relative_to(folder).as_posix()
    return not path.is_symlink() and (name == MADE or bool(names.fullmatch(name.removeprefix(f"{MADE}/"))))


def _entries(folder: Path) -> Iterator[tuple[Path, bool]]:
    """All that is in a folder, the deepest first, each with whether pixseq gives such names. No link is followed."""
    for here, folders, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(here, name)
            yield path, _is_ours(path, folder, _FILES)
        for name in folders:
            path = Path(here, name)
            yield path, _is_ours(path, folder, _FOLDERS)


def foreign(folder: Path) -> Path | None:
    """Something in `folder` that pixseq did not make, or None."""
    return next((path for path, ours in _entries(folder) if not ours), None)


def is_artifact(folder: Path) -> bool:
    """An artifact, an exported model, a folder of numbered pictures, or nothing at all."""
    names = {path.name for path in folder.iterdir()}
    if "zarr.json" in names or {"manifest.json", "codec.json"} <= names:
        return True
    if {"config.json", "model.safetensors"} <= names:
        return '"pixseq"' in (folder / "config.json").read_text(encoding="utf-8", errors="replace")
    return names <= {OWNER} or all(re.fullmatch(r"[0-9]{6,}[.]png", name) for name in names)


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


def _remove_empty(folder: Path) -> None:
    """A folder that still holds somebody's file stays."""
    if not any(folder.iterdir()):
        folder.rmdir()
