"""encode: pictures to sequences of tokens (sections 3.1 and 3.2), streamed into a tokens store.

A source of palette ids, pictures that someone else has encoded, becomes the same kind of store.
Shapes: N rows (images, or N views of each), T tokens a row, S the side in pixels.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable
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
    from pixseq.data.images import ImageBatch, Preparation, Reader
    from pixseq.data.sources import Source, TokenSource
    from pixseq.data.token_files import TokenBatch, TokenReader

Codec = dict[str, Any]  # what the tokens mean: scheme, size, vocabulary, palette, class names

BATCH_BYTES = 32 << 20  # of pictures held at once
CHUNK_TOKENS = 1 << 22  # 8 MB: a whole chunk is read for one of its rows, and written at once
OPENAI_COLORS = 512  # the vocabulary of ids whose palette is not given, unless they reach higher


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
    Of a source of palette ids, `palette` (which may be left out) only says what they mean, and no picture is prepared.
    An interrupted run leaves NAME.partial; `resume` goes on from its last whole chunk, to the same content id.
    """
    from pixseq.artifacts.arrays import Spec, StoreWriter
    from pixseq.artifacts.palette import load_palette
    from pixseq.data.images import Preparation
    from pixseq.data.sources import TokenSource, open_any
    from pixseq.numerics.quantize import SCHEMES

    if scheme not in SCHEMES:
        raise UsageError(f"--scheme {scheme} is not one of {', '.join(SCHEMES)}")
    if scheme != "palette" and palette is not None:
        raise UsageError(f"--scheme {scheme} has no use for --palette", "leave it out, or take --scheme palette")
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
    opened = open_any(source, split)
    config = {"scheme": scheme, "split": opened.split, "limit": limit, **asdict(prep)}
    if isinstance(opened, TokenSource):
        _check_ids(opened, config)
        config |= {**dict.fromkeys(asdict(prep)), "size": size}  # nothing was prepared
        if opened.has_labels:
            inputs["labels"] = describe(replace(opened, ids=opened.labels))
        if palette is None:
            codec["n_vocab"] = OPENAI_COLORS
            progress.say(
                "note: without a palette these tokens pair only with models that were imported without one, "
                "and cannot be drawn"
            )
    elif scheme == "palette" and palette is None:
        raise UsageError("--scheme palette needs a --palette", "make one with `pixseq palette fit`")
    for note in opened.notes:
        progress.say(f"note: {note}")
    inputs["source"] = describe(opened)
    codec["class_names"] = opened.class_names
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
        if len(tally.tokens) > codec["n_vocab"]:  # ids without a palette
            codec["n_vocab"] = len(tally.tokens)
            progress.say(f"note: the ids reach {codec['n_vocab'] - 1}, so the vocabulary has {codec['n_vocab']}")
        return writer.finish("tokens", "encode", config, inputs, tally.summary(codec), codec)


def _check_ids(source: TokenSource, config: dict[str, Any]) -> None:
    """Raises UsageError for options that only pictures can follow, PixseqError for pictures of another size."""
    usual = {"scheme": "palette", "views": 0, "resize": "crop", "background": "white", "on_error": "fail"}
    for name, value in usual.items():
        if config[name] != value:
            raise UsageError(
                f"--{name.replace('_', '-')} {config[name]} needs pictures, but {source.ids} holds palette ids",
                "leave it out",
            )
    if source.side != config["size"]:
        raise PixseqError(
            f"{source.ids} holds pictures of {source.side}x{source.side}, but --size is {config['size']}",
            f"--size {source.side}",
        )


@dataclass(frozen=True)
class Tally:
    """What has been encoded so far. Saved with the chunks, so that a resumed run reports what a whole one would.

    `image` source images were used up and gave `rows` rows; `met` is what the reader met on the way. `tokens` and
    `classes` count how often each occurred. The error is None where there were no pictures to compare with.
    """

    image: int = 0
    rows: int = 0
    squared_error: float | None = 0.0
    met: dict[str, int] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)

    def plus(
        self,
        batch: ImageBatch | TokenBatch,
        tokens: np.ndarray,
        error: float | None,
        met: dict[str, int],
        codec: Codec,
    ) -> Tally:
        labels = [] if batch.labels is None else batch.labels
        return Tally(
            image=batch.stop,
            rows=self.rows + len(tokens),
            squared_error=None if error is None else self.squared_error + error,
            met=met,
            tokens=_added(self.tokens, tokens.reshape(-1), codec["n_vocab"]),
            classes=_added(self.classes, labels, len(codec["class_names"])) if codec["class_names"] else [],
        )

    def summary(self, codec: Codec) -> dict[str, Any]:
        import numpy as np

        from pixseq.numerics.quantize import psnr_db, unigram_entropy

        counts = np.array(self.tokens)
        mse = None
        if self.squared_error is not None:
            mse = round(self.squared_error / (self.rows * codec["height"] * codec["width"]), 6)
        return {
            **self.met,
            "rows": self.rows,
            "tokens_per_row": int(counts.sum()) // self.rows,
            "n_vocab": codec["n_vocab"],
            "distinct_tokens": int(np.count_nonzero(counts)),
            "unigram_nats_per_token": round(unigram_entropy(counts), 6),
            "mse": mse,
            "psnr_db": psnr_db(mse) if mse else None,
        }


def _added(counts: list[int], values: np.ndarray | list[int], least: int) -> list[int]:
    import numpy as np

    more = np.bincount(values, minlength=max(least, len(counts)))
    more[: len(counts)] += np.array(counts, np.int64)
    return more.tolist()


def _encode(
    source: Source | TokenSource, prep: Preparation, codec: Codec, writer: StoreWriter, limit: int | None, workers: int
) -> Tally:
    """One pass over the images that `writer` does not hold yet. Raises PixseqError if there are none at all."""
    import numpy as np

    tally = Tally(**writer.state)
    again = writer.rows - tally.rows  # the chunks end inside a batch: its first rows are written already
    met = Counter(tally.met)
    at_once = max(min(BATCH_BYTES // (max(prep.views, 1) * prep.size**2 * 3), 1024), 1)
    left = None if limit is None else limit - tally.image
    reader, to_tokens = _reading(source, prep, codec, tally.image, left, at_once, workers)
    held: dict[str, np.ndarray] = {}  # rows that fill no chunk yet
    with progress.track("encode", _smallest(source.count, limit), "images", tally.image) as bar:
        for batch in reader:
            tokens, error = to_tokens(batch)
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


def _reading(
    source: Source | TokenSource,
    prep: Preparation,
    codec: Codec,
    start: int,
    limit: int | None,
    at_once: int,
    workers: int,
) -> tuple[Reader | TokenReader, Callable[[Any], tuple[np.ndarray, float | None]]]:
    """A reader of batches, and what makes of each its tokens and their squared error."""
    import numpy as np

    from pixseq.artifacts.palette import MAX_COLORS
    from pixseq.data.images import Reader
    from pixseq.data.sources import TokenSource
    from pixseq.data.token_files import TokenReader
    from pixseq.numerics.quantize import GRAYS, nearest_table, squared_error, to_tokens

    if isinstance(source, TokenSource):
        most = codec["n_vocab"] if codec["palette"] else MAX_COLORS
        return TokenReader(source, most, start, limit, at_once), lambda batch: (batch.tokens, None)
    scheme = codec["scheme"]
    colors = np.array(codec["palette"]) if scheme == "palette" else GRAYS
    table = nearest_table(colors) if scheme == "palette" else None

    def encoded(batch: ImageBatch) -> tuple[np.ndarray, float]:
        tokens = to_tokens(batch.images, scheme, table)
        return tokens, 0.0 if scheme == "rgb" else squared_error(batch.images, tokens, colors)

    return Reader(source, prep, start, limit, at_once, workers), encoded


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
    out: str | Path, source: Source | TokenSource, prep: Preparation, limit: int | None, width: int, n_vocab: int
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
