"""Well-known forms of data that are no source here: said by name, with the way out."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pixseq.bounded.files import open_regular
from pixseq.data.records import reading
from pixseq.data.sniff import HEAD_BYTES, NOT_READ, TEXT_SUFFIXES, kind_of, special
from pixseq.data.tree import Listing
from pixseq.errors import PixseqError
from pixseq.text import few, shown

POINTERS = {"Git LFS pointer", "git-annex pointer"}
# Endings of files that are a source if they hold what they say.
SHARDS = (".parquet", ".tar", ".npz", ".npy", ".tgz", ".zip", ".gz", ".bin")
DECLARED = re.compile(
    r".+[.](parquet|tar|tgz|npz|npy|zip)|.+[.]tar[.]gz|.*(images|labels)[.-]idx[13]\b.*", re.IGNORECASE
)


def refuse_broken(file: Path) -> None:
    """Raises PixseqError for a file of a name that says which format it has, and of content that has none: what it held
    would be missing without a word.
    """
    if DECLARED.fullmatch(file.name) and kind_of(file) is None:
        refuse_file(file)
        raise PixseqError(
            f"{shown(file)} is damaged: it does not begin as its name says",
            "copy or download it again, or move it away",
        )


def refuse_file(file: Path) -> None:
    """Raises PixseqError if a file is something known that is not read, empty, or not what its name says."""
    with reading(file), open_regular(file) as handle:
        head = handle.read(HEAD_BYTES)
    if not head:
        raise PixseqError(f"{shown(file)} is damaged: it is empty", "copy or download it again")
    if kind_of(file) == "idx-labels":
        raise PixseqError(f"{shown(file)} holds the labels of a set", "name the file of its images, beside it")
    kind = special(head)
    if kind in NOT_READ:
        what, _, hint = NOT_READ[kind].removeprefix("it ").partition(": ")
        raise PixseqError(f"{shown(file)} {what}", hint or None)
    if ".tfrecord" in file.name:
        raise PixseqError(f"{shown(file)} is TFRecord, which is not read", "write it as .tar shards or as parquet")
    if file.suffix == ".arrow":
        raise PixseqError(
            f"{shown(file)} is an Arrow file, which is not read",
            f"write it as parquet: datasets.Dataset.from_file({str(file)!r}).to_parquet('{file.stem}.parquet')",
        )
    if kind_of(file) == "pickle":
        raise PixseqError(
            f"{shown(file)} is a pickle, which is not read, since it may run code", "save its arrays as .npz"
        )
    if file.suffix.lower() in TEXT_SUFFIXES:
        raise PixseqError(
            f"{shown(file)} is a table or text, which holds no pictures",
            "a list of paths comes by standard input: cut it to paths and pipe it into SOURCE -",
        )


def refuse_folder(path: Path, listing: Listing, found: Mapping[str, list[Path]]) -> None:
    """Raises PixseqError for a folder with a data set in a form that is not read, and for shards that are none."""
    names, unclear = set(listing.others), listing.unclear
    if "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= names:
        loaded = f"datasets.load_from_disk({str(path)!r})" + ('["train"]' if "dataset_dict.json" in names else "")
        raise PixseqError(
            f"{shown(path)} is a data set that `datasets` saved with save_to_disk (Arrow files), which is not read",
            f"write it as parquet: {loaded}.to_parquet('train.parquet')",
        )
    if any(".tfrecord" in name for name in names):
        refuse_file(path / next(name for name in listing.others if ".tfrecord" in name))
    for name in unclear:
        if (path / name).is_file() and (path / name).stat().st_size <= HEAD_BYTES:
            with reading(path / name), open_regular(path / name) as handle:
                if special(handle.read(HEAD_BYTES)) in POINTERS:
                    refuse_file(path / name)
    for name in os.listdir(path):
        if name.endswith(SHARDS) and (path / name).is_symlink() and not (path / name).exists():
            raise PixseqError(
                f"{shown(path / name)} is a link to a file that is not there",
                "download it again, or fetch it with `git annex get` where git-annex made the link",
            )
    read = {file.name for files in found.values() for file in files}
    for name in unclear:
        if name.endswith(SHARDS) and name not in read:
            refuse_file(path / name)


def refuse_others(others: Sequence[str]) -> None:
    """Raises PixseqError if one of the files of a folder without pictures is something known that is not read."""
    for file in map(Path, others):
        if file.suffix.lower() not in TEXT_SUFFIXES and file.is_file() and file.stat().st_size:
            refuse_file(file)


def several(path: Path, inside: Mapping[str, str]) -> PixseqError:
    """Of folders that are sources each: `inside` says what each holds."""
    configurations = set(inside.values()) == {"parquet"}
    what = "configurations of a data set" if configurations else "sources"
    held = [f"{name} ({form})" for name, form in inside.items()]
    return PixseqError(
        f"{shown(path)} holds {len(inside)} {what}: {few(inside if configurations else held)}",
        f"name the one that you mean, such as {shown(path / next(iter(inside)))}",
    )
