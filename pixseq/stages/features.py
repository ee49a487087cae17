"""features: every layer's activations of every image, in one forward sweep (§2.2, §2.4).

A layer is what its family taps: Image GPT the ln_1 output that enters block l (L: the ln_f output), AIM the residual
stream after l blocks; its mean over positions, or whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixseq import progress
from pixseq.artifacts import atomic
from pixseq.artifacts.arrays import Spec, Store, StoreWriter
from pixseq.artifacts.checkpoint import open_checkpoint
from pixseq.artifacts.codec import Codec
from pixseq.artifacts.manifest import Manifest, reference
from pixseq.artifacts.metrics import write_metrics
from pixseq.engine import exported
from pixseq.engine.cost import micro_batch_images
from pixseq.engine.images import as_tensor
from pixseq.engine.masks import mask_count, masks_of
from pixseq.engine.opening import (
    image_batches,
    load_weights,
    open_images,
    some_images,
    use_attention,
)
from pixseq.engine.parts import origin
from pixseq.engine.run_folder import recipe_of
from pixseq.engine.scores import Beside, config_of, shares_sweep
from pixseq.errors import UsageError
from pixseq.interop.exported import is_exported
from pixseq.models.family import Model, Shape, shape_from
from pixseq.runtime import Machine, generator, machine, placed
from pixseq.streams import Stream

PIXELS = "pixels"  # in place of a model: the decoded colours themselves, as a baseline
BUFFER_BYTES = 64 << 20  # of one chunk of rows over all layers


def run(
    model: str | Path,
    tokens: str | Path,
    out: str | Path,
    layers: str = "all",
    pool: str = "mean",
    attention: str | None = None,
    dtype: str = "float32",
    masks: int | None = None,
    random_init: int | None = None,
    weights: str = "model",
    batch_size: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    below: float | None = None,
    loss: str | Path | None = None,
) -> Manifest:
    """Write features [layers, N, D] of tokens or pixels, with `pool` "none" [layers, N, T, D]; returns the manifest.

    `model` is a checkpoint, a .pt2 file of torch.export (engine/exported.py), or "pixels" for the decoded colours.
    `random_init`: the checkpoint's architecture with fresh weights of that seed, the other baseline. BERT models see
    inputs masked as in training, `masks` (default 5) independent masks an image as consecutive rows (§4.6).
    `attention`: another pattern than the model's usual one.
    `below`: the mean is over the positions below this part of the rows, those that `sample --keep` draws.
    `loss`: where the metrics go that `evaluate` makes of the same images, in the same sweep (`scores.shares_sweep` says
    of which models it can); a sweep that is gone on with has not seen all images, and makes none.
    """
    if below is not None and pool != "mean":
        raise UsageError(f"--below goes with --pool mean, not with {pool}", "leave one of them out")
    atomic.check_target(out, overwrite)
    beside = None
    if not has_layers(model):
        options = (masks, random_init, attention, below, loss)
        if layers != "all" or pool != "mean" or any(option is not None for option in options):
            what = "raw pixels have" if str(model) == PIXELS else f"{model} has"
            raise UsageError(f"{what} no layers, masks, weights or attention", "leave those options out")
    with machine(device, precision) as where, torch.inference_mode():
        if is_exported(model):

            def write(store, codec, row, compute, batch, config, inputs, meta) -> Manifest:
                told = {"device": str(where.device)}
                return _write(store, codec, out, compute, row, batch, config, inputs, meta, told, resume, overwrite)

            return exported.sweep(where, model, tokens, batch_size, dtype, write)
        if str(model) == PIXELS:
            store = open_images(tokens, "tokens", "pixels")
            if store.whole:
                raise UsageError(
                    f"{tokens} holds whole pictures, raw pixels are of one size", "encode squares: --resize crop"
                )
            inputs = {"tokens": reference(tokens, store.manifest)}
            chosen, masks, batch = [0], 1, _pixel_batch(store)
            compute: Callable[[np.ndarray, int], np.ndarray] = _pixels(store)
            tap, weights, used, random, n_head = "pixels", None, None, False, None
            codec = store.codec
        else:
            checkpoint = open_checkpoint(model)
            shape = shape_from(checkpoint.shape)
            store = open_images(tokens, shape.reads)
            checkpoint.codec.must_pair(checkpoint.path, store.codec, store.path)
            inputs = {"tokens": reference(tokens, store.manifest), "model": reference(model, checkpoint.manifest)}
            codec = checkpoint.codec
            net = load_weights(shape, checkpoint, weights)
            if random_init is not None:
                net.init_weights(generator(random_init, Stream.RANDOM_MODEL))
            net = placed(net, where).eval()
            use_attention(net, checkpoint.path, attention)
            chosen = chosen_layers(layers, shape)
            masks = mask_count(shape, masks)
            batch = batch_size or micro_batch_images(net, where)
            if loss is not None and (not shares_sweep(shape) or attention or random_init is not None):
                raise UsageError(f"the loss of {model} takes a sweep of its own", "pixseq evaluate makes it")
            pooling = Pooling(pool, first_below(below, shape, store))
            compute = _activations(where, net, chosen, masks, seed, pooling)
            tap, used, random = shape.hidden_states, net.attention, shape.draws_masks(net.attention)
            n_head = shape.n_head
        sample = compute(some_images(store, slice(0, 1), codec), 0)
        config = {
            "layers": chosen,
            "pool": pool,
            "attention": used,
            "dtype": dtype,
            "masks": masks,
            "random_init": random_init,
            "weights": weights,
            "precision": None if str(model) == PIXELS else where.precision,  # colours are looked up
            "seed": seed if random else None,
            **({} if below is None else {"below": below}),
        }
        meta = {
            "layers": chosen,
            "masks": masks,
            "class_names": store.codec.class_names,
            "height": codec.height,
            "width": codec.width,
            "tap": tap,
            "pool": "none" if str(model) == PIXELS else pool,
            **({} if below is None else {"below": below}),
        }
        told = {"device": str(where.device), **({} if n_head is None else {"n_head": n_head})}
        row = sample.shape[2:]
        if loss is not None:
            beside = Beside(net, where)
            compute = _activations(where, net, chosen, masks, seed, pooling, beside)
        made = _write(store, codec, out, compute, row, batch, config, inputs, meta, told, resume, overwrite)
        if beside is not None and beside.count == len(store):
            numbers = beside.numbers(model, store, codec.grid[2])
            write_metrics(loss, "evaluate", config_of(weights, masks, seed, None, where), inputs, numbers, overwrite)
        return made


def _write(
    store: Store,
    codec: Codec,
    out: str | Path,
    compute: Callable[[np.ndarray, int], np.ndarray],
    row: tuple[int, ...],
    batch: int,
    config: dict[str, Any],
    inputs: dict[str, Any],
    meta: dict[str, Any],
    told: dict[str, Any],
    resume: bool,
    overwrite: bool,
) -> Manifest:
    """Sweep the store as `codec` sees it; `row` is the shape of one image's features of one layer, [D] or [T, D].

    `told` is for the summary: what does not make the numbers, the model's attention heads for those who attend over
    its features.
    """
    layers, masks, total = config["layers"], config["masks"], len(store)
    specs = {"features": Spec(config["dtype"], (len(layers), None, *row))}
    beside = {"labels": store.labels(), "images": store.images()}
    beside = {name: values for name, values in beside.items() if values is not None}
    specs |= {name: Spec("int32", (None,)) for name in beside}
    batch_bytes = batch * masks * len(layers) * math.prod(row) * np.dtype(config["dtype"]).itemsize
    chunk_images = max(min(BUFFER_BYTES // batch_bytes, 4096 // batch), 1) * batch
    recipe = recipe_of(config, inputs, {})
    with atomic.resuming(out, overwrite, "features") as partial:
        writer = StoreWriter(partial, specs, recipe, chunk_images * masks, resume, overwrite)
        if writer.finished:
            return writer.finished
        start = writer.covered // masks
        with progress.track("features", total, "images", start) as bar:
            for first, images in image_batches(store, batch, start, codec):
                rows = {"features": compute(images, first).astype(config["dtype"])}
                for name, values in beside.items():
                    rows[name] = np.repeat(values[first : first + len(images)], masks)
                writer.append(rows, {})
                bar.advance(len(images))
        shown = len(np.unique(beside["images"])) if "images" in beside else total
        summary = {"images": shown, "rows": total * masks, "layers": len(layers), "width": row[-1], **told}
        source = origin(store)
        parents = {**inputs, **({"source": source} if source else {})}
        return writer.finish("features", "features", config, parents, summary, meta)


def has_layers(model: str | Path) -> bool:
    """Whether an extractor is a checkpoint, whose layers are chosen and whose positions are averaged."""
    return str(model) != PIXELS and not is_exported(model)


@dataclass(frozen=True)
class Pooling:
    """How the positions of an image become a row: "none" keeps all; "mean" is of those from `first` on, or of all."""

    pool: str
    first: int | None

    def rows(self, values: Tensor) -> Tensor:
        """[B, D] as it is, or [B, T, D] to what is stored of it."""
        return values if self.first is None else values[:, self.first :].mean(1, dtype=torch.float32)


def first_below(below: float | None, shape: Shape, store: Store) -> int | None:
    """The first position below a part of the rows. Raises UsageError where that leaves none."""
    if below is None:
        return None
    rows, columns, numbers = shape.cells(store.codec.grid)
    first = round(below * rows) if 0 <= below < 1 else rows
    if first >= rows:
        raise UsageError(f"--below is {below}, which leaves none of {rows} rows", "0.5 takes the bottom half")
    return first * columns * numbers


def _activations(
    where: Machine,
    net: Model,
    layers: list[int],
    masks: int,
    seed: int,
    pooling: Pooling,
    beside: Beside | None = None,
):
    """images [B, ...], index of the first -> [layers, B * masks, (T,) D], an image's masks in consecutive rows."""

    def compute(images: np.ndarray, first: int) -> np.ndarray:
        x = as_tensor(images)
        masked = masks_of(net, masks, (generator(seed, first + i, Stream.FEATURES_MASK) for i in range(len(x))), where)
        if masked is not None:
            x = x.repeat_interleave(masks, dim=0)
        with where.autocast():
            x = net.prepare(x.to(where.device))
            pooled = pooling.pool == "mean" and pooling.first is None
            output = net(x, masked, logits=beside is not None, pooled=pooled, unpooled=not pooled)
            if beside is not None:
                beside.add(output, x)
        return torch.stack([pooling.rows(output.features[layer]) for layer in layers]).float().cpu().numpy()

    return compute


def _pixel_batch(store: Store) -> int:
    """Images whose colours fill a buffer."""
    rows, columns, _ = store.codec.grid
    return max(min(BUFFER_BYTES // (4 * 3 * rows * columns), 4096), 1)


def _pixels(store: Store):
    """images [B, ...] -> their colours in [-1, 1], [1, B, values]."""
    store.codec.must_have_colours(store.path)
    if store.codec.palette is not None:
        colors = np.asarray(store.codec.palette, np.float32)
    else:
        colors = (np.arange(256, dtype=np.float32) / 127.5 - 1)[:, None]
    return lambda images, first: colors[images].reshape(1, len(images), -1)


def chosen_layers(text: str, shape: Shape) -> list[int]:
    """ "all" or "0,4,8" -> layer numbers between 0 and L. Raises UsageError."""
    if text == "all":
        return list(range(shape.n_layer + 1))
    try:
        layers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UsageError(f"--layers {text!r} is no list of numbers", "all, or for example 0,4,8") from None
    if layers[0] < 0 or layers[-1] > shape.n_layer:
        raise UsageError(
            f"--layers {text} asks for a layer outside 0..{shape.n_layer}", f"a layer is the {shape.hidden_states}"
        )
    return layers
