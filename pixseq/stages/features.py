"""features: every layer's pooled activations of every image, in one forward sweep (§2.2, §2.4).

Layer l is the mean over positions of the ln_1 output that enters block l; layer L that of the ln_f output.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pixseq import progress
from pixseq.artifacts import atomic
from pixseq.artifacts.arrays import Spec, Store, StoreWriter
from pixseq.artifacts.checkpoint import open_checkpoint
from pixseq.artifacts.manifest import Manifest, reference
from pixseq.errors import PixseqError, UsageError
from pixseq.models.igpt import ImageGPT, Shape
from pixseq.models.objectives import random_mask
from pixseq.runtime import Machine, generator, machine
from pixseq.stages.decode import palette_of
from pixseq.stages.opening import check_pairing, load_weights, open_tokens, some_tokens, token_batches
from pixseq.stages.training import micro_batch_images

PIXELS = "pixels"  # in place of a model: the decoded colours themselves, as a baseline
MASK_STREAM, RANDOM_STREAM = 13, 14
BUFFER_BYTES = 64 << 20  # of one chunk of rows over all layers


def run(
    model: str | Path,
    tokens: str | Path,
    out: str | Path,
    layers: str = "all",
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
) -> Manifest:
    """Write features [layers, N, D] of `tokens`; returns the manifest.

    `model` is a checkpoint, or "pixels" for the decoded colours. `random_init`: the checkpoint's architecture with
    fresh weights of that seed, the other baseline. BERT models see inputs masked as in training, `masks` (default 5)
    independent masks an image as consecutive rows (§4.6).
    """
    if dtype not in ("float32", "float16"):
        raise UsageError(f"--dtype is {dtype!r}", "one of: float32, float16")
    atomic.check_target(out, overwrite)
    store = open_tokens(tokens)
    inputs = {"tokens": reference(tokens, store.manifest)}
    with machine(device, precision) as where, torch.inference_mode():
        if str(model) == PIXELS:
            if layers != "all" or masks is not None or random_init is not None:
                raise UsageError("raw pixels have no layers, masks or weights", "leave those options out")
            chosen, masks, batch = [0], 1, max(min(BUFFER_BYTES // (12 * store.shape("tokens")[1]), 4096), 1)
            compute: Callable[[np.ndarray, int], np.ndarray] = _pixels(store)
        else:
            checkpoint = open_checkpoint(model)
            check_pairing(checkpoint.path, checkpoint.codec, store)
            inputs["model"] = reference(model, checkpoint.manifest)
            shape = Shape(**checkpoint.shape)
            net = load_weights(shape, checkpoint, weights)
            if random_init is not None:
                net.init_weights(generator(random_init, RANDOM_STREAM))
            net = net.to(where.device).eval()
            chosen = chosen_layers(layers, shape.n_layer)
            masks = mask_count(shape, masks)
            batch = batch_size or micro_batch_images(net, where)
            compute = _activations(where, net, chosen, masks, seed)
        width = compute(some_tokens(store, slice(0, 1)), 0).shape[-1]
        config = {
            "layers": chosen,
            "dtype": dtype,
            "masks": masks,
            "random_init": random_init,
            "weights": None if str(model) == PIXELS else weights,
            "precision": where.precision,
            "seed": seed if masks > 1 else None,
        }
        meta = {
            "layers": chosen,
            "masks": masks,
            "class_names": store.meta.get("class_names"),
            "tap": "pixels" if str(model) == PIXELS else "ln_1 output entering the block; the last layer: ln_f output",
            "pool": "none" if str(model) == PIXELS else "mean",
        }
        return _write(store, out, compute, width, batch, config, inputs, meta, resume, overwrite)


def _write(
    store: Store,
    out: str | Path,
    compute: Callable[[np.ndarray, int], np.ndarray],
    width: int,
    batch: int,
    config: dict[str, Any],
    inputs: dict[str, Any],
    meta: dict[str, Any],
    resume: bool,
    overwrite: bool,
) -> Manifest:
    layers, masks, total = config["layers"], config["masks"], store.shape("tokens")[0]
    specs = {"features": Spec(config["dtype"], (len(layers), None, width))}
    labels = store.labels()
    if labels is not None:
        specs["labels"] = Spec("int32", (None,))
    batch_bytes = batch * masks * len(layers) * width * np.dtype(config["dtype"]).itemsize
    chunk_images = max(min(BUFFER_BYTES // batch_bytes, 4096 // batch), 1) * batch
    recipe = {"config": config, "inputs": {role: parent["id"] for role, parent in inputs.items()}}
    with atomic.resuming(out, overwrite) as partial:
        writer = StoreWriter(partial, specs, recipe, chunk_images * masks, resume, overwrite)
        start = writer.rows // masks
        with progress.track("features", total, "images", start) as bar:
            for first, tokens in token_batches(store, batch, start):
                rows = {"features": compute(tokens, first).astype(config["dtype"])}
                if labels is not None:
                    rows["labels"] = np.repeat(labels[first : first + len(tokens)], masks)
                writer.append(rows, {})
                bar.advance(len(tokens))
        summary = {"images": total, "rows": total * masks, "layers": len(layers), "width": width}
        return writer.finish("features", "features", config, inputs, summary, meta)


def _activations(where: Machine, net: ImageGPT, layers: list[int], masks: int, seed: int):
    """tokens [B, T], index of the first image -> [layers, B * masks, D], an image's masks in consecutive rows."""

    def compute(tokens: np.ndarray, first: int) -> np.ndarray:
        x = torch.from_numpy(tokens.astype(np.int64))
        masked = None
        if net.shape.objective == "bert":
            x = x.repeat_interleave(masks, dim=0)
            masked = torch.cat(
                [random_mask(masks, x.shape[1], generator(seed, first + i, MASK_STREAM)) for i in range(len(tokens))]
            ).to(where.device)
        with where.autocast():
            output = net(x.to(where.device), masked, logits=False, pooled=True)
        return torch.stack([output.features[layer] for layer in layers]).cpu().numpy()

    return compute


def _pixels(store: Store):
    """tokens [B, T] -> their colours in [-1, 1], [1, B, T * channels]."""
    palette = palette_of(store.path, store.meta)
    if palette is not None:
        colors = np.asarray(palette, np.float32)
    else:
        colors = (np.arange(256, dtype=np.float32) / 127.5 - 1)[:, None]
    return lambda tokens, first: colors[tokens].reshape(1, len(tokens), -1)


def chosen_layers(text: str, n_layer: int) -> list[int]:
    """ "all" or "0,4,8" -> layer numbers between 0 and L. Raises UsageError."""
    if text == "all":
        return list(range(n_layer + 1))
    try:
        layers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UsageError(f"--layers {text!r} is no list of numbers", "all, or for example 0,4,8") from None
    if layers[0] < 0 or layers[-1] > n_layer:
        raise UsageError(f"--layers {text} asks for a layer outside 0..{n_layer}", "layer L is the ln_f output")
    return layers


def mask_count(shape: Shape, masks: int | None) -> int:
    """5 for bert unless told otherwise; 1 for ar, whose inputs are never masked."""
    if shape.objective == "ar":
        if masks not in (None, 1):
            raise PixseqError("--masks was given for an autoregressive model", "only bert models see masked inputs")
        return 1
    if masks is not None and masks < 1:
        raise UsageError(f"--masks is {masks}, it must be at least 1")
    return 5 if masks is None else masks
