"""Tars of pictures: WebDataset shards, where the members of one sample follow each other (key.jpg, key.cls, key.json),
and tars of class folders.

A tar is read as a stream. Nothing is extracted, links and devices are passed over, which is said of pictures, and a
member's name is only ever a key and a text for messages.
"""

from __future__ import annotations

import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np

from pixseq.bounded.files import open_regular
from pixseq.bounded.structure import parse_json
from pixseq.bounded.tars import open_tar
from pixseq.data import labels, layout
from pixseq.data.folders import as_source
from pixseq.data.records import ImageFile, NoSuchSplit, Source, Wanted, reading
from pixseq.data.shards import shards_of_split, splits_of
from pixseq.data.sniff import PICTURE_SUFFIXES
from pixseq.data.split_names import split_of
from pixseq.data.tree import ArchiveTree, debris_in
from pixseq.errors import PixseqError
from pixseq.text import few, shown

MAX_MEMBER_BYTES = 1 << 28  # 256 MiB: no picture of 64 megapixels needs more
MAX_LABEL_BYTES = 1 << 20  # of a .cls or a .json
LABEL_FIELDS = ("cls", "label", "class", "target")  # endings of members with one label
NOT_LABELS = {"width", "height", "url", "key", "status", "error_message", "exif", "sha256", "md5"}  # as img2dataset
OTHERS_LOOKED_AT = 20  # members that may name what holds the labels
OTHERS_LISTED = 1000  # members that are looked at to say what a tar without pictures holds


@dataclass
class Links:
    """Members named as pictures that are links or devices."""

    count: int = 0
    first: str = ""

    def add(self, name: str) -> None:
        self.count, self.first = self.count + 1, self.first or name

    def notes(self, path: Path) -> list[str]:
        if not self.count:
            return []
        what = "1 picture is a link or no file" if self.count == 1 else f"{self.count:,} pictures are links or no files"
        how = "pack such as files with tar --dereference --hard-dereference"
        return [f"{shown(path)}: {what}, and passed over, such as {shown(self.first)}; {how}"]


def open_webdataset(path: Path, wanted: Wanted, files: list[Path]) -> Source:
    """One .tar or a folder of shards. How many pictures there are shows only when all have streamed by."""
    of_all_splits = files
    try:
        split, files, notes = shards_of_split(path, files, wanted)
    except NoSuchSplit:  # the split may be a folder inside
        named = path.is_dir() and None not in splits_of(path, files)[0]
        if named or (source := _of_folders(path, files, wanted.split)) is None:
            raise
        return source
    for file in files:
        _check_end(file)
    first = next(_samples(files[0], wanted), None)
    if first is None:
        raise PixseqError(
            f"{shown(files[0])} holds no pictures{_instead(files[0])}",
            "a sample is key.jpg (or png, webp ...) with key.cls or key.json",
        )
    name, _, label = first
    if label is None and "/" in name.partition(": ")[2]:
        whole = split == "all" or path.is_file()
        as_folders = _of_folders(path, files, wanted.split) if whole else _of_splits(path, of_all_splits, split)
        if as_folders is not None:
            return replace(as_folders, notes=[*notes, *as_folders.notes])
    links = Links()
    found = _survey(files, of_all_splits, wanted, links) if wanted.labels else None
    if found is not None:
        notes += found.notes + links.notes(path)
    has_labels = found is not None and found.codes is not None
    classes = None if found is None else found.classes

    def read(start: int, stop: int | None) -> Iterator[ImageFile]:
        samples = (sample for file in files for sample in _samples(file, wanted))
        for name, data, value in islice(samples, start, stop):
            numbered = found is not None and has_labels and value is not None
            yield ImageFile(name, data, _number(name, value, classes) if numbered else None)

    why = "the .cls or .json members"
    if not has_labels:
        could = _could_be(files[0]) if wanted.labels else []
        why = "no member .cls, or key of a .json, holds any"
        why += f"; could be: {few(could)} (--label-column NAME)" if could else ""
    names, count, known = None, None, None
    if found is not None:
        names = [shown(name) for name in found.classes] if found.classes else None
        count, known = found.count, (lambda: np.array(found.codes)) if has_labels else None
    return Source(
        "webdataset", str(path), split, count, names, has_labels, read, notes, known, labels_from=why, files=files
    )


@dataclass(frozen=True)
class MemberLabels:
    """What all `count` samples of a split say: `classes` numbers their labels where some are texts, None: numbers.

    `codes` tell the labels of all samples apart, -1 where there is none; None where no sample has one.
    """

    count: int
    classes: dict[str, int] | None
    codes: array | None
    notes: list[str]


def _survey(files: list[Path], of_all_splits: list[Path], wanted: Wanted, links: Links) -> MemberLabels:
    """One pass over the labels, in which no picture is read where the tar is not compressed.

    Texts are numbered over all splits, so that a class that one of them lacks shifts no label. Raises PixseqError for
    values that are no classes, and, unless `wanted.skip`, for samples without a label among others.
    """
    met: dict[labels.Value, tuple[int, str]] = {}  # a label: its code, and the first picture that has it
    codes, bare, texts = array("q"), None, False
    for name, value in _values(files, wanted, links):
        if value is None:
            bare = bare or name
        elif not isinstance(value, str | int | float):
            _number(name, value, None)  # raises
        else:
            texts = texts or isinstance(value, str)
            met.setdefault(value, (len(met), name))
        codes.append(-1 if value is None else met[value][0])
    if not met:
        if wanted.label_column is not None:
            raise PixseqError(
                f"{shown(bare)} has no label {shown(wanted.label_column)}: no member .{shown(wanted.label_column)} "
                "beside it, or key of a .json, holds one, here or in the other samples",
                "name the ending of a member, or a key of the .json members; --label-column none reads no labels",
            )
        return MemberLabels(len(codes), None, None, [])
    classes = None
    if texts:
        elsewhere = [file for file in of_all_splits if file not in files]
        others = {str(value) for _, value in _values(elsewhere, wanted) if value is not None}
        names = labels.names_of({*map(str, met), *others})
        classes = {text: i for i, text in enumerate(names)} if names else None
    for value, (_, name) in met.items():
        _number(name, value, classes)
    if bare is None:
        return MemberLabels(len(codes), classes, codes, [])
    said = (
        f"{shown(bare)} has no label: {codes.count(-1)} of {len(codes)} pictures have none, or one that is empty or -1"
    )
    if wanted.skip:
        return MemberLabels(len(codes), classes, codes, [f"{said}; they are passed over"])
    raise PixseqError(said, "pass over such pictures with --on-error skip, or read no labels with --label-column none")


def _values(files: list[Path], wanted: Wanted, links: Links | None = None) -> Iterator[tuple[str, labels.Value]]:
    """The name of every picture, and its label."""
    for file in files:
        for name, _, value in _samples(file, wanted, pictures=False, links=links):
            yield name, value


# -------------------------------------------------------------------------------------------------- tars of folders


def _of_folders(path: Path, files: list[Path], wanted: str) -> Source | None:
    """Tars of class folders, by the same rules as folders on a disk; None where its members are WebDataset's samples,
    of one key each, or where pictures lie beside folders.
    """
    return _chosen(path, {"": files}, wanted)


def _of_splits(path: Path, files: list[Path], split: str) -> Source | None:
    """The same of tars that are splits by their names, as if each lay unpacked in a folder of its split."""
    groups, _ = splits_of(path, files)
    return _chosen(path, {f"{name}/": group for name, group in groups.items()}, split)


def _chosen(path: Path, tars: dict[str, list[Path]], wanted: str) -> Source | None:
    """`tars` by the folder that their members lie in: that of their split, or none. Raises PixseqError for two pictures
    of one name: tars that hold the same may be shards, folds or copies.
    """
    held: dict[str, Path] = {}
    twice, links = None, Links()
    for folder, file in ((folder, file) for folder, files in tars.items() for file in files):
        for name in _names(file, links):
            if folder + name in held and _is_picture(name):
                twice = twice or (name, held[folder + name].name, file.name)
            held[folder + name] = file
    pictures = {name.rpartition(".")[0] for name in held if _is_picture(name)}
    if any(not _is_picture(name) and name.rpartition(".")[0] in pictures for name in held):
        return None
    tree, ours = ArchiveTree(held, path), f"{wanted}/"
    known = tree.folders("") if ours in tars else []
    root = "" if known else layout.archive_root(tree)
    if len(tree.listing(root).pictures) or (known and wanted not in known):
        return None
    if twice is not None:
        name, first, second = map(shown, twice)
        raise PixseqError(
            f"{shown(path)}: {name} is there twice, in {first} and in {second}",
            "unpack it and name the folder" if first == second else "name one tar, or give pictures other names",
        )
    chosen = layout.choose(tree, root, path, wanted, known, split_of(path.name) if path.is_file() else None)
    label_of = {within: label for within, _, label in chosen.pictures}
    labelled = {name: label_of[within] for (within, _), name in tree.members.items() if within in label_of}
    folder, files = (ours, tars[ours]) if known else ("", tars[""])

    def read(start: int, stop: int | None) -> Iterator[ImageFile]:
        return islice(_in_order(), start, stop)

    def _in_order() -> Iterator[ImageFile]:
        for file in files:
            for name, data in _members(file):
                if folder + name in labelled:
                    yield ImageFile(f"{file}: {name}", data, labelled[folder + name])

    source = as_source("tar", path, chosen, read)
    in_order = (lambda: np.array(list(labelled.values()), np.int64)) if source.has_labels else None
    notes = [*source.notes, *links.notes(path)]
    return replace(source, labels=in_order, files=files, shares=not known, notes=notes)


def _names(file: Path, links: Links | None = None) -> Iterator[str]:
    """The names of a tar's files: of one that is not compressed without reading what they hold."""
    with reading(file), open_tar(file, _mode(file)) as tar:
        for member in tar:
            cast(Any, tar).members = []
            if member.isfile():
                yield member.name
            elif links is not None and _is_lost(member):
                links.add(member.name)


def _mode(file: Path) -> Literal["r:", "r|*"]:
    """How to open a tar so that members can be passed over: one that is not compressed by seeking."""
    with reading(file), open_regular(file) as handle:
        return "r|*" if handle.read(262)[257:] != b"ustar" else "r:"


# ------------------------------------------------------------------------------------------------------------ samples

Sample = tuple[str, bytes, labels.Value]  # the picture's name, the picture, its label


def _samples(file: Path, wanted: Wanted, pictures: bool = True, links: Links | None = None) -> Iterator[Sample]:
    """The samples of a shard that hold a picture. A key is the name up to the first dot of its last part.

    Without `pictures` these are empty.
    """
    key: tuple[str, str] | None = None
    fields: dict[str, tuple[str, bytes]] = {}
    for name, data in _members(file, wanted.label_column, pictures, links):
        folder, slash, base = name.rpartition("/")
        stem, _, field = base.partition(".")
        if (folder, stem) != key:
            yield from _sample(fields, wanted)
            key, fields = (folder, stem), {}
        role = "picture" if _is_picture(name) else field.lower()
        if role in fields:
            raise PixseqError(
                f"{shown(file)}: {shown(name)} is a second {role} of sample {shown(folder + slash + stem)}",
                "a key ends at its first dot: rename the members",
            )
        fields[role] = (f"{file}: {name}", data)
    yield from _sample(fields, wanted)


def _sample(fields: dict[str, tuple[str, bytes]], wanted: Wanted) -> Iterator[Sample]:
    if "picture" in fields:
        name, data = fields["picture"]
        yield name, data, _label(fields, wanted.label_column) if wanted.labels else None


def _label(fields: dict[str, tuple[str, bytes]], column: str | None) -> labels.Value:
    for role in LABEL_FIELDS if column is None else (column.lower(),):
        if role in fields:
            text = fields[role][1].decode("utf-8", "replace").strip()
            return None if labels.is_missing(text) else text
    if "json" in fields:
        name, data = fields["json"]
        try:
            content = parse_json(data, finite=False)
        except ValueError as error:
            raise PixseqError(f"{shown(name)} is no JSON: {shown(error)}", "mend or remove it") from None
        if isinstance(content, dict) and column is None:
            content = {key.lower(): value for key, value in reversed(content.items())}
        for key in labels.NAMES if column is None else (column,):
            if isinstance(content, dict) and key in content:
                return None if labels.is_missing(content[key]) else content[key]
    return None


def _could_be(file: Path) -> list[str]:
    """What may hold labels besides: the endings of the first members, and the keys of a .json with one value each."""
    found: dict[str, None] = {}
    with reading(file), open_tar(file, _mode(file)) as tar:
        for member in islice(tar, OTHERS_LOOKED_AT):
            field = member.name.rpartition("/")[2].partition(".")[2].lower()
            if not member.isfile() or not field or _is_picture(member.name) or debris_in(member.name) is not None:
                continue
            if field != "json":
                found[field] = None
            elif member.size <= MAX_LABEL_BYTES:
                found |= dict.fromkeys(_keys(cast(IO[bytes], tar.extractfile(member)).read()))
    return list(found)


def _keys(data: bytes) -> list[str]:
    """The keys of JSON whose values could be a class."""
    try:
        content = parse_json(data, finite=False)
    except ValueError:
        return []
    fields = content.items() if isinstance(content, dict) else ()
    return [key for key, value in fields if isinstance(value, str | int | float) and key.lower() not in NOT_LABELS]


def _number(name: str, value: labels.Value, classes: dict[str, int] | None) -> int:
    try:
        return int(np.int32(labels.number(value if classes is None else str(value), classes)))
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise PixseqError(
            f"{shown(name)} holds no label: {shown(error)}", "a label is a whole number from 0, or all are texts"
        ) from None


def _members(
    file: Path, column: str | None = None, pictures: bool = True, links: Links | None = None
) -> Iterator[tuple[str, bytes]]:
    """Pictures and labels (those that end in `column` too) in a tar, in its order, without what systems leave there.

    Without `pictures` these are empty. `links` counts what would be a picture.
    """
    fields = (*LABEL_FIELDS, "json", *([] if column is None else [column.lower()]))
    with reading(file), open_tar(file, "r|*" if pictures else _mode(file)) as tar:
        for member in tar:
            cast(Any, tar).members = []  # tarfile would keep every header it has seen
            field, picture = member.name.rpartition("/")[2].partition(".")[2].lower(), _is_picture(member.name)
            if links is not None and _is_lost(member):
                links.add(member.name)
            if not member.isfile() or not (picture or field in fields):
                continue
            if debris_in(member.name) is not None:
                continue
            most = MAX_MEMBER_BYTES if picture else MAX_LABEL_BYTES
            if member.size > most:
                raise ValueError(f"{member.name} declares {member.size:,} bytes, more than the {most:,} that are read")
            if picture and not pictures:
                yield member.name, b""
                continue
            data = cast(IO[bytes], tar.extractfile(member)).read()
            if len(data) < member.size:
                raise EOFError(f"{member.name} is cut short")
            yield member.name, data


def _is_lost(member: tarfile.TarInfo) -> bool:
    """Whether it is named as a picture and is no file, such as one of several names of a file."""
    left = member.isfile() or member.isdir() or not _is_picture(member.name)
    return not left and debris_in(member.name) is None


def _is_picture(name: str) -> bool:
    base = name.rpartition("/")[2]
    return "." in base and "." + base.lower().rpartition(".")[2] in PICTURE_SUFFIXES


def _instead(file: Path) -> str:
    """What a tar without pictures holds."""
    names = list(islice(_names(file), OTHERS_LISTED))
    packed = [name for name in names if name.endswith((".tar", ".tar.gz", ".tgz", ".zip"))]
    if packed:
        return f", but archives, such as {shown(packed[0])}: unpack it"
    return f", but {few(names)}" if names else ""


def _check_end(file: Path) -> None:
    """tarfile takes a tar cut between two members for a whole one; but a whole one ends in a block of zeros."""
    with reading(file), open_regular(file) as handle:
        if handle.read(262)[257:] == b"ustar":  # else compressed: then the checksum tells
            handle.seek(-min(512, file.stat().st_size), 2)
            if handle.read().strip(b"\0"):
                raise EOFError("the tar is cut short")
