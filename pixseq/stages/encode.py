"""encode: pictures to sequences of tokens (sections 3.1 and 3.2), streamed into a tokens store.

Shapes: N rows (images, or N views of each), T tokens a row, S the side in pixels.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixseq import progress
from pixseq.artifacts import atomic
from pixseq.artifacts.manifest import Manifest
from pixseq.errors import PixseqError, UsageError
from pixseq.stages.palette import describe

if TYPE_CHECKING:
    import numpy as np

    from pixseq.artifacts.arrays import StoreWriter
    from pixseq.data.images import ImageBatch, Preparation
    from pixseq.data.sources import Source

Codec = dict[str, Any]  # what the tokens mean: scheme, size, vocabulary, palette, class names

BATCH_BYTES = 32 << 20  # of pictures held at once
CHUNK_TOKENS = 1 << 22  # 8 MB: a whole chunk is read for one of its rows, and written at once


def run(
    source: str,
    out: str | Path,
    palette: str | Path | None = None,
    split: str = "train",
    size: int = 32,
    resize: str = "crop",
    scheme: str = "palette",
    views: int = 0,
    limit: int | None = None,
    seed: int = 0,
    background: str = "white",
    on_error: str = "fail",
    workers: int = 0,
    resume: bool = False,
    overwrite: bool = False,
) -> Manifest:
    """Write the tokens of `source` as a store with all that training needs; returns its manifest.

    palette: each pixel becomes its nearest palette colour. rgb: three tokens a pixel, gray: its luma; 256 values each.
    An interrupted run leaves NAME.partial; `resume` goes on from its last whole chunk, to the same content id.
    """
    from pixseq.artifacts.arrays import Spec, StoreWriter
    from pixseq.artifacts.palette import load_palette
    from pixseq.data.images import Preparation
    from pixseq.data.sources import open_source
    from pixseq.numerics.quantize import SCHEMES

    if scheme not in SCHEMES:
        raise UsageError(f"--scheme {scheme} is not one of {', '.join(SCHEMES)}")
    if (scheme == "palette") != (palette is not None):
        raise UsageError(
            f"--scheme {scheme} {'needs a --palette' if palette is None else 'has no use for --palette'}",
            "make one with `pixseq palette fit`" if palette is None else "leave it out, or take --scheme palette",
        )
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} is not at least 1")
    prep = Preparation(size=size, resize=resize, views=views, seed=seed, background=background, on_error=on_error)
    atomic.check_target(out, overwrite)
    inputs: dict[str, dict[str, Any]] = {}
    codec = {"scheme": scheme, "height": size, "width": size, "n_vocab": 256, "palette": None, "palette_id": None}
    if palette is not None:
        loaded = load_palette(palette)
        codec |= {"n_vocab": loaded.size, "palette": loaded.colors.tolist(), "palette_id": loaded.id}
        inputs["palette"] = {"path": str(palette), "id": loaded.id, "form": loaded.form}
    opened = open_source(source, split)
    for note in opened.notes:
        progress.say(f"note: {note}")
    inputs["source"] = describe(opened)
    codec["class_names"] = opened.class_names
    config = {"scheme": scheme, "split": opened.split, "limit": limit, **asdict(prep)}
    # A run that met a bad picture may go on with --on-error skip: what it wrote is the same.
    recipe = {**config, **{role: parent["id"] for role, parent in inputs.items()}, "on_error": None}

    width = size * size * (3 if scheme == "rgb" else 1)
    specs = {"tokens": Spec("uint16", (None, width))}
    if opened.has_labels:
        specs["labels"] = Spec("int32", (None,))
    _check_space(out, opened, prep, limit, width, codec["n_vocab"])
    with atomic.resuming(out, overwrite) as partial:
        writer = StoreWriter(partial, specs, recipe, max(min(CHUNK_TOKENS // width, 1024), 1), resume, overwrite)
        try:
            tally = _encode(opened, prep, codec, writer, limit, workers)
        except BaseException:
            if not writer.rows:  # nothing to go on from
                atomic.remove(partial)
            raise
        return writer.finish("tokens", "encode", config, inputs, tally.summary(codec), codec)


@dataclass(frozen=True)
class Tally:
    """What has been encoded so far. Saved with the chunks, so that a resumed run reports what a whole one would.

    `image` source images were used up and gave `rows` rows; `met` is what the reader met on the way. `tokens` and
    `classes` count how often each occurred.
    """

    image: int = 0
    rows: int = 0
    squared_error: float = 0.0
    met: dict[str, int] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)

    def plus(self, batch: ImageBatch, tokens: np.ndarray, error: float, met: dict[str, int], codec: Codec) -> Tally:
        labels = [] if batch.labels is None else batch.labels
        return Tally(
            image=batch.stop,
            rows=self.rows + len(tokens),
            squared_error=self.squared_error + error,
            met=met,
            tokens=_added(self.tokens, tokens.reshape(-1), codec["n_vocab"]),
            classes=_added(self.classes, labels, len(codec["class_names"])) if codec["class_names"] else [],
        )

    def summary(self, codec: Codec) -> dict[str, Any]:
        import numpy as np

        from pixseq.numerics.quantize import psnr_db, unigram_entropy

        counts = np.array(self.tokens)
        mse = round(self.squared_error / (self.rows * codec["height"] * codec["width"]), 6)
        return {
            **self.met,
            "rows": self.rows,
            "tokens_per_row": int(counts.sum()) // self.rows,
            "n_vocab": codec["n_vocab"],
            "distinct_tokens": int(np.count_nonzero(counts)),
            "unigram_nats_per_token": round(unigram_entropy(counts), 6),
            "mse": mse,
            "psnr_db": psnr_db(mse),
        }


def _added(counts: list[int], values: np.ndarray | list[int], least: int) -> list[int]:
    import numpy as np

    more = np.bincount(values, minlength=max(least, len(counts)))
    more[: len(counts)] += np.array(counts, np.int64)
    return more.tolist()


def _encode(
    source: Source, prep: Preparation, codec: Codec, writer: StoreWriter, limit: int | None, workers: int
) -> Tally:
    """One pass over the images that `writer` does not hold yet. Raises PixseqError if there are none at all."""
    import numpy as np

    from pixseq.data.images import Reader
    from pixseq.numerics.quantize import GRAYS, nearest_table, squared_error, to_tokens

    scheme = codec["scheme"]
    colors = np.array(codec["palette"]) if scheme == "palette" else GRAYS
    table = nearest_table(colors) if scheme == "palette" else None
    tally = Tally(**writer.state)
    again = writer.rows - tally.rows  # the chunks end inside a batch: its first rows are written already
    met = Counter(tally.met)
    at_once = max(min(BATCH_BYTES // (max(prep.views, 1) * prep.size**2 * 3), 1024), 1)
    left = None if limit is None else limit - tally.image
    reader = Reader(source, prep, tally.image, left, at_once, workers)
    held: dict[str, np.ndarray] = {}  # rows that fill no chunk yet
    with progress.track("encode", _smallest(source.count, limit), "images", tally.image) as bar:
        for batch in reader:
            tokens = to_tokens(batch.images, scheme, table)
            error = 0.0 if scheme == "rgb" else squared_error(batch.images, tokens, colors)
            before, tally = tally, tally.plus(batch, tokens, error, dict(met + Counter(reader.counts)), codec)
            rows = {"tokens": tokens} if batch.labels is None else {"tokens": tokens, "labels": batch.labels}
            held = {name: np.concatenate([*_kept(held, name), array[again:]]) for name, array in rows.items()}
            held, again = _write_chunks(writer, held, before, tally), 0
            bar.advance(batch.stop - bar.done)
    for problem in reader.problems:
        progress.say(f"skipped {problem}")
    if not tally.rows:
        raise PixseqError(f"{source.path} gave no images", "check the source and its split")
    tally = replace(tally, met=dict(met + Counter(reader.counts)))
    if held and len(held["tokens"]):
        writer.append(held, asdict(tally))
    if 0 in tally.classes:
        progress.say(
            f"note: {tally.classes.count(0)} of {len(tally.classes)} classes have no image among those encoded"
        )
    return tally


def _kept(held: dict[str, np.ndarray], name: str) -> list[np.ndarray]:
    return [held[name]] if name in held else []


def _write_chunks(
    writer: StoreWriter, held: dict[str, np.ndarray], before: Tally, after: Tally
) -> dict[str, np.ndarray]:
    """Write the whole chunks among `held` and return the rest.

    With them goes the last tally that they cover: `after` if nothing is left, else the one before this batch.
    """
    count = len(held["tokens"])
    whole = count - count % writer.chunk_rows
    if whole:
        state = after if whole == count else before
        writer.append({name: array[:whole] for name, array in held.items()}, asdict(state))
    return {name: array[whole:] for name, array in held.items()}


def _smallest(*numbers: int | None) -> int | None:
    return min((n for n in numbers if n is not None), default=None)


def _check_space(
    out: str | Path, source: Source, prep: Preparation, limit: int | None, width: int, n_vocab: int
) -> None:
    """Compare the space on the disk with what tokens take at most, compressed: the bits of the vocabulary."""
    images = _smallest(source.count, limit)
    if images is None:
        return
    need = images * max(prep.views, 1) * (width * math.ceil(math.log2(max(n_vocab, 2))) // 8 + 4)
    free = shutil.disk_usage(Path(out).absolute().parent).free
    if free < need / 4:  # pictures rarely compress to less
        raise PixseqError(
            f"{out} takes up to {need / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB free",
            "free some space, choose another --out, or encode fewer images with --limit",
        )
    if free < need:
        progress.say(f"note: {out} may take {need / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free")
