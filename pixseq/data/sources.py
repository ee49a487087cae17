"""SOURCE on the command line: what it is, by its content, and opened.

To add a source: a module with an `open_...(path, wanted) -> Source`, and a line in `_open_file` or `_open_folder`.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from pixseq.data import arrays, binary, cifar, digits, folders, parquet, token_files, webdataset
from pixseq.data.records import Encoded, Pixels, Source, shown
from pixseq.data.sniff import kind_of
from pixseq.data.split_names import split_word
from pixseq.data.token_files import TokenSource
from pixseq.data.tree import list_folder
from pixseq.errors import PixseqError

__all__ = ["Encoded", "Pixels", "Source", "TokenSource", "open_any", "open_source"]

ACCEPTED = (
    "a source is digits, a folder of class folders or pictures, CIFAR-10/100 (folder or .tar.gz), MNIST-style idx, "
    "STL-10 binary, .npz, .npy, .parquet, .tar shards, or - for paths on stdin"
)


def open_source(spec: str, split: str = "train") -> Source:
    """Open the pictures that `spec` names: `digits` (the embedded set; a folder of that name is ./digits), `-`, a path.

    Raises PixseqError if it does not exist, is nothing known or more than one thing, is damaged, or lacks `split`.
    """
    opened = open_any(spec, split)
    if isinstance(opened, TokenSource):
        raise PixseqError(
            f"{opened.ids} holds {opened.ids.dtype} {list(opened.ids.shape)}: palette ids, which are no pictures",
            "`pixseq encode` makes tokens of it; if they are pixels, save them as uint8",
        )
    return opened


def open_any(spec: str, split: str = "train") -> Source | TokenSource:
    """The same, of pictures or of palette ids."""
    if spec == "digits":
        return digits.open_digits(split)
    if spec == "-":
        return folders.open_stdin(split)
    path = Path(spec)
    if not path.exists():
        beside = os.listdir(path.parent) if os.access(path.parent, os.R_OK) else []
        close = difflib.get_close_matches(path.name, [*beside, "digits"], 1)
        raise PixseqError(
            f"there is no {shown(path)}", f"did you mean {shown(path.with_name(close[0]))}?" if close else ACCEPTED
        )
    if path.is_dir():
        return _open_folder(path, split)
    if not path.is_file():
        raise PixseqError(f"{shown(path)} is neither a file nor a folder", ACCEPTED)
    return _open_file(path, split)


def _open_file(path: Path, split: str) -> Source | TokenSource:
    kind = kind_of(path)
    if kind in ("npy", None) and token_files.holds_ids(path):
        return token_files.open_ids(path, split)
    if ids := token_files.ids_of_labels(path):
        raise PixseqError(f"{shown(path)} holds the labels of a set", f"name its palette ids: {shown(ids)}")
    if kind == "tar":
        if cifar.is_archive(path):
            return cifar.open_cifar(path, split)
        return webdataset.open_webdataset(path, split, [path])
    if kind == "idx-images":
        return binary.open_idx(path, binary.idx_siblings(path), split)
    if kind in ("npy", "npz"):
        return arrays.open_arrays(path, split, [path])
    if kind == "parquet":
        return parquet.open_parquet(path, split, [path])
    if kind == "picture":
        return folders.open_paths(str(path), [str(path)], split)
    if kind == "pickle" or cifar.BATCH.fullmatch(path.name) or binary.STL.fullmatch(path.name):
        raise PixseqError(f"{shown(path)} is one file of a set", f"name the folder that holds it: {shown(path.parent)}")
    raise PixseqError(f"{shown(path)} is no source of images that pixseq knows", ACCEPTED)


def _open_folder(path: Path, split: str) -> Source | TokenSource:
    for artifact in ("zarr.json", "manifest.json"):
        if (path / artifact).is_file():
            raise PixseqError(f"{shown(path)} is an artifact or zarr store, not a source of images", ACCEPTED)
    found, inner = _formats(path)
    if not found and len(inner) == 1 and _formats(path / inner[0])[0].keys() - {"pictures", "idx labels"}:
        path = path / inner[0]  # MNIST/raw, a Hugging Face repository's data/
        found, _ = _formats(path)
    labels = found.pop("idx labels", [])
    if "palette ids" in found:
        found.pop("npy", None)  # OpenAI's palette is one, and may lie beside its data
    if len(found) > 1:
        both = " and ".join(f"{name} ({shown(files[0].name)})" for name, files in sorted(found.items()))
        raise PixseqError(f"{shown(path)} holds {both}", "name the file itself, or a folder with only one of them")
    name, files = found.popitem() if found else ("pictures", [])
    if name == "CIFAR":
        return cifar.open_cifar(path, split)
    if name == "STL-10":
        return binary.open_stl10(path, split)
    if name == "idx images":
        return binary.open_idx(path, {"images": files, "labels": labels}, split)
    if len(files) == 1 and (name in ("npy", "npz") or (name == "tar" and cifar.is_archive(files[0]))):
        return _open_file(files[0], split)
    if name == "palette ids":
        return token_files.open_set(path, files, split)
    if name == "npz":
        return arrays.open_arrays(path, split, files)
    if name == "npy":
        raise PixseqError(f"{shown(path)} holds {len(files)} .npy files", "name the one that holds the images")
    if name == "parquet":
        return parquet.open_parquet(path, split, files)
    if name == "tar":
        return webdataset.open_webdataset(path, split, files)
    return folders.open_folder(path, split)


def _formats(path: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The files of each format in a folder or in its train/ and test/ folders, and the names of its folders."""
    found: dict[str, list[Path]] = {}
    top = list_folder(str(path))
    for folder in [path, *(path / name for name in top.folders if split_word(name, top.folders))]:
        listing = top if folder == path else list_folder(str(folder))
        if len(listing.pictures):
            found.setdefault("pictures", []).append(folder / os.fsdecode(listing.pictures[0]))
        for name in listing.others:
            file = folder / name
            format = _format(file)
            if format:
                found.setdefault(format, []).append(file)
    return found, top.folders


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
    return {"idx-images": "idx images", "idx-labels": "idx labels"}.get(kind, kind if kind != "pickle" else None)
