"""encode: pictures to sequences of tokens (sections 3.1 and 3.2), or to pixels, square or whole, streamed into a store.

A source of palette ids, pictures that someone else has encoded, becomes a tokens store too. What a batch becomes is in
engine/encoding.py; one loop here counts and writes it.
Shapes: N rows (images, or views of them), S the side in pixels, P the pixels of all whole pictures together.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections import Counter, deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.filesize import decimal

from pixseq import progress
from pixseq.artifacts.layout import delete
from pixseq.artifacts.manifest import Manifest
from pixseq.artifacts.owning import resuming
from pixseq.artifacts.targets import check_apart, check_target
from pixseq.choices import Filter, OnError, Part, Resize, Scheme
from pixseq.cores import threads, usable_cores
from pixseq.data.described import COUNTED_LABELS, describe, files_of, labels_line, say_narrow, say_skipped, source_line
from pixseq.engine.encoding import Encoded, Tally, counted, encoder
from pixseq.engine.parts import Subset, check_held_out, part_of_source
from pixseq.errors import PixseqError, UsageError
from pixseq.text import word

if TYPE_CHECKING:
    import numpy as np

    from pixseq.artifacts.codec import Codec
    from pixseq.artifacts.specs import Spec
    from pixseq.artifacts.store_writer import StoreWriter
    from pixseq.data.images import ImageBatch, Reader
    from pixseq.data.preparation import Preparation
    from pixseq.data.sources import Source, TokenSource
    from pixseq.data.token_files import TokenBatch, TokenReader

BATCH_BYTES = 32 << 20  # of pictures held at once
CHUNK_TOKENS = 1 << 22  # 8 MB, of pixels too: a whole chunk is read for one of its rows, and written at once
CHUNK_ROWS = 1024  # at most
CHUNKS_AT_ONCE = 4  # are written side by side, in half the time
ONE_BY_ONE = ("folder", "paths")  # sources of a file a picture, of which a chunk alone takes a second
USUAL_RATIO = 4 / 3  # of the sides of a whole picture, to guess its size by
OPENAI_COLORS = 512  # the vocabulary of ids whose palette is not given, unless they reach higher


def run(
    source: str,
    out: str | Path,
    palette: str | Path | None = None,
    split: str = "train",
    size: int = 32,
    resize: Resize = "crop",
    scheme: Scheme = "palette",
    views: int = 0,
    limit: int | None = None,
    val_fraction: float | None = None,
    part: Part | None = None,
    seed: int = 0,
    background: str = "white",
    on_error: OnError = "fail",
    workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    label_column: str | None = None,
    bit_depth: int | None = None,
    max_pixels: int | None = None,
    filter: Filter = "bilinear",
    resized_side: int | None = None,
) -> Manifest:
    """Write `source` as a store of tokens or pixels with all that training needs; returns its manifest.

    palette: each pixel becomes its nearest palette colour. rgb: three tokens a pixel, gray: its luma; 256 values each.
    pixels: no tokens, the pixels themselves, uint8 [N, S, S, 3]. Whole pictures (`resize` "whole") have sizes of their
    own: uint8 [P, 3], one picture after the other in raster order, and their `shapes` int32 [N, 2].
    Of a source of palette ids, `palette` (which may be left out) only says what they mean, and no picture is prepared.
    `views` above 1 make several rows an image: `images` int32 [N] then says which image of the source a row shows. It
    stands there too where several pictures of the source show one original: which one it is.
    `limit` takes so many images from all over the source, of every class its share. `val_fraction` holds a part of the
    images out, drawn by `seed` whatever the views, and `part` says which of the two is written: train or val.
    An interrupted run leaves NAME.partial; `resume` goes on from its last whole chunk, to the same content id.
    """
    from pixseq.data.preparation import Preparation
    from pixseq.data.records import MAX_PIXELS

    _check_options(scheme, palette, resize, limit)
    check_held_out(val_fraction, part)
    prep = Preparation(
        size=size,
        resize=resize,
        filter=filter,
        resized_side=resized_side,
        views=views,
        seed=seed,
        background=background,
        on_error=on_error,
        max_pixels=max_pixels or MAX_PIXELS,
        bit_depth=bit_depth,
    )
    check_apart([out], [source, palette])
    check_target(out, overwrite)
    job = _opened(source, split, label_column, scheme, palette, prep, limit, val_fraction, part)
    check_apart([out], files_of(job.source))
    return _write(out, job, usable_cores() if workers is None else workers, resume, overwrite)


class Job(NamedTuple):
    """What is encoded, and into what: what was `taken` of an opened source, and all that its manifest says of it."""

    source: Source | TokenSource
    taken: Subset
    prep: Preparation
    codec: Codec
    config: dict[str, Any]
    inputs: dict[str, dict[str, Any]]


def _opened(
    source: str,
    split: str,
    label_column: str | None,
    scheme: Scheme,
    palette: str | Path | None,
    prep: Preparation,
    limit: int | None,
    val_fraction: float | None,
    part: Part | None,
) -> Job:
    """The options of `run` as a job; what the source has to say of itself goes to stderr."""
    from pixseq.artifacts.codec import SCHEMES
    from pixseq.data.sources import TokenSource, open_any

    codec, inputs = _codec(scheme, prep.size, prep.resize, palette)
    opened = open_any(source, split, label_column, prep.bit_depth, prep.on_error, prep.max_pixels)
    config = {"scheme": scheme, "split": opened.split, "limit": limit, **asdict(prep)}
    config |= {"val_fraction": val_fraction, "part": part}
    if label_column is not None:
        config["label_column"] = label_column
    if isinstance(opened, TokenSource):
        config, labels = _as_ids(opened, config, prep)
        inputs |= labels
        codec = codec if palette is not None else _without_palette(codec)
    elif SCHEMES[scheme].has_palette and palette is None:
        fit = f"pixseq palette fit {word(source)} --size {prep.size} -o palette.json"
        raise UsageError(f"--scheme {scheme} needs a --palette", f"make one with `{fit}`")
    for note in opened.notes:
        progress.note(note)
    inputs["source"] = describe(opened)
    taken = part_of_source(opened, limit, val_fraction, part, prep.seed)
    return Job(opened, taken, prep, replace(codec, class_names=opened.class_names), config, inputs)


def _write(out: str | Path, job: Job, workers: int, resume: bool, overwrite: bool) -> Manifest:
    """The store that `job` makes, or what an interrupted run left of it gone on with."""
    source, taken, prep, codec, config, inputs = job
    kind, specs = codec.kind, _arrays(codec, source, prep.views)
    row_bytes = specs[kind].row_bytes * (int(prep.size**2 * USUAL_RATIO) if codec.whole else 1)
    _check_space(out, source.count if taken.rows is None else len(taken.rows), prep, row_bytes, codec.n_vocab)
    with resuming(out, overwrite, "encode") as partial:
        writer = _writer(partial, specs, config, inputs, row_bytes, resume, overwrite)
        if writer.finished:
            return writer.finished
        try:
            tally = _encode(source, taken.rows, prep, codec, kind, writer, workers)
        except BaseException:
            if not writer.rows:  # nothing to go on from
                delete(partial, keep=True)
            raise
        codec = _reached(codec, tally)
        summary = tally.summary(codec) | ({"part": taken.record} if taken.record else {}) | _labels(source, tally)
        return writer.finish(kind, "encode", config, inputs, summary, codec.written())


def _check_options(scheme: str, palette: str | Path | None, resize: str, limit: int | None) -> None:
    """Raises UsageError for options that make no sense, or not together."""
    from pixseq.artifacts.codec import SCHEMES

    if scheme not in SCHEMES:
        raise UsageError(f"--scheme is {scheme!r}", f"one of: {', '.join(SCHEMES)}")
    traits = SCHEMES[scheme]
    if palette is not None and not traits.has_palette:
        raise UsageError(f"--scheme {scheme} has no use for --palette", "leave it out, or take --scheme palette")
    if resize == "whole" and traits.kind == "tokens":
        raise UsageError(
            f"--resize whole keeps both sides, and tokens of --scheme {scheme} are of squares",
            "models that cut their squares from whole pictures read --scheme pixels",
        )
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} is not at least 1")


def _codec(scheme: str, size: int, resize: str, palette: str | Path | None) -> tuple[Codec, dict[str, dict[str, Any]]]:
    """What the numbers will mean, as far as the source does not tell, and the palette as an input, if there is one."""
    from pixseq.artifacts.codec import SCHEMES, Codec
    from pixseq.artifacts.palette import load_palette

    codec = Codec(scheme, size, size, SCHEMES[scheme].n_vocab)
    if resize == "whole":
        codec = replace(codec, height=None, width=None, shorter_side=size)
    if palette is None:
        return codec, {}
    loaded = load_palette(palette)
    codec = replace(codec, n_vocab=loaded.size, palette=loaded.colors.tolist(), palette_id=loaded.id)
    return codec, {"palette": {"path": str(palette), "id": loaded.id, "form": loaded.form}}


def _as_ids(
    source: TokenSource, config: dict[str, Any], prep: Preparation
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The config of ids that others made, for which no picture is prepared, and their file of labels as an input.

    Raises UsageError for options that only pictures can follow, PixseqError for pictures of another size.
    """
    usual = {"scheme": "palette", "views": 0, "resize": "crop", "background": "white", "on_error": "fail"}
    usual |= {"bit_depth": None, "filter": "bilinear", "resized_side": None}
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
    drawn = None if config["part"] is None else prep.seed
    config = {**config, **dict.fromkeys(asdict(prep)), "size": prep.size, "seed": drawn}
    return config, {} if source.labels is None else {"labels": describe(replace(source, ids=source.labels))}


def _without_palette(codec: Codec) -> Codec:
    """The vocabulary of ids whose colours are not known, as far as they are not read yet."""
    progress.note(
        "without a palette these tokens pair only with models that were imported without one, and cannot be drawn"
    )
    return replace(codec, n_vocab=OPENAI_COLORS)


def _reached(codec: Codec, tally: Tally) -> Codec:
    """The vocabulary of ids without a palette, which may have turned out to be larger."""
    if codec.n_vocab is None or len(tally.counts) <= codec.n_vocab:
        return codec
    progress.note(f"the ids reach {len(tally.counts) - 1}, so the vocabulary has {len(tally.counts)}")
    return replace(codec, n_vocab=len(tally.counts))


def _arrays(codec: Codec, source: Source | TokenSource, views: int) -> dict[str, Spec]:
    """The forms of the arrays of the store; the main one has the name of its kind."""
    from pixseq.artifacts.specs import PICTURE_SHAPES, Spec

    if codec.whole:
        main = Spec("uint8", (None, 3), whole=True)
    elif codec.kind == "pixels":
        main = Spec("uint8", (None, *codec.grid))
    else:
        main = Spec("uint16", (None, math.prod(codec.grid)))
    specs = {codec.kind: main}
    if source.has_labels:
        specs["labels"] = Spec("int32", (None,))
    if views > 1 or source.shows:
        specs["images"] = Spec("int32", (None,))
    if main.whole:
        specs[PICTURE_SHAPES] = Spec("int32", (None, 2))
    return specs


def _writer(
    partial: Path,
    specs: dict[str, Spec],
    config: dict[str, Any],
    inputs: dict[str, dict[str, Any]],
    row_bytes: int,
    resume: bool,
    overwrite: bool,
) -> StoreWriter:
    """What writes the store, in chunks of about CHUNK_TOKENS, and goes on from an interrupted run of the same."""
    from pixseq.artifacts.store_writer import StoreWriter

    # A run that met a bad picture may go on with --on-error skip: what it wrote is the same.
    recipe = {**config, **{role: parent["id"] for role, parent in inputs.items()}, "on_error": None}
    chunk_rows = max(min(2 * CHUNK_TOKENS // row_bytes, CHUNK_ROWS), 1)
    return StoreWriter(partial, specs, recipe, chunk_rows, resume, overwrite)


def _say_source(source: Source | TokenSource, chosen: np.ndarray | None) -> bool:
    """What a source holds; how many classes numbers are is only known, and said, after all."""
    progress.say(source_line(source, None if chosen is None else len(chosen)))
    if source.class_names or not source.has_labels:
        progress.say(labels_line(source, len(source.class_names or ())))
    return True


def _labels(source: Source | TokenSource, tally: Tally) -> dict[str, Any]:
    """What a summary says of the labels; of those that are numbers, stderr too."""
    found = len(source.class_names or [count for count in tally.classes if count])
    if source.has_labels and not source.class_names:
        progress.say(labels_line(source, found, len(tally.classes) == COUNTED_LABELS))
    return {"classes": found, "labels_from": source.labels_from if source.has_labels else None}


def _encode(
    source: Source | TokenSource,
    chosen: np.ndarray | None,
    prep: Preparation,
    codec: Codec,
    kind: str,
    writer: StoreWriter,
    workers: int,
) -> Tally:
    """One pass over those of the `chosen` images (None: all) that `writer` is not past yet.

    Raises PixseqError if there are none at all.
    """
    import numpy as np

    from pixseq.artifacts.specs import PICTURE_SHAPES
    from pixseq.data.images import ImageBatch

    tally = Tally(**writer.state)
    met = Counter(tally.met)
    most = CHUNK_ROWS if source.name in ONE_BY_ONE else CHUNKS_AT_ONCE * CHUNK_ROWS
    at_once = max(min(BATCH_BYTES // (max(prep.views, 1) * prep.size**2 * 3), most), 1)
    reader, encoded = _reading(source, chosen, prep, codec, tally.image, at_once, workers)
    making = _ahead(reader, encoded)  # closed here: threads must not end where garbage happens to be collected
    total = source.count if chosen is None else len(chosen)
    originals = source.shows() if source.shows else None
    narrow = said = False
    written: Future[None] | None = None  # the last batch, while the next is made
    with (
        progress.track("encode", total, "images", tally.image) as bar,
        ThreadPoolExecutor(1, "writing") as writing,
        contextlib.closing(making),
    ):
        for batch, counts, new in making:
            tally = tally.plus(batch, new, dict(met + counts), codec.class_names)
            images = batch.numbers if isinstance(batch, ImageBatch) and prep.views > 1 else None
            if originals is not None and isinstance(batch, ImageBatch):
                images = originals[batch.numbers].astype(np.int32)
            arrays = {kind: new.rows, PICTURE_SHAPES: new.shapes, "labels": batch.labels, "images": images}
            if written is not None:
                written.result()
            there = {name: array for name, array in arrays.items() if array is not None}
            written = writing.submit(writer.append, there, asdict(tally))
            bar.advance(batch.stop - bar.done)
            narrow = narrow or say_narrow(tally.met)
            said = said or _say_source(source, chosen)  # not before a source that cannot be read
        if written is not None:
            written.result()
    say_skipped(reader.problems, reader.counts.get("skipped", 0), source)
    if not tally.rows:
        raise PixseqError(f"{source.path} gave no images", "check the source and its split")
    tally = replace(tally, met=dict(met + Counter(reader.counts)))
    if 0 in tally.classes and codec.class_names:
        progress.warn(f"{tally.classes.count(0)} of {len(tally.classes)} classes have no image among those encoded")
    return tally


def _ahead(
    reader: Reader | TokenReader, encoded: Callable[[Any], Encoded]
) -> Generator[tuple[ImageBatch | TokenBatch, Counter, Encoded]]:
    """Each batch, what was met until it was read, and what it became: some are made while others are read or written.

    Where reading fails, those before come first, so that they are not lost.
    """
    fault: PixseqError | None = None
    window: deque[tuple[ImageBatch | TokenBatch, Counter, Any]] = deque()
    batches: Generator[ImageBatch | TokenBatch] = iter(reader)
    with threads(usable_cores()) as pool, contextlib.closing(batches):
        try:
            for batch in batches:
                window.append((batch, Counter(reader.counts), pool.apply_async(encoded, (batch,))))
                if len(window) > usable_cores():
                    batch, counts, new = window.popleft()
                    yield batch, counts, new.get()
        except PixseqError as error:
            fault = error
        for batch, counts, new in window:
            yield batch, counts, new.get()
    if fault is not None:
        raise fault


def _reading(
    source: Source | TokenSource,
    chosen: np.ndarray | None,
    prep: Preparation,
    codec: Codec,
    start: int,
    at_once: int,
    workers: int,
) -> tuple[Reader | TokenReader, Callable[[Any], Encoded]]:
    """A reader of batches, and what makes of each what is written."""
    from pixseq.artifacts.palette import MAX_COLORS
    from pixseq.data.images import Reader
    from pixseq.data.sources import TokenSource
    from pixseq.data.token_files import TokenReader

    if isinstance(source, TokenSource):
        most = codec.n_vocab if codec.palette and codec.n_vocab else MAX_COLORS
        reader = TokenReader(source, most, start, None, at_once, chosen)
        return reader, lambda batch: counted(batch.tokens, codec, None)
    return Reader(source, prep, start, None, at_once, workers, chosen), encoder(codec)


def _check_space(out: str | Path, images: int | None, prep: Preparation, row_bytes: int, n_vocab: int | None) -> None:
    """Compare the space on the disk with what the rows take at most, compressed: pixels all of it, of the 16 bits of a
    token those of its vocabulary.
    """
    if images is None:
        return
    if n_vocab is not None:
        row_bytes = row_bytes * math.ceil(math.log2(max(n_vocab, 2))) // 16
    need = images * max(prep.views, 1) * (row_bytes + 4)
    free = shutil.disk_usage(Path(out).absolute().parent).free
    if free < need / 4:  # pictures rarely compress to less
        raise PixseqError(
            f"{out} takes up to {decimal(need)}, but its disk has {decimal(free)} free",
            "free some space, choose another --out, or encode fewer images with --limit",
        )
    if free < need:
        progress.note(f"{out} may take {decimal(need)}, and its disk has {decimal(free)} free")
