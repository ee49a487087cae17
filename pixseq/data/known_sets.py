"""Data sets whose splits or labels stand in a list beside the pictures, not in the names of folders.

CUB-200-2011 (images.txt, train_test_split.txt), Food-101 (meta/train.txt, meta/test.txt), Tiny ImageNet's val
(val_annotations.txt), and ILSVRC's flat val, whose labels Kaggle publishes as LOC_val_solution.csv.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

import numpy as np

from pixseq.data.tree import Tree
from pixseq.errors import PixseqError
from pixseq.text import shown

PicturesByFolder = list[tuple[str, np.ndarray]]  # folders, and the names (bytes, sorted) of pictures in each
ILSVRC_VAL = re.compile(rb"ILSVRC2012_val_\d{8}\.JPEG")
ANNOTATIONS, SOLUTION = "val_annotations.txt", "LOC_val_solution.csv"
LEVELS = 4  # SOLUTION lies beside ILSVRC/, and the pictures in ILSVRC/Data/CLS-LOC/val


def splits(tree: Tree, root: str) -> dict[str, dict[str, PicturesByFolder]]:
    """Split -> class -> pictures, if `root` is a set that lists its splits; else none."""
    names, flags = tree.text(root, "images.txt"), tree.text(root, "train_test_split.txt")
    if names is not None and flags is not None:
        files = dict(_pairs(names, root, "images.txt"))
        trained = dict(_pairs(flags, root, "train_test_split.txt"))
        if files.keys() != trained.keys():
            raise PixseqError(
                f"{shown(root)}: images.txt names {len(files)} pictures, train_test_split.txt "
                f"{len(files.keys() & trained.keys())} of them and {len(trained.keys() - files.keys())} others",
                "copy or download the set again",
            )
        if odd := sorted(set(trained.values()) - {"0", "1"}):
            raise PixseqError(
                f"{shown(os.path.join(root, 'train_test_split.txt'))} holds {shown(odd[0])}, but a picture is of train "
                "(1) or of test (0)",
                "copy or download the set again",
            )
        lists = {
            split: [files[i] for i in files if trained[i] == flag] for split, flag in (("train", "1"), ("test", "0"))
        }
        return {split: _by_class(tree, os.path.join(root, "images"), files) for split, files in lists.items()}
    meta = os.path.join(root, "meta")
    texts = {"train": tree.text(meta, "train.txt"), "test": tree.text(meta, "test.txt")}
    found = {split: text for split, text in texts.items() if text is not None}
    if len(found) == len(texts) and "images" in tree.listing(root).folders:
        lines = {split: [line.strip() for line in text.split("\n") if line.strip()] for split, text in found.items()}
        lists = {
            split: [line if line.endswith(".jpg") else f"{line}.jpg" for line in each] for split, each in lines.items()
        }
        return {split: _by_class(tree, os.path.join(root, "images"), files) for split, files in lists.items()}
    return {}


def labelled(tree: Tree, folder: str) -> dict[str, PicturesByFolder] | None:
    """Class -> pictures of a folder without class folders whose labels stand in a list that is known."""
    text = tree.text(folder, ANNOTATIONS)
    if text is not None:
        inner = os.path.join(folder, "images") if "images" in tree.listing(folder).folders else folder
        if not len(tree.listing(inner).pictures) and tree.folders(folder):
            return None  # sorted into class folders since
        return _of_one(tree, inner, ANNOTATIONS, (line.split("\t")[:2] for line in text.split("\n") if line.strip()))
    pictures = tree.listing(folder).pictures
    if not len(pictures) or not ILSVRC_VAL.fullmatch(pictures[0]):
        return None
    above = folder
    for _ in range(LEVELS):
        above = os.path.dirname(above)
        text = tree.text(above, SOLUTION)
        if text is not None:
            rows = (line.replace(",", " ").split()[:2] for line in text.split("\n")[1:] if line.strip(", \t"))
            return _of_one(tree, folder, SOLUTION, ((f"{row[0]}.JPEG", *row[1:]) for row in rows))
    return None


def is_ilsvrc_val(tree: Tree, folder: str) -> bool:
    pictures = tree.listing(folder).pictures
    return len(pictures) > 0 and ILSVRC_VAL.fullmatch(pictures[0]) is not None


def _pairs(text: str, root: str, file: str) -> Iterable[tuple[str, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            key, _, value = line.strip().partition(" ")
            if not value:
                raise PixseqError(f"{shown(os.path.join(root, file))}, line {number}, is no pair: {shown(line)}")
            yield key, value


def _by_class(tree: Tree, images: str, files: list[str]) -> dict[str, PicturesByFolder]:
    """`files` are CLASS/NAME, below `images`."""
    names: dict[str, list[bytes]] = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        names.setdefault(folder, []).append(os.fsencode(name))
    there = set(tree.listing(images).folders)
    classes: dict[str, PicturesByFolder] = {}
    for name in sorted(names, key=os.fsencode):
        folder = os.path.join(images, name)
        held = set(tree.listing(folder).pictures.tolist()) if name in there else set()
        _check(folder, names[name], held)
        classes[name] = [(folder, np.sort(np.array(names[name], dtype=bytes)))]
    return classes


def _of_one(tree: Tree, folder: str, file: str, rows: Iterable[Iterable[str]]) -> dict[str, PicturesByFolder]:
    """`rows` are NAME, CLASS of the pictures of one folder, which all have to be there and in the list."""
    label_of: dict[bytes, str] = {}
    for row in map(tuple, rows):
        if len(row) != 2 or not row[1].strip():
            raise PixseqError(
                f"{shown(file)} names {shown(row[0])} without its class", "copy or download that list again"
            )
        label_of[os.fsencode(row[0])] = row[1].strip()
    held = set(tree.listing(folder).pictures.tolist())
    _check(folder, label_of, held)
    if extra := held - label_of.keys():
        raise PixseqError(
            f"{shown(file)} does not name {len(extra)} of the {len(held)} pictures of {shown(folder)}, such as "
            f"{shown(os.fsdecode(min(extra)))}",
            "copy or download that list again, or move these pictures away",
        )
    names: dict[str, list[bytes]] = {}
    for picture, label in label_of.items():
        names.setdefault(label, []).append(picture)
    return {label: [(folder, np.sort(np.array(names[label], dtype=bytes)))] for label in sorted(names)}


def _check(folder: str, wanted: Iterable[bytes], held: set[bytes]) -> None:
    missing = [name for name in wanted if name not in held]
    if missing:
        raise PixseqError(
            f"{shown(folder)} lacks {len(missing)} pictures that the set's list names, such as "
            f"{shown(os.fsdecode(missing[0]))}",
            "copy or download the set again",
        )
