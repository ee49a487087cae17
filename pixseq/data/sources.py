"""SOURCE on the command line: what it is, by its content, and opened.

To add a source: a module with an `open_...(path, wanted) -> Source`, and a line in `_open_file` or `_open_folder`.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import replace
from pathlib import Path

from pixseq.data import (
    arrays,
    binary,
    cifar,
    digits,
    downsampled,
    folders,
    parquet,
    refusals,
    token_files,
    webdataset,
    zips,
)
from pixseq.data.records import MAX_PIXELS, ImageFile, Pixels, Source, Wanted
from pixseq.data.sniff import kind_of
from pixseq.data.split_names import split_of
from pixseq.data.token_files import TokenSource
from pixseq.data.tree import DiskTree, Tree
from pixseq.errors import PixseqError, UsageError
from pixseq.text import few, shown

__all__ = ["ImageFile", "Pixels", "Source", "TokenSource", "open_any", "open_source"]

ACCEPTED = (
    "a source is digits, digits-placed, a folder of class folders or pictures, CIFAR-10/100 (folder or .tar.gz), "
    "MNIST-style idx, STL-10 binary, Downsampled ImageNet, .npz, .npy, .parquet, .tar shards, a .zip of pictures, "
    "or - for paths on stdin"
)
NO_PATHS = ("digits", "digits-placed", "-")
WITH_COLUMNS = {"parquet", "npz", "npy", "webdataset"}
DEEPEST = 4  # folders below SOURCE
MOST_FOLDERS = 50  # more are class folders, in which no format is looked for


def open_source(
    spec: str,
    split: str = "train",
    label_column: str | None = None,
    bit_depth: int | None = None,
    on_error: str = "fail",
    max_pixels: int = MAX_PIXELS,
) -> Source:
    """Open the pictures that `spec` names: `digits`, `digits-placed` (a folder of that name is ./digits), `-`, a path.

    With on_error skip an incomplete set is read as far as it goes; the rest is in records.Wanted. Raises PixseqError if
    it does not exist, is nothing known or more than one thing, is damaged, or lacks `split`.
    """
    opened = open_any(spec, split, label_column, bit_depth, on_error, max_pixels)
    if isinstance(opened, TokenSource):
        raise PixseqError(
            f"{opened.ids} holds {opened.ids.dtype} {list(opened.ids.shape)}: palette ids, which are no pictures",
            "`pixseq encode` makes tokens of it; if they are pixels, save them as uint8",
        )
    return opened


def open_any(
    spec: str,
    split: str = "train",
    label_column: str | None = None,
    bit_depth: int | None = None,
    on_error: str = "fail",
    max_pixels: int = MAX_PIXELS,
) -> Source | TokenSource:
    """The same, of pictures or of palette ids."""
    wanted = Wanted(split, label_column, bit_depth, on_error == "skip", max_pixels)
    opened = _open(spec, wanted)
    if wanted.labels and label_column is not None and opened.name not in WITH_COLUMNS:
        raise UsageError(
            f"--label-column {shown(label_column)}: {shown(spec)} ({opened.name}) has no columns",
            "leave it out, or read no labels with --label-column none",
        )
    if not wanted.labels and isinstance(opened, Source):
        return replace(opened, has_labels=False, class_names=None, labels_from="none were asked for")
    return opened


def _open(spec: str, wanted: Wanted) -> Source | TokenSource:
    if spec == "digits":
        return digits.open_digits(wanted.split)
    if spec == "digits-placed":
        return digits.open_placed(wanted.split)
    if spec == "-":
        return folders.open_stdin(wanted.split)
    check_there(spec)
    path = Path(spec)
    if path.is_dir():
        return _open_folder(path, wanted)
    if not path.is_file():
        raise PixseqError(f"{shown(path)} is neither a file nor a folder", ACCEPTED)
    return _open_file(path, wanted)


def check_there(spec: str) -> None:
    """Raises PixseqError where `spec` names a path with nothing at it."""
    path = Path(spec)
    if spec not in NO_PATHS and not path.exists():
        if "://" in spec:
            raise PixseqError(f"{shown(spec)} is no path", "nothing is downloaded: fetch it first, then name it")
        beside = os.listdir(path.parent) if os.access(path.parent, os.R_OK) else []
        close = difflib.get_close_matches(path.name, [*beside, *NO_PATHS[:2]], 1)
        raise PixseqError(
            f"{shown(path)} does not exist",
            f"did you mean {shown(path.with_name(close[0]))}?" if close else f"nothing is downloaded; {ACCEPTED}",
        )


def _open_file(path: Path, wanted: Wanted) -> Source | TokenSource:
    kind = kind_of(path)
    if kind in ("npy", None) and token_files.holds_ids(path):
        return token_files.open_ids(path, wanted.split)
    if ids := token_files.ids_of_labels(path):
        raise PixseqError(f"{shown(path)} holds the labels of a set", f"name its palette ids: {shown(ids)}")
    if kind == "tar":
        if cifar.is_archive(path):
            return cifar.open_cifar(path, wanted)
        return webdataset.open_webdataset(path, wanted, [path])
    if kind == "idx-images":
        return binary.open_idx(path, binary.idx_siblings(path), wanted)
    if kind == "zip" and not zips.holds_arrays(path):
        return zips.open_zip(path, wanted.split)
    if kind in ("npy", "zip"):
        return arrays.open_arrays(path, wanted, [path])
    if kind == "parquet":
        return parquet.open_parquet(path, wanted, [path])
    if kind == "picture":
        return folders.open_paths(str(path), [str(path)], wanted.split)
    sets = (cifar.BATCH, binary.STL, downsampled.BATCH)
    if any(each.fullmatch(path.name) for each in sets):
        raise PixseqError(f"{shown(path)} is one file of a set", f"name the folder that holds it: {shown(path.parent)}")
    refusals.refuse_file(path)
    raise PixseqError(f"{shown(path)} is no source of images that pixseq knows", ACCEPTED)


def _open_folder(path: Path, wanted: Wanted) -> Source | TokenSource:
    for artifact in ("zarr.json", "manifest.json"):
        if (path / artifact).is_file():
            raise PixseqError(f"{shown(path)} is an artifact or zarr store, not a source of images", ACCEPTED)
    seen = DiskTree()
    path, found = _inmost(path, seen)
    labels = found.pop("idx labels", [])
    if labels and not found and not any(entry.is_dir() for entry in path.iterdir()):
        found["idx images"] = []  # to be told that they lack
    if "palette ids" in found:
        found.pop("npy", None)  # OpenAI's palette is one, and may lie beside its data
    if len(found) > 1:
        both = " and ".join(f"{name} ({shown(files[0].name)})" for name, files in sorted(found.items()))
        raise PixseqError(f"{shown(path)} holds {both}", "name the file itself, or a folder with only one of them")
    name, files = found.popitem() if found else ("pictures", [])
    if name == "CIFAR":
        return cifar.open_cifar(path, wanted)
    if name == "Downsampled ImageNet":
        return downsampled.open_downsampled(path, wanted, files)
    if name == "STL-10":
        return binary.open_stl10(path, wanted.split)
    if name == "idx images":
        return binary.open_idx(path, {"images": files, "labels": labels}, wanted)
    if len(files) == 1 and (name in ("npy", "npz", "zip") or (name == "tar" and cifar.is_archive(files[0]))):
        return _open_file(files[0], wanted)
    if name == "palette ids":
        return token_files.open_set(path, files, wanted.split)
    if name in ("npz", "npy"):
        return arrays.open_arrays(path, wanted, files)
    if name == "zip":
        raise PixseqError(f"{shown(path)} holds {len(files)} zips: {few([f.name for f in files])}", "name one of them")
    if name == "parquet":
        return parquet.open_parquet(path, wanted, files)
    if name == "tar":
        return webdataset.open_webdataset(path, wanted, files)
    return folders.open_folder(path, wanted.split, seen.listings)


def _inmost(path: Path, seen: Tree, depth: int = 0) -> tuple[Path, dict[str, list[Path]]]:
    """Down to the only folder that holds files of a format (MNIST/raw, a Hugging Face repository's data/), and these.

    Raises PixseqError where more than one does, and for what is known but not read. Folders of pictures stay as they
    are: what their folders mean is in layout.py.
    """
    found, top = _formats(path, seen), seen.listing(str(path))
    refusals.refuse_folder(path, top, found)
    if found or len(top.folders) > MOST_FOLDERS or depth == DEEPEST:
        return path, found
    # Hugging Face's cache of downloads keeps each file in blobs, and what it is called in snapshots.
    named = ["snapshots"] if {"blobs", "snapshots"} <= set(top.folders) else top.folders
    inside = {name: _inmost(path / name, seen, depth + 1) for name in named}
    sources = {name: each for name, each in inside.items() if each[1].keys() - {"pictures", "idx labels"}}
    if len(sources) == 1:
        return next(iter(sources.values()))
    if sources:
        raise refusals.several(path, {name: next(iter(sorted(each[1]))) for name, each in sources.items()})
    return path, found


def _formats(path: Path, seen: Tree) -> dict[str, list[Path]]:
    """The files of each format in a folder or in its train/ and test/ folders."""
    found: dict[str, list[Path]] = {}
    for folder in [path, *(path / name for name in seen.listing(str(path)).folders if split_of(name))]:
        listing = seen.listing(str(folder))
        if len(listing.pictures):
            found.setdefault("pictures", []).append(folder / os.fsdecode(listing.pictures[0]))
        for name in listing.unclear:
            file = folder / name
            format = _format(file)
            if format:
                found.setdefault(format, []).append(file)
            else:
                refusals.refuse_broken(file)
    return found


def _format(file: Path) -> str | None:
    """Raw binaries have no magic number: CIFAR's and STL-10's are told by their names, and checked when read."""
    if binary.STL.fullmatch(file.name):
        return "STL-10"
    if token_files.NAME.fullmatch(file.name):
        if token_files.holds_ids(file):
            return "palette ids"
        if token_files.ids_of_labels(file):
            return None
    batch, kind = cifar.BATCH.fullmatch(file.name), kind_of(file)
    if batch and (batch["binary"] or "batch" in file.name or kind == "pickle"):
        return "CIFAR"
    if downsampled.BATCH.fullmatch(file.name) and kind == "pickle":
        return "Downsampled ImageNet"
    if kind == "zip":
        return "npz" if zips.holds_arrays(file) else "zip"
    if kind is None or kind == "pickle":
        return None
    return {"idx-images": "idx images", "idx-labels": "idx labels"}.get(kind, kind)
