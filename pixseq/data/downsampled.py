"""Downsampled ImageNet, 8x8 to 64x64, in its published pickles: train_data_batch_1 to 10, and val_data.

Each is a dict: data uint8 [n, 3 * S * S] (planes), labels from 1 to 1000, mean. A batch is held while it is read:
1.6 GB of 64x64. The .npz form is read by arrays.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pixseq.bounded.files import read_bytes
from pixseq.data import unpickle
from pixseq.data.records import Pixels, Source, Wanted, pick_split, reading
from pixseq.data.shards import incomplete
from pixseq.errors import PixseqError
from pixseq.text import few, shown

BATCH = re.compile(r"train_data_batch_(\d+)|val_data|test_data")
BATCHES = 10  # of the training set
MOST_BATCH = 1_800_000_000  # bytes: of 64x64 the official ones have 1.57 GB
BLOCK = 4096  # images given on at once


def open_downsampled(path: Path, wanted: Wanted, files: list[Path]) -> Source:
    """One split of the batches in a folder, or in its train and val folders. How many images shows as they are read."""
    splits: dict[str, dict[int, Path]] = {}
    for file in files:
        match = BATCH.fullmatch(file.name)
        assert match is not None  # so they were chosen
        split = "train" if match[1] else file.name.removesuffix("_data")
        splits.setdefault(split, {})[int(match[1] or 1)] = file
    split = pick_split(path, splits, wanted.split)
    batches, notes = splits[split], []
    if split == "train":
        lacking = [f"train_data_batch_{n}" for n in range(1, max(BATCHES, *batches) + 1) if n not in batches]
        if lacking:
            notes = incomplete(f"{shown(path)} is incomplete: it lacks {few(lacking)}", wanted.skip)
    ordered = [batches[n] for n in sorted(batches)]
    has_labels = _load(ordered[0])[1] is not None

    def read(start: int, stop: int | None) -> Iterator[Pixels]:
        first = 0  # number of the batch's first image
        for file in ordered:
            if stop is not None and first >= stop:
                return
            images, labels = _load(file)
            if (labels is None) == has_labels:
                raise PixseqError(f"{shown(file)} has {'no' if has_labels else ''} labels, unlike {ordered[0].name}")
            low, high = max(start - first, 0), len(images) if stop is None else min(stop - first, len(images))
            for block in range(low, high, BLOCK):
                rows = slice(block, min(block + BLOCK, high))
                yield Pixels(images[rows], None if labels is None else labels[rows])
            first += len(images)

    why = "the batches (1 to 1000, here from 0)" if has_labels else "the batches have none"
    return Source(
        "downsampled-imagenet", str(path), split, None, None, has_labels, read, notes, None, False, why, ordered
    )


def _load(file: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Images uint8 [n, S, S, 3] and labels from 0, int64 [n]. Raises PixseqError for anything else."""
    with reading(file):
        content = unpickle.load(read_bytes(file, MOST_BATCH), str(file))
    rows: Any = content.get("data")
    labels: Any = content.get("labels")
    side = math.isqrt(rows.shape[1] // 3) if isinstance(rows, np.ndarray) and rows.ndim == 2 else 0
    if not side or rows.dtype != np.uint8 or rows.shape[1] != 3 * side * side or not len(rows):
        got = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, np.ndarray) else f"{shown(sorted(content))}"
        raise PixseqError(f"{shown(file)} is no batch of Downsampled ImageNet, uint8 [n, 3 * S * S]: it holds {got}")
    images = rows.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
    if labels is None:
        return images, None
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.shape != (len(rows),) or labels.min() < 1:
        low = f" from {labels.min()}" if labels.dtype.kind in "iu" and labels.size else ""
        raise PixseqError(
            f"{shown(file)} has {len(rows)} images, but labels {labels.dtype} {list(labels.shape)}{low}",
            "its labels are whole numbers from 1, one an image",
        )
    return images, labels.astype(np.int64) - 1
