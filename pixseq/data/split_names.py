"""What splits are called in the wild: train2017, Testing, val_256, training_set, dev, fold1."""

from __future__ import annotations

import re
from collections.abc import Collection

from pixseq.data.records import SPLITS

# More names of splits, which keep the name that they have.
OTHER_SPLITS = {"dev", "devel", "development", "eval", "evaluation", "holdout", "heldout", "trainval", "extra"}
PARTS = {"fold", "split", "part", "chunk", "shard", "batch"}  # with a number: parts of a set, which are no classes
# What a folder is called for holding pictures; no class is called so.
PLAIN = {"images", "image", "imgs", "img", "jpg", "jpeg", "jpegs", "jpegimages"}
FILLERS = PLAIN | {"set", "data", "dataset", "folder", "dir", "pictures", "photos", "final", "split", "full", "part"}
YEAR = re.compile(r"(19|20)\d\d")


def canonical(name: str) -> str:
    """training -> train; a name that is no usual one stays, in small letters."""
    return SPLITS.get(name.lower(), name.lower())


def is_bare(name: str) -> bool:
    """A split's name that may be a class's too: train, not train2017 or training_set."""
    return name.lower() in SPLITS or name.lower() in OTHER_SPLITS


def split_word(name: str, beside: Collection[str] = ()) -> str | None:
    """The split that a folder's name says, None where it says none: any other word makes it the name of something
    (test_tube), unless all folders `beside` have that word (imagenet_train, imagenet_val).
    """
    if name.lower() in SPLITS:
        return SPLITS[name.lower()]
    words = _words(name)
    shared = set.intersection(*(set(_words(other)) for other in beside)) if len(beside) > 1 else set()
    splits = [word for word in words if word in SPLITS or word in OTHER_SPLITS]
    rest = [w for w in words if w not in splits and not w.isdigit() and w not in FILLERS and w not in shared]
    if splits and not rest:
        return canonical(splits[0]) if len(splits) == 1 else name.lower()
    numbered = any(word.isdigit() for word in words) and any(not word.isdigit() for word in words)
    is_part = numbered and len(beside) > 1 and all(w.isdigit() or w in PARTS or w in PLAIN for w in words)
    return name.lower() if is_part else None


def split_of(name: str) -> str | None:
    """The split a file's name carries as a word: train-00000-of-00002.parquet, imagenet_val_07.tar, dev.npz."""
    words = [*re.split(r"[^a-z0-9]+", name.lower()), *_words(name)]
    for known in (SPLITS, OTHER_SPLITS):
        found = {canonical(word) for word in words if word in known}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def is_plain(name: str) -> bool:
    """images, Images_01: called so for holding pictures, which no class is."""
    words = _words(name)
    return any(word in PLAIN for word in words) and all(word in PLAIN or word.isdigit() for word in words)


def _words(name: str) -> list[str]:
    """training_set -> training, set; TrainSet and trainset -> train, set; val2017 -> val, 2017; hold-out -> holdout."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    spaced = re.sub(r"(hold|held)[^a-z0-9]?out", r"\1out", spaced)
    words = []
    for word in re.findall(r"[^\W\d_]+|\d+", spaced):
        for ending in ("set", "data", "images", "imgs"):
            start = word.removesuffix(ending)
            if start != word and (start in SPLITS or start in OTHER_SPLITS):
                words += [start, ending]
                break
        else:
            words.append(word)
    return words
