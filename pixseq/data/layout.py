"""Which folders of a tree are splits and which are classes: told by what they hold, then by what they are called.

Folders that hold the same class folders are splits, whatever their names. A folder called train among others that are
not called like splits is a class (the vehicle). What cannot be told is an error that lists what was found.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from pixseq.data import known_sets
from pixseq.data.known_sets import PicturesByFolder
from pixseq.data.records import NoSuchSplit, pick_split, spans
from pixseq.data.split_names import YEAR, canonical, is_bare, is_plain, split_word
from pixseq.data.tree import Tree, debris_note
from pixseq.errors import PixseqError
from pixseq.text import LISTED, few, shown, word

TABLES = (".csv", ".tsv", ".jsonl")  # of labels, often
Labelled = list[tuple[str, np.ndarray, int | None]]  # folders, names of pictures in them, their label


@dataclass(frozen=True)
class Split:
    """One split. `classes` maps a class to its folder, which is walked down, or to its pictures; it is None where the
    pictures below `folder` have no labels.
    """

    called: str
    folder: str
    classes: Mapping[str, str | PicturesByFolder] | None


@dataclass(frozen=True)
class ChosenSplit:
    """One split as it is read: (folder, names of pictures in it, their label), in order; `others` are no pictures, and
    `tables` are names of files near them that may hold labels.
    """

    split: str
    class_names: list[str] | None
    pictures: Labelled
    others: list[str]
    notes: list[str]
    tables: list[str]

    def between(self, start: int, stop: int | None) -> Labelled:
        """Of pictures [start, stop): their folders, names and labels."""
        found: Labelled = []
        for which, low, high in spans([len(names) for _, names, _ in self.pictures], start, stop):
            folder, names, label = self.pictures[which]
            found.append((folder, names[low:high], label))
        return found


def choose(
    tree: Tree, root: str, path: object, wanted: str, known: Collection[str] = (), named: str | None = None
) -> ChosenSplit:
    """The split of the pictures below `root` that `wanted` names, of the `known` folders that are splits, or of those
    that are found to be; all where there are none, if that is the split that a file is `named` after. Raises
    NoSuchSplit, and PixseqError if unclear.
    """
    notes: list[str] = []
    top, root = root, root if known else _see_through(tree, root, notes)
    found = _as_splits(tree, root, known, notes) if known else _splits(tree, root, notes)
    if known:
        split = called = wanted
    elif found:
        _check_filled(tree, root, found, wanted)
        split, called = _pick(path, found, wanted)
    else:
        split = called = pick_split(path, (), "all" if named == canonical(wanted) else wanted)
        found = {called: _split(tree, called, root, notes)}
    chosen = found[called]
    others = [os.path.join(chosen.folder, name) for name in tree.listing(chosen.folder).others]
    if chosen.classes is None:
        if any(other.classes for other in found.values()):
            notes.append(_without_labels(tree, chosen.folder))
        others = []
        class_names = None
        pictures: Labelled = [(*each, None) for each in tree.walk(chosen.folder, notes, others)]
    else:
        class_names, pictures = _labelled(tree, found, chosen, chosen.classes, notes, others)
    beside = dict.fromkeys((top, root, chosen.folder))
    tables = [name for folder in beside for name in tree.listing(folder).others if name.endswith(TABLES)]
    return ChosenSplit(split, class_names, pictures, others, [*notes, *debris_note(path, tree.debris)], tables)


def archive_root(tree: Tree) -> str:
    """Where an archive begins, under the one folder that it is usually packed from. A split is none."""
    root = ""
    while not len((top := tree.listing(root)).pictures) and len(top.folders) == 1:
        if split_word(top.folders[0]) or known_sets.splits(tree, root):
            break
        root = os.path.join(root, top.folders[0])
    return root


def _labelled(
    tree: Tree,
    found: dict[str, Split],
    chosen: Split,
    own: Mapping[str, str | PicturesByFolder],
    notes: list[str],
    others: list[str],
) -> tuple[list[str], Labelled]:
    """The class names and the labelled pictures of a split, whose `own` classes are these."""
    splits = [split.classes for split in found.values() if split.classes is not None]
    # Over all splits, so that a class that one of them lacks shifts no label.
    class_names = sorted({name for classes in splits for name in classes}, key=os.fsencode)
    pictures: Labelled = []
    empty, nested = [], []
    for label, name in enumerate(class_names):
        place = own.get(name, [])
        inside = list(tree.walk(place, notes, others)) if isinstance(place, str) else place
        if isinstance(place, str) and len(inside) > 1:
            nested += [os.path.relpath(folder, os.path.dirname(place)) for folder, _ in inside if folder != place]
        pictures += [(folder, names, label) for folder, names in inside]
        if not inside:
            empty.append(f"{tree.called(os.path.join(chosen.folder, name))} holds no pictures: class {label} is empty")
    said = empty if len(empty) <= LISTED else [*empty[:LISTED], f"... and {len(empty) - LISTED} more empty classes"]
    if len(class_names) > 1 and len(empty) == len(class_names) - 1:
        said.append(f"only one of {len(class_names)} classes has pictures")
    held = [(name, [s.called for s in found.values() if name in (s.classes or ())]) for name in class_names]
    lone = [f"{shown(name)} ({shown(within[0])})" for name, within in held if len(within) == 1 and len(splits) > 1]
    if lone:
        said.append(f"{len(lone)} of {len(class_names)} classes are in one split only: {few(lone)}")
    if nested:
        said.append(
            f"{tree.called(chosen.folder)}: its {len(class_names)} classes ({few(class_names)}) hold folders, which "
            f"are not told apart: {few(nested)}; for classes of these, move them up, or name the folder that holds them"
        )
    notes[:0] = said
    return class_names, pictures


def _without_labels(tree: Tree, folder: str) -> str:
    note = f"{tree.called(folder)} has no class folders, unlike another split: its pictures have no labels"
    if known_sets.is_ilsvrc_val(tree, folder):
        note += f" (they stand in {known_sets.SOLUTION}, which is read from beside ILSVRC/)"
    return note


# ------------------------------------------------------------------------------------------------- splits or classes


def _see_through(tree: Tree, folder: str, notes: list[str]) -> str:
    """Down from a folder whose only folder with pictures is a wrapper of them: caltech/101_ObjectCategories, images.

    Other folders, with files that are no pictures (annotations/, meta/), are passed over. A split is no wrapper, nor
    is a class, whose pictures lie in it, nor a folder beside empty ones, which are classes.
    """
    while not len(tree.listing(folder).pictures) and not known_sets.splits(tree, folder):
        full = tree.folders(folder)
        if len(full) != 1 or split_word(full[0], full):
            return folder
        rest = [name for name in tree.listing(folder).folders if name != full[0]]
        inner = os.path.join(folder, full[0])
        doubled = full[0] == os.path.basename(folder)  # as some are packed: img_align_celeba/img_align_celeba
        if len(tree.listing(inner).pictures) and not is_plain(full[0]) and not doubled:
            return folder
        if not all(tree.holds_files(os.path.join(folder, name)) for name in rest):
            return folder
        if rest:
            notes.append(f"{tree.called(folder)}: only {shown(full[0])} holds pictures, not {few(rest)}")
        folder = inner
    return folder


def _splits(tree: Tree, root: str, notes: list[str]) -> dict[str, Split]:
    """The splits in `root` by what their folders are called; none if its folders are classes, or there are none."""
    if known := known_sets.splits(tree, root):
        return {name: Split(name, root, classes) for name, classes in known.items()}
    names = tree.folders(root)
    inner = {name: _inner(tree, os.path.join(root, name)) for name in names}
    like = [name for name in names if split_word(name, names)]
    rest = [name for name in names if name not in like]
    pairs = {(a, b): _alike(a, b, inner, like) for a, b in combinations(names, 2)} if len(names) < 100 else {}
    alike = {name for pair, same in pairs.items() if same for name in pair}
    if names and not like and all(inner[n] and all(split_word(i, inner[n]) for i in inner[n]) for n in names):
        return _inside_classes(tree, root, names)
    of_one_set = len(like) > 1 and set(like) <= alike  # then the rest are no classes beside them
    if sets := [name for name in names if _is_set(tree, os.path.join(root, name), inner[name])]:
        if not of_one_set or set(sets) & set(like):
            raise _unclear(tree, root, inner, "sets with splits of their own", sets[0])
        notes.append(f"{tree.called(root)}: passed over {few(sets)}, which holds splits of its own")
        names, rest = ([name for name in each if name not in sets] for each in (names, rest))
    if like and rest and not set(rest) <= alike and not of_one_set:
        if len(like) == 1 and is_bare(like[0]) and not any(inner.values()):
            return {}  # class folders, one of them called train
        what = f"splits ({', '.join(map(shown, like))}) and other pictures ({few(rest)})"
        raise _unclear(tree, root, inner, what, min(like, key=lambda name: split_word(name, names) != "train"))
    unclear = None in pairs.values()
    if not like and not alike and not unclear:
        return {}
    if not like and (alike != set(names) or unclear):
        raise _unclear(tree, root, inner, "folders that may be splits or classes")
    if of_one_set and not set(rest) <= alike:
        notes.append(f"{tree.called(root)}: beside {few(like)} other folders hold pictures: {few(set(rest) - alike)}")
    if len(tree.listing(root).pictures):
        notes.append(f"{tree.called(root)}: the pictures beside its splits ({few(names)}) are passed over")
    return _as_splits(tree, root, names, notes)


def _as_splits(tree: Tree, root: str, names: Collection[str], notes: list[str]) -> dict[str, Split]:
    splits = {name: _split(tree, name, os.path.join(root, name), notes) for name in names}
    _check_depth(tree, splits)
    return _without_wrappers(splits, notes)


def _is_set(tree: Tree, folder: str, inner: list[str]) -> bool:
    """Whether a folder is a whole set: with splits of its own, by their names or by a list that is known."""
    named = len(inner) > 1 and all(split_word(name, inner) for name in inner)
    return named or bool(known_sets.splits(tree, folder))


def _check_depth(tree: Tree, splits: dict[str, Split]) -> None:
    """Raises PixseqError where the classes lie a folder deeper in one split than in another: train/labeled/cat,
    test/cat.
    """
    for split in splits.values():
        theirs = {c for other in splits.values() if other is not split for c in other.classes or ()}
        for name, place in (split.classes or {}).items():
            if isinstance(place, str) and name not in theirs and len(theirs & set(_inner(tree, place))) > 1:
                inner = {name: _inner(tree, os.path.join(split.folder, name)) for name in split.classes or {}}
                raise _unclear(tree, split.folder, inner, "folders that hold the classes of another split", name)


def _inner(tree: Tree, folder: str) -> list[str]:
    """The class folders that a folder would have if it were a split."""
    folder = _see_through(tree, _own_inside(tree, os.path.basename(folder), folder), [])
    return [] if len(tree.listing(folder).pictures) else tree.folders(folder)


def _alike(a: str, b: str, inner: dict[str, list[str]], like: Collection[str]) -> bool | None:
    """Whether two folders hold the same class folders, half of the smaller's at least; None where that is unclear.

    One folder that both hold is little: it may be a wrapper (cat/2019, dog/2019) as well as a class.
    """
    shared = set(inner[a]) & set(inner[b])
    fewer, more = sorted((len(inner[a]), len(inner[b])))
    if not shared or all(map(is_plain, shared)) or 2 * len(shared) < fewer:
        return False
    if len(shared) > 1 or a in like or b in like or (YEAR.fullmatch(a) and YEAR.fullmatch(b)):
        return True
    return None if fewer == 1 < more else False


def _unclear(tree: Tree, root: str, inner: dict[str, list[str]], what: str, likely: str | None = None) -> PixseqError:
    """`inner` maps each folder of `root` to what it holds; `likely` is the one that the hint names."""
    held = [f"{shown(name)} ({few(inside) if inside else 'pictures'})" for name, inside in inner.items()]
    place = shown(os.path.join(root, likely or next(iter(inner))))
    return PixseqError(
        f"{tree.called(root)} holds {what}: {few(held)}",
        f"{tree.before}name the folder that you mean, such as {place}, or move the others away; splits hold the same "
        "class folders, classes hold pictures",
    )


def _split(tree: Tree, called: str, folder: str, notes: list[str]) -> Split:
    if (classes := known_sets.labelled(tree, folder)) is not None:
        return Split(called, folder, classes)
    folder = _see_through(tree, _own_inside(tree, called, folder), notes)
    listing, names = tree.listing(folder), tree.folders(folder)
    if len(listing.pictures) and names:
        raise PixseqError(
            f"{tree.called(folder)} holds both pictures ({shown(os.fsdecode(listing.pictures[0]))}) and folders of "
            f"pictures ({shown(names[0])})",
            "keep either: a flat folder of pictures, or one folder a class",
        )
    if len(listing.pictures):
        return Split(called, folder, None)
    if len(names) > 1 and any(map(is_plain, names)):
        raise _unclear(tree, folder, {name: [] for name in names}, "folders that are no classes by their names")
    rest = [name for name in listing.folders if name not in names]
    empty = [name for name in rest if not tree.holds_files(os.path.join(folder, name))]
    if len(empty) < len(rest):
        without = [name for name in rest if name not in empty]
        notes.append(f"{tree.called(folder)}: {few(without)} hold{'s' * (len(without) == 1)} no pictures: no class")
        if len(names) == 1:
            notes.append(
                f"{tree.called(folder)}: only one of {len(listing.folders)} folders, {shown(names[0])}, has pictures"
            )
    return Split(called, folder, {name: os.path.join(folder, name) for name in (*names, *empty)})


def _own_inside(tree: Tree, called: str, folder: str) -> str:
    """Down from a split whose only folder is itself again: test/test, seg_train/seg_train."""
    while not len(tree.listing(folder).pictures):
        names = tree.folders(folder)
        if len(names) != 1:
            break
        again = split_word(names[0]) is not None and split_word(names[0]) == split_word(called)
        if not again and names[0].lower() != called.lower():
            break
        folder = os.path.join(folder, names[0])
    return folder


def _inside_classes(tree: Tree, root: str, names: list[str]) -> dict[str, Split]:
    """Class folders of which each holds the splits: cat/train, cat/test, dog/train, dog/test."""
    classes: dict[str, dict[str, str | PicturesByFolder]] = {}
    for name in names:
        folder = _see_through(tree, os.path.join(root, name), [])
        for inside in tree.folders(folder):
            if _inner(tree, os.path.join(folder, inside)):
                found = {name: tree.folders(os.path.join(root, name)) for name in names}
                raise _unclear(tree, root, found, "sets with splits of their own")
            classes.setdefault(inside, {})[name] = os.path.join(folder, inside)
    return {split: Split(split, root, found) for split, found in classes.items()}


def _without_wrappers(splits: dict[str, Split], notes: list[str]) -> dict[str, Split]:
    """A split whose only folder is no class of the others (test/unknown, test/test) has no labels."""
    held = dict(splits)
    for name, split in splits.items():
        if split.classes is None or len(split.classes) != 1:
            continue
        (only,) = split.classes
        theirs = {c for other in splits.values() if other is not split for c in other.classes or ()}
        if len(theirs) > 1 and only not in theirs:
            inside = shown(os.path.join(split.folder, only))
            notes.append(f"{inside} is no class of the other splits: {shown(name)} has no labels")
            held[name] = replace(split, classes=None)
    return held


def _check_filled(tree: Tree, root: str, found: dict[str, Split], wanted: str) -> None:
    """An empty test/ does not stand for a set without one. Raises PixseqError."""
    wanted, called = canonical(wanted), {split_word(name, list(found)) or name for name in found}
    empty = [name for name in tree.listing(root).folders if name not in found and split_word(name) == wanted]
    if empty and wanted not in called:
        raise PixseqError(
            f"{shown(os.path.join(root, empty[0]))} holds no pictures",
            f"fill it, or choose another split: {few(found)}",
        )


def _pick(path: object, found: dict[str, Split], wanted: str) -> tuple[str, str]:
    """What the wanted split is recorded as, and what its folder is called: either may be asked for."""
    common = {name: split_word(name, list(found)) or name for name in found}
    recorded = {
        name: word if list(common.values()).count(word) == 1 else name for name, word in common.items()
    }  # train2014 and train2017 keep their names
    called = [wanted] if wanted in found else [name for name in found if common[name] == canonical(wanted)]
    if len(called) > 1:
        raise NoSuchSplit(
            f"{shown(path)} holds more than one {wanted}: {', '.join(map(shown, called))}",
            f"choose one with --split, such as --split {word(called[0])}",
        )
    if not called and not any(split_word(name, list(found)) for name in found):
        raise NoSuchSplit(
            f"{shown(path)} has the splits {few(sorted(found))}, not {wanted}",
            "they hold the same folders, so they are taken for splits: choose one with --split; classes hold pictures",
        )
    if not called:
        pick_split(path, [shown(name) for name in recorded.values()], wanted)
        raise NoSuchSplit(f"{shown(path)} has no split {wanted}", f"it has {few(found)}")
    return recorded[called[0]], called[0]
