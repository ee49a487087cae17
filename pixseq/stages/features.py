"""features: every layer's activations of every image, in one forward pass (§2.2, §2.4).

A layer is what its family taps: Image GPT the ln_1 output that enters block l (L: the ln_f output), AIM the residual
stream after l blocks; its mean over positions, or whole.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pixseq import progress
from pixseq.artifacts.arrays import Store
from pixseq.artifacts.checkpoint import Checkpoint, open_checkpoint
from pixseq.artifacts.codec import Codec
from pixseq.artifacts.manifest import Manifest, reference
from pixseq.artifacts.metrics import write_metrics
from pixseq.artifacts.owning import resuming
from pixseq.artifacts.specs import Spec
from pixseq.artifacts.store_writer import StoreWriter
from pixseq.artifacts.targets import check_apart, check_target
from pixseq.choices import Attention, FeatureType, Pool, Precision, Weights
from pixseq.engine import exported
from pixseq.engine.cost import micro_batch_images
from pixseq.engine.extraction import PIXELS, Compute, Extraction
from pixseq.engine.image_store import image_batches, open_images, seen_images
from pixseq.engine.images import as_tensor
from pixseq.engine.listed import listed_layers
from pixseq.engine.masks import mask_count, masks_of
from pixseq.engine.opening import check_finite, load_weights, use_attention
from pixseq.engine.parts import origin
from pixseq.engine.run_folder import recipe_of
from pixseq.engine.scores import LossMeter, config_of, loss_in_feature_pass
from pixseq.errors import UsageError
from pixseq.interop.places import is_exported
from pixseq.models.family import Model, Shape, shape_from
from pixseq.runtime import Machine, generator, machine, placed
from pixseq.streams import Stream

BUFFER_BYTES, MOST_BYTES = 64 << 20, 256 << 20  # of one chunk of rows over all layers, as meant and at most
# Of one batch on a CPU: more are no faster there, and take more memory. Narrow models take as much in more positions,
# which pays for the many calls of a pass.
POSITIONS, NUMBERS = 2048, 1 << 19


def run(
    model: str | Path,
    tokens: str | Path,
    out: str | Path,
    layers: str = "all",
    pool: Pool = "mean",
    attention: Attention | None = None,
    dtype: FeatureType = "float32",
    masks: int | None = None,
    random_init: int | None = None,
    weights: Weights = "model",
    batch_size: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
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
    `loss`: where the metrics go that `evaluate` makes of the same images, in the same forward pass
    (`scores.loss_in_feature_pass` says of which models it can); a run that is gone on with makes none: it has not seen
    all images.
    """
    asked = FeatureOptions(
        layers, pool, attention, dtype, masks, random_init, weights, batch_size, seed, below, loss is not None
    )
    _check(model, asked)
    check_apart([out, *([] if loss is None else [loss])], [model, tokens])
    check_target(out, overwrite)
    meter = None
    with machine(device, precision) as where, torch.inference_mode():
        if is_exported(model):
            job = exported.extraction(where, model, tokens, batch_size, dtype)
        elif str(model) == PIXELS:
            job = _of_pixels(where, tokens, dtype)
        else:
            job, meter = _of_model(where, model, tokens, asked)
        made = _write(job, out, resume, overwrite)
        if loss is not None and meter is not None and meter.count == len(job.store):
            numbers = meter.numbers(model, job.store, job.codec.grid[2])
            config = config_of(weights, job.config["masks"], seed, None, where)
            write_metrics(loss, "evaluate", config, job.inputs, numbers, overwrite)
    return made


@dataclass(frozen=True)
class FeatureOptions:
    """The options of `run` that make the features, and whether the loss is measured beside them."""

    layers: str
    pool: str
    attention: str | None
    dtype: str
    masks: int | None
    random_init: int | None
    weights: str
    batch_size: int | None
    seed: int
    below: float | None
    loss: bool


def _check(model: str | Path, asked: FeatureOptions) -> None:
    """Raises UsageError for options that do not go together, or that only a checkpoint can follow."""
    if asked.below is not None and asked.pool != "mean":
        raise UsageError(f"--below goes with --pool mean, not with {asked.pool}", "leave one of them out")
    if has_layers(model):
        return
    options = (asked.masks, asked.random_init, asked.attention, asked.below)
    if asked.layers != "all" or asked.pool != "mean" or asked.loss or any(option is not None for option in options):
        what = "raw pixels have" if str(model) == PIXELS else f"{model} has"
        raise UsageError(f"{what} no layers, masks, weights or attention", "leave those options out")


def _of_pixels(where: Machine, tokens: str | Path, dtype: str) -> Extraction:
    """The decoded colours, as layer 0. Raises UsageError for whole pictures."""
    store = open_images(tokens, "tokens", "pixels")
    if store.whole:
        raise UsageError(f"{tokens} holds whole pictures, raw pixels are of one size", "encode squares: --resize crop")
    compute, codec = _pixels(store), store.codec
    config = {"layers": [0], "pool": "mean", "attention": None, "dtype": dtype, "masks": 1, "random_init": None}
    config |= {"weights": None, "precision": None, "seed": None}  # colours are looked up
    return Extraction(
        store,
        codec,
        compute,
        compute(seen_images(store, slice(0, 1), codec), 0).shape[2:],
        _pixel_batch(store),
        config,
        {"tokens": reference(tokens, store.manifest)},
        _meta(store, codec, config, tap=PIXELS, pool="none"),
        {"device": str(where.device)},
    )


def _of_model(
    where: Machine, model: str | Path, tokens: str | Path, asked: FeatureOptions
) -> tuple[Extraction, LossMeter | None]:
    """The layers of a checkpoint, and its loss where that is asked for."""
    checkpoint = open_checkpoint(model)
    shape, codec = shape_from(checkpoint.shape), checkpoint.codec
    store = open_images(tokens, shape.reads)
    codec.must_pair(checkpoint.path, store.codec, store.path)
    net = _net(where, checkpoint, shape, asked)
    layers, masks = chosen_layers(asked.layers, shape), mask_count(shape, asked.masks)
    batch = asked.batch_size or _images_at_once(net, where)
    if asked.loss and (not loss_in_feature_pass(shape) or asked.attention or asked.random_init is not None):
        raise UsageError(f"the loss of {model} takes a forward pass of its own", "pixseq evaluate makes it")
    first = first_below(asked.below, shape, store)
    compute = activations(where, net, layers, masks, asked.seed, asked.pool == "mean", first)
    row = compute(seen_images(store, slice(0, 1), codec), 0).shape[2:]
    meter = LossMeter(net, where) if asked.loss else None
    if meter is not None:  # not before: that one image counts once
        compute = activations(where, net, layers, masks, asked.seed, asked.pool == "mean", first, meter)
    config = {
        "layers": layers,
        "pool": asked.pool,
        "attention": net.attention,
        "dtype": asked.dtype,
        "masks": masks,
        "random_init": asked.random_init,
        "weights": asked.weights,
        "precision": where.precision,
        "seed": asked.seed if shape.needs_mask(net.attention) else None,
        **({} if asked.below is None else {"below": asked.below}),
    }
    inputs = {"tokens": reference(tokens, store.manifest), "model": reference(model, checkpoint.manifest)}
    meta = _meta(store, codec, config, tap=shape.hidden_states, pool=asked.pool)
    summary = {"device": str(where.device), "n_head": shape.n_head}
    return Extraction(store, codec, compute, row, batch, config, inputs, meta, summary), meter


def _images_at_once(net: Model, where: Machine) -> int:
    images = micro_batch_images(net, where)
    if where.device.type != "cpu":
        return images
    positions = max(POSITIONS, NUMBERS // net.shape.d_model)
    return max(min(images, positions // net.shape.n_ctx), 1)


def _net(where: Machine, checkpoint: Checkpoint, shape: Shape, asked: FeatureOptions) -> Model:
    """The model in its place, with trained or fresh weights and the attention that is asked for."""
    net = load_weights(shape, checkpoint, asked.weights)
    if asked.random_init is not None:
        net.init_weights(generator(asked.random_init, Stream.RANDOM_MODEL))
    check_finite(net, checkpoint.path)
    net = placed(net, where).eval()
    use_attention(net, checkpoint.path, asked.attention)
    net.freeze(where.dtype)
    return net


def _meta(store: Store, codec: Codec, config: dict[str, Any], tap: str, pool: str) -> dict[str, Any]:
    """What those who read the features need to know of them."""
    return {
        "layers": config["layers"],
        "masks": config["masks"],
        "class_names": store.codec.class_names,
        "height": codec.height,
        "width": codec.width,
        "tap": tap,
        "pool": pool,
        **({"below": config["below"]} if "below" in config else {}),
    }


def _write(job: Extraction, out: str | Path, resume: bool, overwrite: bool) -> Manifest:
    """The features, with the labels and images of its store beside them."""
    config, store = job.config, job.store
    layers, masks, total = config["layers"], config["masks"], len(store)
    specs = {"features": Spec(config["dtype"], (len(layers), None, *job.row))}
    stored = {"labels": store.labels(), "images": store.images()}
    beside = {name: values for name, values in stored.items() if values is not None}
    specs |= {name: Spec("int32", (None,)) for name in beside}
    image_bytes = masks * len(layers) * math.prod(job.row) * np.dtype(config["dtype"]).itemsize
    chunk_images = max(min(BUFFER_BYTES // (job.batch * image_bytes), 4096 // job.batch), 1) * job.batch
    chunk_images = min(chunk_images, max(MOST_BYTES // image_bytes, 1))  # a card takes more at once than readers do
    recipe = recipe_of(config, job.inputs, {})
    with resuming(out, overwrite, "features") as partial:
        writer = StoreWriter(partial, specs, recipe, chunk_images * masks, resume, overwrite)
        if writer.finished:
            return writer.finished
        start = writer.covered // masks
        with progress.track("features", total, "images", start) as bar, ThreadPoolExecutor(1) as beside_computing:
            written = beside_computing.submit(lambda: None)
            for first, images in image_batches(store, job.batch, start, job.codec):
                rows = {"features": job.compute(images, first).astype(config["dtype"])}
                for name, values in beside.items():
                    rows[name] = np.repeat(values[first : first + len(images)], masks)
                written.result()  # a batch is computed while the one before it goes to disk, and waits for it
                written = beside_computing.submit(writer.append, rows, {})
                bar.advance(len(images))
            written.result()
        shown = len(np.unique(beside["images"])) if "images" in beside else total
        summary = {"images": shown, "rows": total * masks, "layers": len(layers), "width": job.row[-1], **job.summary}
        source = origin(store)
        parents = {**job.inputs, **({"source": source} if source else {})}
        return writer.finish("features", "features", config, parents, summary, job.meta)


def has_layers(model: str | Path) -> bool:
    """Whether an extractor is a checkpoint, whose layers are chosen and whose positions are averaged."""
    return str(model) != PIXELS and not is_exported(model)


def first_below(below: float | None, shape: Shape, store: Store) -> int:
    """The first position below a part of the rows, or of all. Raises UsageError where that leaves none."""
    if below is None:
        return 0
    rows, columns, numbers = shape.sequence_grid(store.codec.grid)
    first = round(below * rows) if 0 <= below < 1 else rows
    if first >= rows:
        raise UsageError(f"--below is {below}, which leaves none of {rows} rows", "0.5 takes the bottom half")
    return first * columns * numbers


def activations(
    where: Machine,
    net: Model,
    layers: list[int],
    masks: int,
    seed: int,
    pooled: bool,
    first_position: int,
    meter: LossMeter | None = None,
) -> Compute:
    """images [B, ...], index of the first -> [layers, B * masks, (T,) D], an image's masks in consecutive rows."""
    last = None if meter is not None else max(layers)

    def compute(images: np.ndarray, first: int) -> np.ndarray:
        x = as_tensor(images)
        masked = masks_of(net, masks, (generator(seed, first + i, Stream.FEATURES_MASK) for i in range(len(x))), where)
        if masked is not None:
            x = x.repeat_interleave(masks, dim=0)
        with where.autocast():
            x = net.prepare(x.to(where.device))
            asked = {"logits": meter is not None, "pooled": pooled, "unpooled": not pooled}
            output = net(x, masked, **asked, first=first_position, last=last)
            if meter is not None:
                meter.add(output, x)
        assert output.features is not None
        return torch.stack([output.features[layer] for layer in layers]).float().cpu().numpy()

    return compute


def _pixel_batch(store: Store) -> int:
    """Images whose colours fill a buffer."""
    rows, columns, _ = store.codec.grid
    return max(min(BUFFER_BYTES // (4 * 3 * rows * columns), 4096), 1)


def _pixels(store: Store) -> Compute:
    """images [B, ...] -> their colours in [-1, 1], [1, B, values]."""
    store.codec.must_have_colours(store.path)
    if store.codec.palette is not None:
        colors = np.asarray(store.codec.palette, np.float32)
    else:
        colors = (np.arange(256, dtype=np.float32) / 127.5 - 1)[:, None]
    return lambda images, first: colors[images].reshape(1, len(images), -1)


def chosen_layers(text: str, shape: Shape) -> list[int]:
    """ "all" or "0,4,8" -> layer numbers between 0 and L. Raises UsageError."""
    layers = listed_layers("--layers", text)
    if layers is None:
        return list(range(shape.n_layer + 1))
    if layers[0] < 0 or layers[-1] > shape.n_layer:
        raise UsageError(
            f"--layers {text} asks for a layer outside 0..{shape.n_layer}", f"a layer is the {shape.hidden_states}"
        )
    return layers
