"""The part that stands for a whole set where only a part is taken: chosen in one way everywhere, and recorded.

Where classes are known, every class has its share; rows lie evenly spread (numerics/parts.py). What is held out for
validation is drawn instead, image by image. A record {of, taken, how} beside what was made says which part it shows.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np

from pixseq import progress
from pixseq.choices import Part
from pixseq.errors import PixseqError, UsageError
from pixseq.numerics.parts import choose_rows, hold_out, is_mixed

if TYPE_CHECKING:
    from pixseq.artifacts.arrays import Store
    from pixseq.data.sources import Source, TokenSource

PARTS = get_args(Part)
DRAW = ("of", "how", "held_out")  # of a part's record: what the two parts of one draw have alike, beside their options


class Subset(NamedTuple):
    """Ascending numbers of what was chosen, and how it was; both None where that is everything."""

    rows: np.ndarray | None
    record: dict[str, Any] | None


def part_of(n: int, count: int, labels: np.ndarray | None) -> Subset:
    """`count` of `n` rows that have `labels` [n], or None where they are not known."""
    if count >= n:
        return Subset(None, None)
    return Subset(choose_rows(n, count, labels), _record(n, count, labels))


def part_of_store(store: Store, count: int) -> tuple[np.ndarray, dict[str, Any] | None]:
    """The rows of a store of images that stand for all, and how they were chosen (None: these are all)."""
    n = len(store)
    rows, record = part_of(n, count, store.labels() if count < n else None)
    return np.arange(n) if rows is None else rows, record


def prompts_of_store(store: Store, count: int) -> tuple[np.ndarray, dict[str, Any] | None]:
    """As part_of_store where labels tell that the store is sorted; else the first rows, which are easily found in it:
    of a shuffled store they are as fair as any.
    """
    labels = store.labels() if count < len(store) else None
    if count >= len(store) or (labels is not None and not is_mixed(labels)):
        return part_of_store(store, count)
    how = "first of an order that no labels tell" if labels is None else "first of a shuffled set"
    return np.arange(count), {"of": len(store), "taken": count, "how": how}


def count_images(store: Store) -> dict[str, int]:
    """For summaries: the images of a store, and its rows where these are several an image."""
    shown = store.images()
    return {"images": len(store)} if shown is None else {"images": len(np.unique(shown)), "rows": len(shown)}


def part_of_source(
    source: Source | TokenSource,
    limit: int | None = None,
    val_fraction: float | None = None,
    part: str | None = None,
    seed: int = 0,
) -> Subset:
    """At most `limit` images of a source; with a `val_fraction`, of its `part` train or val.

    Which images are held out depends on the source, its classes as they are read, the fraction and the seed; `held_out`
    of the record is a digest of them, alike in the two parts that never share one. A source that does not know its
    length or its classes is read once for them. Raises PixseqError where there is nothing to divide.
    """
    if val_fraction is None and (limit is None or (source.count is not None and limit >= source.count)):
        return Subset(None, None)
    n, labels = _survey(source)
    if val_fraction is None:
        return part_of(n, n if limit is None else limit, labels)
    if n < 2:
        raise PixseqError(f"{source.path} holds {n} image{'s' * (n != 1)}: no part can be held out", "give it more")
    rows = _hold_out(n, val_fraction, labels, source.shows() if source.shows else None, seed)
    digest = hashlib.sha256(f"{n}\n".encode() + rows.astype("<i8").tobytes()).hexdigest()[:16]
    if part == "train":
        rows = np.setdiff1d(np.arange(n), rows, assume_unique=True)
    if limit is not None:
        rows = rows[choose_rows(len(rows), limit, None if labels is None else labels[rows])]
    drawn = {"part": part, "val_fraction": val_fraction, "seed": seed, "held_out": digest}
    return Subset(rows, {**_record(n, len(rows), labels), **drawn})


def _hold_out(n: int, fraction: float, labels: np.ndarray | None, shows: np.ndarray | None, seed: int) -> np.ndarray:
    """A random part of `n` images; all that show one original (`shows` [n], None: each its own) lie on one side."""
    if shows is None:
        return hold_out(n, fraction, labels, seed)
    _, firsts, originals = np.unique(shows, return_index=True, return_inverse=True)
    held = hold_out(len(firsts), fraction, None if labels is None else labels[firsts], seed)
    return np.flatnonzero(np.isin(originals, held))


def check_held_out(val_fraction: float | None, part: str | None) -> None:
    """Raises UsageError where a fraction and a part do not come together, or are none."""
    if (val_fraction is None) != (part is None):
        given, other = ("--val-fraction", "--part") if part is None else ("--part", "--val-fraction")
        raise UsageError(
            f"{given} was given without {other}", "for example --val-fraction 0.04 --part train, and --part val"
        )
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise UsageError(f"--val-fraction is {val_fraction}, it must lie between 0 and 1", "for example 0.04")


def _survey(source: Source | TokenSource) -> tuple[int, np.ndarray | None]:
    from pixseq.data.picking import knows, survey
    from pixseq.data.sources import TokenSource

    if isinstance(source, TokenSource):
        return source.count, source.classes()
    if not knows(source):
        progress.note(f"{source.path} is read once to count its images, before a part of them is chosen")
    return survey(source)


def _record(n: int, taken: int, labels: np.ndarray | None) -> dict[str, Any]:
    return {"of": n, "taken": taken, "how": "spread" if labels is None else "stratified"}


# ---- parts that must not meet


def origin(store: Store) -> dict[str, Any] | None:
    """The source of a store's pictures as its manifest names it, and the part of it; None where it is not known."""
    record = store.manifest
    source = record["inputs"].get("source")
    if source is None or (source["path"] == "-" and "listing" not in source):  # older ids tell nothing of stdin's paths
        return None
    if record["config"].get("part") is None:
        return source
    drawn = {key: record["config"][key] for key in ("split", "part", "val_fraction", "seed")}
    told = record["summary"].get("part") or {}
    return {**source, **drawn, **{key: told[key] for key in DRAW if key in told}}


def check_disjoint(ours: Store, theirs: Store, why: str) -> None:
    """Raises PixseqError where two stores hold pictures of one source and are not the two parts of one split."""
    from pixseq.data.described import is_same

    if ours.manifest["id"] == theirs.manifest["id"]:
        raise PixseqError(f"{theirs.path} holds the same images as {ours.path}", f"{why}: encode another split")
    a, b = origin(ours), origin(theirs)
    if a is None or b is None:
        return
    if not is_same(a, b):
        _check_unchanged(a, b, ours, theirs, why)
        return
    split = [(each.get("val_fraction"), each.get("seed")) for each in (a, b)]
    if split[0] == split[1] and {a.get("part"), b.get("part")} == set(PARTS):
        if all(a[key] == b[key] for key in DRAW if key in a and key in b):  # older stores do not tell all of it
            return
        raise PixseqError(
            f"{theirs.path} ({_named(b)}) and {ours.path} ({_named(a)}) hold parts of the same source that were drawn "
            "apart: other pictures were held out for each",
            f"{why}: encode both parts with the same options (--label-column too), or another split",
        )
    raise PixseqError(
        f"{theirs.path} ({_named(b)}) holds pictures of the same source as {ours.path} ({_named(a)})",
        f"{why}: encode another split, or the two parts of one with --val-fraction F --part train and --part val",
    )


def _check_unchanged(a: dict[str, Any], b: dict[str, Any], ours: Store, theirs: Store, why: str) -> None:
    """Raises PixseqError where two parts are of one place and split that was not the same for both: they may meet."""
    if "part" not in a or "part" not in b or a.get("split") != b.get("split"):
        return
    if Path(a["path"]).resolve() == Path(b["path"]).resolve():
        raise PixseqError(
            f"{theirs.path} ({_named(b)}) and {ours.path} ({_named(a)}) are parts of a source that changed between "
            f"them: it was {a['id']} and is {b['id']}",
            f"{why}: encode both again, with the same options",
        )


def _named(origin: dict[str, Any]) -> str:
    part = f", part {origin['part']} of {origin['val_fraction']:g}, seed {origin['seed']}" if "part" in origin else ""
    return f"{origin['path']}{part}"
