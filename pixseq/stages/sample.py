"""sample: pictures from nothing, or completions of given ones (§2, figure 3)."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from pixseq import progress
from pixseq.artifacts.checkpoint import Checkpoint
from pixseq.artifacts.codec import Codec
from pixseq.artifacts.manifest import Manifest, reference
from pixseq.artifacts.owning import owns, writing
from pixseq.artifacts.picture import check_png, save_png, save_pngs
from pixseq.artifacts.specs import Spec
from pixseq.artifacts.store_writer import StoreWriter
from pixseq.choices import OnError, Precision, Weights
from pixseq.drawing.grids import grid
from pixseq.engine import image_store, opening
from pixseq.engine.parts import part_of_source, prompts_of_store
from pixseq.errors import PixseqError, UsageError
from pixseq.models.family import Model
from pixseq.models.sampling import Decoder, sample, way_of_steps
from pixseq.runtime import Machine, generator, machine
from pixseq.runtime.cuda import once_done, recorded
from pixseq.streams import Stream
from pixseq.text import word

if TYPE_CHECKING:
    from pixseq.data.preparation import Preparation
    from pixseq.data.sources import Source

HIDDEN = 128  # the grey that stands for what a completion did not see


@owns("sample", "out", "tokens_out", "images_out")
def run(
    model: str | Path,
    out: str | Path | None,
    count: int = 16,
    prompt: str | None = None,
    split: str | None = None,
    keep: float = 0.5,
    completions: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    tokens_out: str | Path | None = None,
    images_out: str | Path | None = None,
    columns: int | None = None,
    weights: Weights = "model",
    batch_size: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    overwrite: bool = False,
    label_column: str | None = None,
    bit_depth: int | None = None,
    max_pixels: int | None = None,
    on_error: OnError = "fail",
) -> Manifest | None:
    """Draw `count` pictures; with a `prompt` (tokens or a source of images), `completions` of each of `count` images.

    The prompt's first `keep` of the rows stay untouched. A completion grid shows of each: what was given, what was
    drawn, the original. `tokens_out`: also a tokens store (all first completions, then all second ones ...);
    `images_out`: also a folder of single PNGs. Without `out` no picture is drawn. `split`, `label_column`, `bit_depth`,
    `max_pixels` and `on_error` say how a source is read. Returns the picture's manifest.
    """
    _check(count, keep, completions, temperature, top_k, top_p, prompt is not None)
    reading = _reading(prompt, split, label_column, bit_depth, max_pixels, on_error)
    _check_columns(columns, None if prompt is None else completions + 2)
    check_png(out)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    with machine(device, precision) as where:
        net, checkpoint = _open(model, where, weights)
        given = None if prompt is None else _prompt(checkpoint, prompt, reading, count, keep)
        tokens = _drawn(model, net, where, given, count, completions, seed, batch_size, settings)
        with where.autocast():
            steps = way_of_steps(net)
    inputs: dict[str, Any] = {"model": reference(model, checkpoint.manifest)}
    config: dict[str, Any] = {"count": count, "seed": seed, **settings, "weights": weights}
    config |= {**where.used(), "steps": steps}
    if given is not None:
        inputs["prompt"] = given.reference
        config |= {"keep": keep, "completions": completions, "split": split, "part": given.part, **reading}
    images = checkpoint.codec.to_images(tokens)
    if tokens_out is not None:
        _save_tokens(tokens_out, tokens, checkpoint, config, inputs, overwrite)
    if images_out is not None:
        save_pngs(images_out, images, range(len(images)), "sample", overwrite)
    if out is None:
        return None
    picture = _picture(images, given, checkpoint.codec, completions, columns)
    return save_png(out, picture, "sample", config, inputs, {"pictures": len(images)}, overwrite)


class Prompt(NamedTuple):
    """Images to complete: all their tokens, uint16 [n, T], of which the first `kept` are given.

    `reference` is that of where they come from, `part` a record of how they were chosen there (None: all of them).
    """

    tokens: np.ndarray
    kept: int
    reference: dict[str, Any]
    part: dict[str, Any] | None


def _open(model: str | Path, where: Machine, weights: str) -> tuple[Model, Checkpoint]:
    """Raises PixseqError for a model that cannot draw pictures."""
    net, checkpoint = opening.open_model(model, where, weights)
    if not net.shape.can_sample:
        raise PixseqError(f"{model} is a {net.shape.objective} model: it draws no pixels", "sample an ar model")
    if not net.shape.head:
        raise PixseqError(f"{model} has no prediction head: it cannot draw", "it gives features: pixseq features")
    checkpoint.codec.must_have_colours(model, "import it again with --palette kmeans_centers.npy")
    opening.check_finite(net, model)
    return net, checkpoint


def _drawn(
    model: str | Path,
    net: Model,
    where: Machine,
    given: Prompt | None,
    count: int,
    completions: int,
    seed: int,
    batch_size: int | None,
    settings: dict[str, Any],
) -> np.ndarray:
    """Tokens uint16 [N, T] in raster order: `count` pictures, or all first completions, then all second ones ...

    Raises PixseqError for a model that gives no numbers to draw from.
    """
    kept = 0 if given is None else given.kept
    order = _order(model, net, kept)
    starts = np.zeros((count, 0), np.uint16) if given is None else given.tokens[:, order[:kept]]
    at_once = batch_size or pictures_at_once(where, net)
    try:
        tokens = draw_pictures(where, net, np.tile(starts, (completions, 1)), seed, at_once, settings, completions)
    except FloatingPointError:
        raise PixseqError(
            f"{model} gives logits that are not finite: nothing can be drawn from them",
            f"the model diverged or is damaged: pixseq check {word(model)} tells; or sample with --precision fp32",
        ) from None
    return tokens[:, np.argsort(order)]


def _order(model: str | Path, net: Model, kept: int) -> np.ndarray:
    """The position that each step draws. Raises PixseqError where the first `kept` steps are not those positions."""
    order = np.arange(net.shape.n_ctx) if net.order is None else net.order.cpu().numpy()
    if np.any(order[:kept] >= kept):
        raise PixseqError(
            f"{model} draws in {net.shape.order} order: the rows kept of the prompt are not what it sees first",
            "sample it without --prompt",
        )
    return order


def _check(
    count: int, keep: float, completions: int, temperature: float, top_k: int, top_p: float, prompted: bool
) -> None:
    for flag, value in (("count", count), ("completions", completions)):
        if value < 1:
            raise UsageError(f"--{flag} is {value}, it must be at least 1")
    if not 0 <= keep < 1:
        raise UsageError(f"--keep is {keep}, it must lie in [0, 1)", "0.5 keeps the top half of the rows")
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"--temperature is {temperature}, it must be 0 or more", "0 takes the likeliest colour")
    if top_k < 0:
        raise UsageError(f"--top-k is {top_k}, it must not be negative", "0 draws from all colours")
    if not 0 < top_p <= 1:
        raise UsageError(f"--top-p is {top_p}, it must lie in (0, 1]", "1 draws from all colours")
    if completions > 1 and not prompted:
        raise UsageError("--completions was given without --prompt", "use --count for more pictures")


def _check_columns(columns: int | None, tiles: int | None) -> None:
    """`tiles`: that one completed image takes, None where there is no prompt."""
    if columns is not None and columns < 1:
        raise UsageError(f"--columns {columns} must be at least 1")
    if columns is not None and tiles is not None and columns % tiles:
        raise UsageError(
            f"--columns is {columns}, and a completion takes {tiles}: the prompt, {tiles - 2} drawn, the original",
            f"give a multiple of {tiles}, such as {max(round(columns / tiles), 1) * tiles}",
        )


def _is_store(prompt: str) -> bool:
    return (Path(prompt) / "zarr.json").is_file()


def _reading(
    prompt: str | None,
    split: str | None,
    label_column: str | None,
    bit_depth: int | None,
    max_pixels: int | None,
    on_error: OnError,
) -> dict[str, Any]:
    """The options of reading pictures that were given. Raises UsageError where there are no pictures to read."""
    options = {"split": split, "label_column": label_column, "bit_depth": bit_depth, "max_pixels": max_pixels}
    options["on_error"] = on_error if on_error != "fail" else None
    reading = {option: value for option, value in options.items() if value is not None}
    if reading and (prompt is None or _is_store(prompt)):
        flag = "--" + next(iter(reading)).replace("_", "-")
        raise UsageError(
            f"{flag} is of a --prompt SOURCE of pictures"
            + (", and there is no --prompt" if prompt is None else f", and {prompt} is a store"),
            "leave it out",
        )
    return reading


def _prompt(checkpoint: Checkpoint, prompt: str, reading: dict[str, Any], count: int, keep: float) -> Prompt:
    """`count` images that stand for all of a store or a source. `reading`: how a source is to be read, see `run`."""
    if _is_store(prompt):
        store = image_store.open_images(prompt, "tokens")
        checkpoint.codec.must_pair(checkpoint.path, store.codec, store.path)
        rows, part = prompts_of_store(store, count)
        tokens, kept = image_store.seen_images(store, rows), checkpoint.codec.kept(keep)
        return Prompt(tokens, kept, reference(prompt, store.manifest), part)
    from pixseq.data.described import describe
    from pixseq.data.images import Reader
    from pixseq.data.preparation import Preparation

    how = {key: value for key, value in reading.items() if key in ("bit_depth", "max_pixels", "on_error")}
    prep = Preparation(size=checkpoint.codec.grid[0], **how)
    source = _opened(prompt, reading.get("split"), reading.get("label_column"), prep)
    for note in source.notes:
        progress.note(note)
    chosen = part_of_source(source, count)
    reader = Reader(source, prep, batch_size=count, rows=chosen.rows)
    images = next(iter(reader)).images
    for problem in reader.problems:
        progress.say(f"skipped {problem}")
    kept = checkpoint.codec.kept(keep)
    return Prompt(checkpoint.codec.to_tokens(images), kept, describe(source), chosen.record)


def _opened(prompt: str, split: str | None, label_column: str | None, prep: Preparation) -> Source:
    """A split of a source; None: test where there is one, else whatever it has."""
    from pixseq.data.records import NoSuchSplit
    from pixseq.data.sources import open_source

    how = (label_column, prep.bit_depth, prep.on_error, prep.max_pixels)
    try:
        return open_source(prompt, split or "test", *how)
    except NoSuchSplit:
        if split:
            raise
        return open_source(prompt, "train", *how)


def pictures_at_once(where: Machine, net: Model) -> int:
    """As many as fit their keys and values into a quarter of the memory, up to 512: a step of few is all overhead.

    A CPU spends its time fetching keys and values, of which half as many are nearer.
    """
    cache = Decoder.bytes(net.shape, 2 if where.precision == "bf16" else 4)
    most = 256 if where.device.type == "cpu" else 512
    return max(min(where.memory_bytes() // 4 // cache, most), 1)


def draw_pictures(
    where: Machine,
    net: Model,
    starts: np.ndarray,
    seed: int,
    batch_size: int,
    settings: dict[str, Any],
    completions: int,
) -> np.ndarray:
    """Complete `starts` [N, P] to uint16 [N, T]. Picture i uses the random numbers of (seed, i), whatever its batch.

    `starts` holds all prompts, `completions` times; those of one prompt are drawn together, so that it is run once.
    """
    n, total = len(starts), net.shape.n_ctx
    drawn = total - starts.shape[1]
    order = np.arange(n).reshape(completions, -1).T.ravel()
    tokens, record = np.empty((n, total), np.uint16), partial(recorded, where.device)
    with progress.track("sample", n * drawn, "tokens") as bar:
        for first in range(0, n, batch_size):
            part = order[first : first + batch_size]
            uniform = torch.stack([torch.rand(drawn, generator=generator(seed, int(i), Stream.SAMPLE)) for i in part])
            prompt = torch.from_numpy(starts[part].astype(np.int64))
            advance = once_done(where.device, bar.advance)
            given = prompt.to(where.device), uniform.to(where.device)
            with where.autocast():
                done = sample(net, *given, **settings, advance=advance, record=record)
            tokens[part] = done.cpu().numpy()
            bar.reach((first + len(part)) * drawn)
    return tokens


def _save_tokens(
    path: str | Path,
    tokens: np.ndarray,
    checkpoint: Checkpoint,
    config: dict[str, Any],
    inputs: dict[str, Any],
    overwrite: bool,
) -> None:
    with writing(path, overwrite, "sample") as partial:
        writer = StoreWriter(partial, {"tokens": Spec("uint16", (None, tokens.shape[1]))}, {}, chunk_rows=1024)
        writer.append({"tokens": tokens}, {})
        writer.finish("tokens", "sample", config, inputs, {"rows": len(tokens)}, checkpoint.codec.written())


def _picture(
    images: np.ndarray, given: Prompt | None, codec: Codec, completions: int, columns: int | None
) -> np.ndarray:
    """All that was drawn as one grid."""
    if given is None:
        return grid(images, columns or max(round(len(images) ** 0.5), 1))
    return _completion_grid(images, codec.to_images(given.tokens), given.kept, codec, completions, columns)


def _completion_grid(
    drawn: np.ndarray, originals: np.ndarray, kept: int, codec: Codec, completions: int, columns: int | None
) -> np.ndarray:
    """An image beside the other: what was given, its completions, the original; None: one image a row."""
    shown = originals.copy()
    shown[:, kept // math.prod(codec.grid[1:]) :] = HIDDEN
    by_image = drawn.reshape(completions, len(originals), *drawn.shape[1:]).swapaxes(0, 1)
    rows = np.concatenate([shown[:, None], by_image, originals[:, None]], axis=1)
    labels = ["prompt", *[f"sample {i + 1}" for i in range(completions)], "original"]
    beside = min((columns or len(labels)) // len(labels), len(originals))
    return grid(rows.reshape(-1, *drawn.shape[1:]), beside * len(labels), column_labels=labels * beside)
