"""Pictures in .npy and .npz files: uint8 (uint16 is scaled), [N, H, W], [N, H, W, 1 or 3], [N, 1 or 3, H, W] or rows.

Files are streamed, never loaded whole or mapped: a header says shape and type, blocks of rows follow.
Keys in an .npz, and the names of .npy files in a folder, are told by their words: images, x, data ... and labels, y
...; x_train and test_images carry a split.
"""

from __future__ import annotations

import contextlib
import math
import re
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from pixseq.bounded.files import open_regular
from pixseq.bounded.numpy_files import read_header
from pixseq.data import labels
from pixseq.data.binary import check_packed, check_pixels, labelled, stream_rows
from pixseq.data.decode import NARROW, to_bytes
from pixseq.data.records import NO_LABELS, SPLITS, Pixels, Source, Wanted, pick_split, reading, spans
from pixseq.data.shards import incomplete, shards_of_split
from pixseq.data.split_names import canonical, split_of
from pixseq.data.tree import is_debris
from pixseq.errors import PixseqError
from pixseq.text import few, shown

IMAGE_KEYS = {"images", "image", "imgs", "x", "data", "arr_0"}
LABEL_KEYS = {*labels.NAMES, "arr_1"} - {"classes", "categories"}  # here these are names of classes
CLASS_NAME_KEYS = {"class_names", "label_names"}
DOWNSAMPLED = re.compile(r"(train_data_batch_\d+|val_data)\.npz")  # Downsampled ImageNet's, with classes from 1
MOST_LABEL_BYTES = 1 << 27  # of an array that is held whole: 16 million labels of 8 bytes
MOST_TEXTS = 1 << 22  # labels that are texts, each of which Python holds apart
MOST_FORTRAN_BYTES = 1 << 28
Notes = list[str]


@dataclass(frozen=True)
class Member:
    """One array in a file, known by its header: `key` is None for a whole .npy, `offset` is where its bytes begin."""

    file: Path
    key: str | None
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    offset: int

    def __str__(self) -> str:
        return shown(self.file) if self.key is None else f"{shown(self.file)}[{shown(self.key)}]"

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        with reading(self), contextlib.ExitStack() as stack:
            if self.key is None:
                yield stack.enter_context(open_regular(self.file))
            else:
                archive = stack.enter_context(zipfile.ZipFile(self.file))
                yield cast(BinaryIO, stack.enter_context(archive.open(f"{self.key}.npy")))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self, most: int = MOST_LABEL_BYTES) -> np.ndarray:
        """The whole array. Raises PixseqError where it has more than `most` bytes."""
        if max(self.nbytes, math.prod(self.shape)) > most:
            raise PixseqError(f"{self} has {self.nbytes:,} bytes, more than the {most:,} that are held in memory")
        with self.open() as handle:
            return np.lib.format.read_array(handle, allow_pickle=False)

    def rows(self, low: int, high: int) -> Iterator[np.ndarray]:
        if self.fortran:  # the bytes of one image are then scattered over the file: there is no way but to hold it
            if self.nbytes > MOST_FORTRAN_BYTES:
                raise PixseqError(
                    f"{self} is in Fortran order, which has to be held whole, and has {self.nbytes:,} bytes",
                    "save it again in C order: numpy.ascontiguousarray",
                )
            yield self.load(MOST_FORTRAN_BYTES)[low:high]
            return
        with self.open() as handle:
            handle.seek(self.offset + low * math.prod(self.shape[1:]) * self.dtype.itemsize)
            yield from stream_rows(handle, self.dtype, self.shape[1:], high - low, to_end=high == self.shape[0])


Members = Mapping[str | None, Member]  # the arrays of a file by key


@dataclass(frozen=True)
class LabelledImages:
    """The images of one split in one file: `arrange` makes their rows uint8 [n, H, W] or [n, H, W, 3]."""

    images: Member
    arrange: Callable[[np.ndarray], np.ndarray]
    labels: np.ndarray | None
    class_names: list[str] | None
    labels_from: str


def open_arrays(path: Path, wanted: Wanted, files: list[Path]) -> Source:
    """One .npy with the labels beside it, one .npz, the .npz shards of a folder (as Downsampled ImageNet comes), or its
    .npy files, one an array.
    """
    notes: Notes = []
    if path.is_dir() and files[0].suffix != ".npy":
        of_all_splits = files
        split, files, notes = shards_of_split(path, files, wanted)
        members = [_members(file) for file in files]
        # Texts are numbered over all splits, so that a class that one of them lacks shifts no label.
        if texts := _label_texts(members, wanted):
            texts |= _label_texts(map(_members, sorted(set(of_all_splits) - set(files))), wanted)
        found = [_parts(file, each, wanted, texts) for file, each in zip(files, members)]
        if any(list(each) != [None] for each in found):
            raise PixseqError(f"{shown(path)}: its .npz files hold splits of their own", "name one of the files")
        chosen = [each[None] for each in found]
        notes += _check_batches(path, files, wanted.skip)
    else:
        named_arrays: Members = {file.stem: npy_member(file) for file in files} if path.is_dir() else _members(path)
        each = _parts(path, named_arrays, wanted, _label_texts([named_arrays], wanted))
        named = split_of(path.name)
        by_name = list(each) == [None] and named == canonical(wanted.split)
        split = (
            named if named is not None and by_name else pick_split(path, [name for name in each if name], wanted.split)
        )
        chosen = [each[split if split in each else None]]

    counts = [part.images.shape[0] for part in chosen]
    if len({part.labels is None for part in chosen}) > 1:
        raise PixseqError(f"{shown(path)}: some of its files have labels, others have none", "name files of one kind")
    if any(part.class_names != chosen[0].class_names for part in chosen):
        raise PixseqError(f"{shown(path)}: its files have other classes each", "name one of the files")
    targets = None if chosen[0].labels is None else np.concatenate([part.labels for part in chosen])
    why = chosen[0].labels_from
    if targets is not None and (without := np.flatnonzero(targets == -1)).size:
        of = f"{len(without)} of {len(targets)} of {why} are empty or -1"
        notes += _without_labels(path, int(without[0]), of, wanted.skip) if len(without) < len(targets) else []
        targets, why = (targets, why) if len(without) < len(targets) else (None, of)
    if targets is not None and len(chosen[0].images.shape) == 2:
        official = all(DOWNSAMPLED.fullmatch(part.images.file.name) for part in chosen)
        if (targets.min(), targets.max()) == (1, 1000) or (official and targets.min() > 0):
            targets = targets - 1  # Downsampled ImageNet counts its 1,000 classes from 1

    def read(start: int, stop: int | None) -> Iterator[Pixels]:
        for which, low, high in spans(counts, start, stop):
            part, first = chosen[which], sum(counts[:which]) + low
            yield from labelled((part.arrange(rows) for rows in part.images.rows(low, high)), targets, first)

    name = "npy" if chosen[0].images.key is None else "npz"
    if chosen[0].images.dtype.itemsize == 2:
        notes.append(_sixteen_bits(path, chosen[0].images, wanted.bit_depth))
    seeks = all(part.images.key is None and not part.images.fortran for part in chosen)
    known = None if targets is None else lambda: targets
    names, has_labels = chosen[0].class_names if targets is not None else None, targets is not None
    files, shares = [part.images.file for part in chosen], path.is_file() and list(each) != [None]
    return Source(name, str(path), split, sum(counts), names, has_labels, read, notes, known, seeks, why, files, shares)


def _without_labels(path: Path, first: int, of: str, skip: bool) -> Notes:
    """What is said of images without a label among others. Raises PixseqError unless they are to be passed over."""
    said = f"{shown(path)}: image {first} has no label: {of}"
    if skip:
        return [f"{said}; they are passed over"]
    raise PixseqError(said, "pass over such images with --on-error skip, or read no labels with --label-column none")


def _check_batches(path: Path, files: list[Path], skip: bool) -> Notes:
    """Downsampled ImageNet's training set has ten batches. Raises PixseqError."""
    there = {file.name for file in files}
    if not all(DOWNSAMPLED.fullmatch(name) for name in there) or "val_data.npz" in there:
        return []
    lacking = [name for i in range(1, 11) if (name := f"train_data_batch_{i}.npz") not in there]
    return incomplete(f"{shown(path)} is incomplete: it lacks {few(lacking)}", skip) if lacking else []


def _sixteen_bits(path: Path, member: Member, bit_depth: int | None) -> str:
    """What is said of 16-bit pixels: how they are scaled, and whether that looks wrong."""
    if bit_depth is not None:
        return f"{shown(path)}: its 16-bit pixels are scaled to 8 bits, {(1 << bit_depth) - 1} to 255"
    said = f"{shown(path)}: its 16-bit pixels are scaled to 8 bits (x / 257)"
    most = _first_most(member)
    bits = next((bits for bits in NARROW if most < 1 << bits), None)
    return f"{said}, but the first reach only {most}: if they have {bits} bits, --bit-depth {bits}" if bits else said


def _label_texts(files: Iterable[Members], wanted: Wanted) -> set[str]:
    """The labels of files, by their arrays, that are texts; what is no label left out."""
    if not wanted.labels:
        return set()
    answers = (member for each in files if None not in each for member in _by_role(each, wanted)[1].values())
    return {text for member in answers for text in _texts(member) if not labels.is_missing(text)}


def _parts(path: Path, members: Members, wanted: Wanted, texts: Collection[str]) -> dict[str | None, LabelledImages]:
    """The images of a file, or of a folder of .npy, by the split their keys carry, None where they carry none.

    `texts` are the labels of all that belongs to it.
    """
    if None in members:
        targets = _labels_beside(path, wanted)
        texts = [] if targets is None else [text for text in _texts(targets) if not labels.is_missing(text)]
        return {None: _part(members[None], targets, labels.names_of(texts) if texts else None, wanted)}
    images, answers, class_names = _by_role(members, wanted)
    if not images or (None in images and len(images) > 1):
        held = shown(", ".join(filter(None, members)))
        raise PixseqError(
            f"{shown(path)} does not say which array holds the images: it has {held or 'none'}",
            "name it images, x or data (and its labels: labels or y); add _train and _test if it has splits",
        )
    if wanted.label_column not in (None, NO_LABELS) and not answers:
        raise PixseqError(f"{shown(path)} has no array {shown(wanted.label_column)}: it has {few(members)}")
    if any(member.dtype.kind in "US" for member in answers.values()):
        class_names = (labels.names_of(texts) if texts else None) or class_names
    found = {split: _part(member, answers.get(split), class_names, wanted) for split, member in images.items()}
    if wanted.labels and not answers:
        counts = [member.shape[:1] for member in images.values()]
        could = [key for key, member in members.items() if key and _could_be_labels(member, counts)]
        more = f"; could be: {few(could)} (--label-column NAME)" if could else ""
        found = {split: replace(part, labels_from=part.labels_from + more) for split, part in found.items()}
    return found


def _could_be_labels(member: Member, counts: Sequence[tuple[int, ...]]) -> bool:
    """Whether an array has one value an image of one of the arrays of images."""
    return member.dtype.kind in "iubfUS" and any(member.shape in (count, (*count, 1)) for count in counts)


def _by_role(
    members: Members, wanted: Wanted
) -> tuple[dict[str | None, Member], dict[str | None, Member], list[str] | None]:
    """The arrays of images and of labels by split, and the names of the classes where an array holds them."""
    images: dict[str | None, Member] = {}
    answers: dict[str | None, Member] = {}
    class_names = None
    for key, member in members.items():
        assert key is not None  # of one array alone, which has no labels in its file
        split, role = _role(key)
        if role in CLASS_NAME_KEYS and member.dtype.kind == "U" and len(member.shape) == 1:
            class_names = [shown(name) for name in _texts(member)]
        is_target = role in LABEL_KEYS if wanted.label_column is None else wanted.label_column in (key, role)
        for found, is_one in ((images, role in IMAGE_KEYS and not is_target), (answers, is_target)):
            if is_one and split in found and found is answers and wanted.label_column is None:
                found[split] = min(found[split], member, key=_likeliness)
            elif is_one and split in found:
                raise PixseqError(f"{found[split]} and {member} could both be meant", "leave one of them in the file")
            elif is_one:
                found[split] = member
    return images, answers, class_names


def _role(key: str) -> tuple[str | None, str]:
    """The split and the rest of a key's words: x_train -> train, x."""
    words = [word for word in re.split(r"[^a-z0-9]+", key.lower()) if word]
    split = next((SPLITS[word] for word in words if word in SPLITS), None)
    return split, "_".join(word for word in words if word not in SPLITS)


def _likeliness(member: Member) -> int:
    _, role = _role(member.key or member.file.stem)
    return labels.NAMES.index(role) if role in labels.NAMES else len(labels.NAMES)


def _part(images: Member, targets: Member | None, class_names: list[str] | None, wanted: Wanted) -> LabelledImages:
    arrange = _arrangement(images, wanted.bit_depth, wanted.max_pixels)
    if not wanted.labels:
        return LabelledImages(images, arrange, None, None, "none were asked for")
    if targets is None:
        lacking = "no .npy beside it holds labels" if images.key is None else "no array is called labels or y"
        return LabelledImages(images, arrange, None, None, lacking)
    numbers, names = _labels(images, targets, class_names)
    return LabelledImages(
        images, arrange, numbers, names, shown(targets.file.name if targets.key is None else targets.key)
    )


def _labels_beside(file: Path, wanted: Wanted) -> Member | None:
    """The .npy beside an .npy of images that holds its labels: y_train for x_train, cats_labels for cats, labels."""
    if not wanted.labels:
        return None
    split, role = _role(file.stem)
    rest = _without(role, IMAGE_KEYS)
    found: dict[str, list[Path]] = {}
    for other in sorted(file.parent.glob("*.npy")):
        its_split, its_role = _role(other.stem)
        its_rest = _without(its_role, LABEL_KEYS)
        asked = wanted.label_column == other.stem
        if (
            other == file
            or is_debris(other.name)
            or not (asked or (its_rest != its_role and its_split == split and its_rest in (rest, "")))
        ):
            continue
        found.setdefault("asked" if asked else its_rest, []).append(other)
    if wanted.label_column is not None:
        if "asked" not in found:
            raise PixseqError(f"there is no {shown(wanted.label_column)}.npy beside {shown(file)}")
        return npy_member(found["asked"][0])
    files = found.get(rest) or found.get("") or []
    return min(map(npy_member, files), key=_likeliness, default=None)


def _without(role: str, words: set[str]) -> str:
    """A role less the first part that is one of `words`: cats_labels -> cats."""
    parts = role.split("_")
    for width in (2, 1):
        for i in range(len(parts) - width + 1):
            if "_".join(parts[i : i + width]) in words:
                return "_".join(parts[:i] + parts[i + width :])
    return role


def npy_member(file: Path) -> Member:
    """The array of an .npy, from its header alone. Raises PixseqError where the file's size contradicts it."""
    with reading(file), open_regular(file) as handle:
        return _header(handle, file, None, file.stat().st_size)


def _members(file: Path) -> dict[str | None, Member]:
    """The arrays of a file by key, from their headers alone."""
    with reading(file), open_regular(file) as handle:
        if handle.read(2) != b"PK":
            return {None: npy_member(file)}
        members: dict[str | None, Member] = {}
        with zipfile.ZipFile(handle) as archive:
            for info in archive.infolist():
                if info.filename.endswith(".npy"):
                    check_packed(info)
                    with archive.open(info) as inside:
                        key = info.filename.removesuffix(".npy")
                        members[key] = _header(cast(BinaryIO, inside), file, key, info.file_size)
        return members


def _header(handle: BinaryIO, file: Path, key: str | None, size: int) -> Member:
    try:
        header = read_header(handle, size)
    except ValueError as error:
        raise ValueError(f"{key}: {error}" if key else str(error)) from None
    return Member(file, key, header.shape, header.dtype, header.fortran, header.offset)


def _labels(images: Member, targets: Member, class_names: list[str] | None) -> tuple[np.ndarray, list[str] | None]:
    """Labels int64 [N], -1 where there is none, and the class names; [N, 1] is accepted, as MedMNIST and Keras write
    it.
    """
    count = images.shape[0]
    if targets.dtype.kind not in "iubfUS" or targets.shape not in ((count,), (count, 1)):
        raise PixseqError(
            f"{images} has {count} images, but {targets} is {targets.dtype} {list(targets.shape)}",
            f"labels are whole numbers or texts, one an image: [{count}]; --label-column none reads none",
        )
    values = _texts(targets) or targets.load().reshape(-1)
    if targets.dtype.kind == "f" and np.isinf(values).any():
        raise PixseqError(f"{targets} holds values that are not finite", "--label-column none reads no labels")
    names = [shown(name) for name in class_names] if class_names else None
    if targets.dtype.kind in "iu":
        return np.asarray(values), names
    classes = {name: i for i, name in enumerate(class_names)} if class_names and isinstance(values, list) else None
    if len(values) > MOST_TEXTS:
        raise PixseqError(
            f"{targets} holds {targets.dtype}: of more than {MOST_TEXTS:,} labels, whole numbers are read"
        )
    try:
        each = values if isinstance(values, list) else values.tolist()
        found = [-1 if labels.is_missing(value) else labels.number(value, classes) for value in each]
        numbers = np.array(found, dtype=np.int64)
    except (ValueError, KeyError, OverflowError) as error:
        raise PixseqError(f"{targets}: {error}", "--label-column none reads no labels") from None
    return numbers, names


def _texts(member: Member) -> list[str]:
    """The labels of an array of texts; none of another."""
    if member.dtype.kind not in "US":
        return []
    if math.prod(member.shape) > MOST_TEXTS:
        raise PixseqError(f"{member} holds {math.prod(member.shape):,} texts, more than {MOST_TEXTS:,}")
    values = member.load(MOST_LABEL_BYTES // 2).reshape(-1).tolist()
    return [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values]


def _arrangement(member: Member, bit_depth: int | None, most: int) -> Callable[[np.ndarray], np.ndarray]:
    """How rows of this array become uint8 [n, H, W] or [n, H, W, 3]. Raises PixseqError where that is not clear."""
    if member.dtype not in (np.dtype("u1"), np.dtype("<u2"), np.dtype(">u2")):
        raise PixseqError(
            f"{member} holds {member.dtype}, but pixels are uint8 (or uint16, which is scaled)",
            "nothing says which float is white, and objects are never loaded: save it as uint8, "
            "for 0..1 by (x * 255).round().astype('uint8')",
        )
    shape = member.shape[1:]
    if 0 in member.shape or not member.shape:
        raise PixseqError(f"{member} is empty: {list(member.shape)}")
    to_pixels = _reorder(shape)
    if to_pixels is None:
        raise PixseqError(
            f"{member} has the shape {list(member.shape)}, which is no stack of pictures",
            "[N, H, W], [N, H, W, 3] or [N, 3, H, W] is; so are rows of H*H greys or of 3 planes of H*H",
        )
    check_pixels(member, _pixels(shape), most)
    if member.dtype.itemsize == 1:
        return to_pixels
    if bit_depth is None and _first_most(member) < 256:
        raise PixseqError(
            f"{member} is uint16, but its first pictures stay below 256",
            "save it as uint8, or read it with --bit-depth 8",
        )

    def scaled(rows: np.ndarray) -> np.ndarray:
        if bit_depth is not None and rows.max() >= 1 << bit_depth:
            most = int(rows.max())
            raise PixseqError(
                f"{member} holds the value {most}, beyond --bit-depth {bit_depth}", f"--bit-depth {most.bit_length()}"
            )
        return to_pixels(to_bytes(rows, bit_depth or 16))

    return scaled


def _first_most(member: Member) -> int:
    """The largest value of the first pictures."""
    return int(next(member.rows(0, min(member.shape[0], 16))).max())


def _pixels(shape: tuple[int, ...]) -> int:
    """Of one picture."""
    planes = len(shape) == 1 and 3 * math.isqrt(shape[0] // 3) ** 2 == shape[0]
    coloured = len(shape) == 3 and 3 in (shape[0], shape[-1])
    return math.prod(shape) // (3 if planes or coloured else 1)


def _reorder(shape: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray] | None:
    if len(shape) == 1:  # flattened squares: three planes (as CIFAR and Downsampled ImageNet), or grey
        side = math.isqrt(shape[0] // 3)
        if 3 * side * side == shape[0]:
            return lambda rows: rows.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
        side = math.isqrt(shape[0])
        return (lambda rows: rows.reshape(-1, side, side)) if side * side == shape[0] > 1 else None
    if len(shape) == 2:
        return None if shape[-1] in (1, 3, 4) else (lambda rows: rows)  # [H, W, 3] is one picture, not a stack
    if len(shape) != 3 or (shape[0] in (1, 3)) == (shape[-1] in (1, 3)):
        return None
    if shape[-1] in (1, 3):
        return (lambda rows: rows) if shape[-1] == 3 else (lambda rows: rows[..., 0])
    return (lambda rows: rows.transpose(0, 2, 3, 1)) if shape[0] == 3 else (lambda rows: rows[:, 0])
