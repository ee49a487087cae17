"""Sets that come in several files: which belong to a split, in which order, and which are missing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from pixseq.data.records import Wanted, pick_split
from pixseq.data.split_names import canonical, split_of, split_word
from pixseq.errors import PixseqError
from pixseq.text import few, shown

OF = re.compile(r"(?P<before>.*?)(?P<number>\d+)(?P<of>[-_. ]?of[-_. ]?)(?P<total>\d+)(?P<after>.*)", re.IGNORECASE)
FOLD = re.compile(r"(?<![a-z])fold[-_. ]?\d+(?![-_. ]?\d)", re.IGNORECASE)  # of a cross-validation
MOST_SHARDS = 1 << 20  # of a set: greater numbers are dates and ids
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".!ut", ".tmp")


def shards_of_split(path: Path, shards: Iterable[Path], wanted: Wanted) -> tuple[str, list[Path], list[str]]:
    """The split, its shards (by the word in their names or in their folder's; numbers in numeric order), and notes.

    A single file is read whatever its name says, unless another split than the default is asked of it. Raises
    PixseqError for a set with gaps, which `wanted.skip` makes a note.
    """
    if path.is_file():
        named = split_of(path.name)
        split = named if named == canonical(wanted.split) else pick_split(path, (), wanted.split)
        return split, [path], _one_of_more(path)
    groups, called = splits_of(path, shards)
    asked = called.get(wanted.split) or wanted.split
    split = pick_split(path, [name for name in groups if name], asked)
    files = groups[None if None in groups else split]
    return split, files, check_complete(path, files, wanted.skip)


def splits_of(path: Path, shards: Iterable[Path]) -> tuple[dict[str | None, list[Path]], dict[str, str]]:
    """The shards of each split, None where no name says one, in order; and which splits their folders and sets are.

    The split is a word in the name of a shard or of its folder. Sets of one word (train_small, train_full), or of none
    beside others (seen, unseen), are splits of their own. Raises PixseqError where only some shards name a split.
    """
    ordered = sorted(shards, key=lambda shard: _numeric(shard.relative_to(path)))
    found: dict[str | None, dict[str | None, list[Path]]] = {}
    called: dict[str, str] = {}
    for shard in ordered:
        folder = shard.parent.name if shard.parent != path else ""
        inside = split_word(folder) or split_of(folder)
        word, set_name = inside or split_of(shard.name), None if inside else _set_of(shard)
        called.setdefault(folder, word or "")
        if set_name is not None:
            called.setdefault(set_name, word or set_name)
        found.setdefault(word, {}).setdefault(set_name, []).append(shard)
    groups: dict[str | None, list[Path]] = {}
    for word, sets in found.items():
        several = len(sets) > 1 or (word is None and len(found) > 1)
        for set_name, files in sets.items():
            own = set_name if several and None not in sets else word
            groups.setdefault(own, []).extend(files)
            if own is not None and own == set_name:
                called[own] = own
    if None in groups and len(groups) > 1:
        first = next(group[0] for split, group in groups.items() if split)
        raise PixseqError(
            f"{shown(path)}: {shown(first.name)} names a split, {shown(groups[None][0].name)} does not",
            "give a folder where all shards, or none, carry train or test in their names",
        )
    place = {shard: i for i, shard in enumerate(ordered)}
    return {own: sorted(files, key=place.__getitem__) for own, files in groups.items()}, called


def _set_of(shard: Path) -> str | None:
    """What a shard says that it is of: train_small-00000-of-00002, as Hugging Face names a split's, or fold_1.npz."""
    match = OF.fullmatch(shard.name)
    if match is None:
        return shard.stem if FOLD.search(shard.stem) else None
    return match["before"].rstrip("-_. ") or None


def check_complete(path: Path, files: list[Path], skip: bool) -> list[str]:
    """Nothing where no number of a numbered set is missing; else the note. Raises PixseqError unless `skip`."""
    missing = [name for group in _by_folder(files) for name in _missing(path, group)]
    unfinished = [name for folder in {f.parent for f in files} for name in _unfinished(folder, files)]
    if unfinished and not missing:
        missing = unfinished
    if not missing:
        return []
    found = f"{shown(path)} is incomplete: of {len(files) + len(missing)} files it lacks {few(missing)}"
    if unfinished and unfinished != missing:
        found += f" (unfinished: {few(unfinished)})"
    return incomplete(found, skip)


def incomplete(found: str, skip: bool) -> list[str]:
    """The one answer to a set with gaps: an error that names them, or, asked to go on, a note."""
    if skip:
        return [f"{found}; the rest is read"]
    raise PixseqError(found, "copy or download it again; to read what is there all the same: --on-error skip")


def _by_folder(files: list[Path]) -> Iterable[list[Path]]:
    groups: dict[Path, list[Path]] = {}
    for file in files:
        groups.setdefault(file.parent, []).append(file)
    return groups.values()


def _missing(path: Path, files: list[Path]) -> list[str]:
    """Names of shards that the numbers of the others tell of."""
    counted = [match for file in files if (match := OF.fullmatch(file.name)) and int(match["total"]) <= MOST_SHARDS]
    if not counted:
        return _gaps(files)
    sets: dict[tuple[str, str], list[re.Match]] = {}
    for match in counted:
        sets.setdefault((match["before"], match["total"]), []).append(match)
    if len({before for before, _ in sets}) < len(sets):
        totals = sorted({total for _, total in sets}, key=int)
        raise PixseqError(
            f"{shown(path)} holds one set in more than one form: {' and '.join(f'-of-{total}' for total in totals)}",
            "keep the shards of one of them",
        )
    return [name for (_, total), matches in sets.items() for name in _lacking(matches, int(total))]


def _lacking(matches: list[re.Match], total: int) -> list[str]:
    """Of shards N of `total`, counted from 0, or from 1 where the last one is there."""
    have = {int(match["number"]) for match in matches}
    first = 1 if total in have else 0
    lacking = [n for n in range(first, first + total) if n not in have]
    example = matches[0]
    endings = {match["after"] for match in matches}
    after = endings.pop() if len(endings) == 1 else f"*{Path(example['after']).suffix}"
    width = len(example["number"])
    return [f"{example['before']}{n:0{width}}{example['of']}{example['total']}{after}" for n in lacking]


def _gaps(files: list[Path]) -> list[str]:
    """Of files numbered from 0 or 1, or with zeros before: the numbers between that are missing.

    Numbers without zeros that begin elsewhere are no numbering (years, ids), and such with more gaps than files are
    one only where zeros tell that they begin at 0 or 1.
    """
    series: dict[tuple[str, str], dict[int, str]] = {}
    for file in files:
        matches = list(re.finditer(r"\d+", file.name))
        if matches:
            last = matches[-1]
            around = file.name[: last.start()], file.name[last.end() :]
            series.setdefault(around, {})[int(last[0])] = last[0]
    lacking = []
    for (before, after), numbers in series.items():
        low, high = min(numbers), max(numbers)
        padded = any(text.startswith("0") and len(text) > 1 for text in numbers.values())
        gaps = high - low + 1 - len(numbers)
        if gaps and ((padded and low < 2 and high <= MOST_SHARDS) or (gaps <= len(numbers) and (low < 2 or padded))):
            width = len(numbers[low]) if padded else 1
            lacking += [f"{before}{n:0{width}}{after}" for n in range(low, high) if n not in numbers]
    return lacking


def _unfinished(folder: Path, files: list[Path]) -> list[str]:
    """Downloads under way, of files like these: name.part, name.parquet.incomplete."""
    suffixes = {file.suffix for file in files}
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.suffix.lower() in UNFINISHED and Path(entry.stem).suffix in suffixes and not entry.name.startswith(".")
    )


def _one_of_more(file: Path) -> list[str]:
    match = OF.fullmatch(file.name)
    if match is None or int(match["total"]) < 2:
        return []
    return [f"{shown(file.name)} is one of {int(match['total'])} shards: name the folder to read all"]


def _numeric(path: Path) -> list:
    return [(0, int(s), "") if s.isdecimal() else (1, 0, s) for s in re.split(r"(\d+)", str(path))]
