"""evaluate: the loss of a model on tokens, and its accuracy where it has a classifier."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pixseq import progress
from pixseq.artifacts.arrays import Store
from pixseq.artifacts.atomic import check_target
from pixseq.artifacts.manifest import reference
from pixseq.artifacts.metrics import write_metrics
from pixseq.errors import PixseqError
from pixseq.models.igpt import ImageGPT
from pixseq.models.objectives import generative_nats, random_mask
from pixseq.runtime import Machine, generator, machine
from pixseq.stages.features import mask_count
from pixseq.stages.opening import check_pairing, open_model, open_tokens, token_batches
from pixseq.stages.training import micro_batch_images

MASK_STREAM, TIE_STREAM = 15, 16


def run(
    model: str | Path,
    tokens: str | Path,
    out: str | Path | None = None,
    weights: str = "model",
    masks: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """The metrics as a mapping, written as an artifact too when `out` is given.

    `nats_per_token` averages over all tokens (ar) or over the masked ones of `masks` masks an image (bert); a
    classifier's prediction for bert is the vote over the masks, ties broken at random (§4.6). A model without a
    prediction head has no nats, only its accuracy. Raises PixseqError where it has neither head.
    """
    if out is not None:
        check_target(out, overwrite)
    store = open_tokens(tokens)
    with machine(device, precision) as where:
        net, checkpoint = open_model(model, where, weights)
        check_pairing(checkpoint.path, checkpoint.codec, store, classes=net.shape.n_classes > 0)
        _check_measurable(net, checkpoint.path, store)
        batch = batch_size or 2 * micro_batch_images(net, where)
        nats, hits = _measure(where, net, store, batch, mask_count(net.shape, masks), seed)
    numbers: dict[str, Any] = {"images": store.shape("tokens")[0], "objective": net.shape.objective}
    if net.shape.head:
        numbers |= {"nats_per_token": nats, **_bits(nats, checkpoint.codec["scheme"])}
    if hits is not None:
        numbers["accuracy"] = hits
    if out is not None:
        inputs = {"model": reference(model, checkpoint.manifest), "tokens": reference(tokens, store.manifest)}
        config = {"weights": weights, "masks": masks, "precision": where.precision, "seed": seed}
        write_metrics(out, "evaluate", config, inputs, numbers, overwrite)
    return numbers


def _check_measurable(net: ImageGPT, path: Path, store: Store) -> None:
    if net.shape.head:
        return
    if not net.shape.n_classes:
        raise PixseqError(f"{path} has no prediction head: no loss to measure", "it gives features: pixseq features")
    if store.labels() is None:
        raise PixseqError(f"{path} is only a classifier, and {store.path} has no labels", "give tokens with labels")


def _bits(nats: float, scheme: str) -> dict[str, float]:
    """rgb has three tokens a pixel, the other schemes one."""
    bits = nats / math.log(2)
    return {"bits_per_dim": bits, "bits_per_pixel": 3 * bits} if scheme == "rgb" else {"bits_per_pixel": bits}


@torch.inference_mode()
def _measure(
    where: Machine, net: ImageGPT, store: Store, batch: int, masks: int, seed: int
) -> tuple[float, float | None]:
    """Mean nats a token, and the accuracy (None without classifier or labels)."""
    n = store.shape("tokens")[0]
    labels = store.labels() if net.shape.n_classes else None
    bert = net.shape.objective == "bert"
    if labels is not None and int(labels.max()) >= net.shape.n_classes:
        raise PixseqError(
            f"{store.path} has label {int(labels.max())}, the model tells {net.shape.n_classes} classes apart",
            "evaluate on tokens of the classes it was fine-tuned on",
        )
    nats, scored, hits = 0.0, 0, 0
    with progress.track("evaluate", n, "images") as bar:
        for first, tokens in token_batches(store, batch):
            x = torch.from_numpy(tokens.astype(np.int64)).to(where.device)
            votes = np.zeros((len(x), net.shape.n_classes), np.int64)
            for mask in range(masks):
                masked = None
                if bert:
                    streams = (generator(seed, first + i, mask, MASK_STREAM) for i in range(len(x)))
                    masked = torch.cat([random_mask(1, x.shape[1], stream) for stream in streams]).to(where.device)
                with where.autocast():
                    output = net(x, masked)
                    per_image = generative_nats(output.logits, x, masked) if net.shape.head else torch.zeros(len(x))
                nats += float(per_image.double().sum())
                scored += len(x) if masked is None else int(masked.any(1).sum())
                if net.shape.n_classes:
                    votes[np.arange(len(x)), output.class_logits.argmax(1).cpu().numpy()] += 1
            if labels is not None:
                if masks > 1:  # less than one vote: it decides only between equals
                    streams = (np.random.default_rng([seed, first + i, TIE_STREAM]) for i in range(len(x)))
                    votes = votes + np.stack([stream.random(votes.shape[1]) for stream in streams])
                hits += int((votes.argmax(1) == labels[first : first + len(x)]).sum())
            bar.advance(len(x))
    return nats / max(scored, 1), hits / n if labels is not None else None
