"""finetune: a checkpoint and labelled tokens in, a classifier out (§2.3, §3.4)."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixseq.artifacts import atomic
from pixseq.artifacts.arrays import Store
from pixseq.artifacts.checkpoint import finish_checkpoint, open_checkpoint, read_weights
from pixseq.artifacts.manifest import Manifest, reference
from pixseq.config import FinetuneFile, as_dict
from pixseq.errors import PixseqError, UsageError
from pixseq.models.igpt import ImageGPT, Output, Shape
from pixseq.models.objectives import class_nats, generative_nats, random_mask, scored_images
from pixseq.runtime import Machine, generator, machine
from pixseq.stages.opening import check_pairing, first_images, load_weights, read_images
from pixseq.stages.training import (
    VALIDATION_MASK_STREAM,
    Images,
    Limits,
    averaged_weights,
    begin,
    micro_batch_images,
    run_summary,
    train,
)

MOST_CLASSES = 100_000  # more are not labels of classes


def run(
    model: str | Path,
    tokens: str | Path,
    out: str | Path,
    config: FinetuneFile,
    val: str | Path | None = None,
    val_fraction: float | None = None,
    weights: str = "model",
    device: str = "auto",
    precision: str = "auto",
    limits: Limits | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Manifest | None:
    """Train on L_clf + gen_weight * L_gen, stop early on validation accuracy, keep the best weights.

    Raises what pretrain raises, PixseqError for tokens without labels, and UsageError for a generative loss on a model
    that has no prediction head.
    """
    limits, train_config = limits or Limits(), config.finetune
    if val is None and val_fraction is None:
        val_fraction = 0.1  # the paper's split; early stopping needs one
    with machine(device, precision, ranks=True) as where:
        parent = open_checkpoint(model)
        store, images, held, inputs = read_images(tokens, val, val_fraction, train_config.seed, classes=True)
        check_pairing(parent.path, parent.codec, store)
        inputs["model"] = reference(model, parent.manifest)
        if not parent.shape.get("head", True) and train_config.gen_weight:
            raise UsageError(f"{model} has no prediction head, hence no generative loss", "give --gen-weight 0")
        shape = replace(Shape(**parent.shape), n_classes=count_classes(store, images, held))
        flags = {"val_fraction": val_fraction, "weights": weights, "precision": where.precision}
        recipe = {"config": as_dict(config), "inputs": {role: parent["id"] for role, parent in inputs.items()}, **flags}
        with begin(where, out, recipe, resume, overwrite) as (partial, state, record):
            if record is None:
                net = with_new_head(load_weights(Shape(**parent.shape), parent, weights), shape).to(where.device)
                held = first_images(held, train_config.val_images)
                micro = 2 * (limits.micro_batch or micro_batch_images(net, where))
                end = train(
                    where,
                    net,
                    train_config,
                    images,
                    joint_loss(train_config.gen_weight),
                    lambda m: accuracy_and_loss(where, m, held, micro, train_config.gen_weight, train_config.seed),
                    partial,
                    state,
                    limits,
                    score=lambda row: row["val_accuracy"],
                    patience=train_config.patience,
                    name="finetune",
                )
                if where.leads:
                    kept = {"model": read_weights(partial / "best.safetensors"), "last": end["model"]}
                    if end["ema"] is not None:
                        kept["ema"] = averaged_weights(end["ema"])
                    summary = run_summary(where, shape, images, end)
                    record = finish_checkpoint(
                        partial, kept, asdict(shape), store.meta, "finetune", as_dict(config), flags, inputs, summary
                    )
            if not where.leads:
                return None
            atomic.publish(partial, Path(out))
            return record


def count_classes(store: Store, images: Images, held: Images) -> int:
    """The number of classes of the labels. Raises PixseqError where there are no labels or only one class."""
    if images.labels is None or held.labels is None:
        raise PixseqError(
            f"{store.path} has no labels", "fine-tuning needs a source with labels, such as class folders"
        )
    names = store.meta.get("class_names")
    highest = int(max(images.labels.max(), held.labels.max()))
    n_classes = max(len(names) if names else 0, highest + 1)
    if n_classes > MOST_CLASSES:
        raise PixseqError(f"{store.path} holds the label {highest}", f"labels count classes, up to {MOST_CLASSES}")
    if n_classes < 2 or images.labels.min() < 0:
        raise PixseqError(f"{store.path} holds labels of {n_classes} class", "fine-tuning needs two classes or more")
    return n_classes


def with_new_head(net: ImageGPT, shape: Shape) -> ImageGPT:
    """The same weights with a zero-initialised class head (facts of the release: wclf has std 0)."""
    new = ImageGPT(shape).init_weights(torch.Generator())
    weights = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith("classifier.")}
    new.load_state_dict(weights, strict=False)
    return new


def joint_loss(gen_weight: float):
    """Losses of §2.3 a row: the joint loss, and its two parts for the log."""

    def losses(output: Output, x: Tensor, labels: Tensor, masked: Tensor | None) -> dict[str, Tensor]:
        clf = class_nats(output.class_logits, labels)
        if output.logits is None:
            return {"loss": clf, "clf_loss": clf}
        gen = generative_nats(output.logits, x, masked)
        return {"loss": clf + gen_weight * gen, "clf_loss": clf, "gen_loss": gen}

    return losses


@torch.no_grad()
def accuracy_and_loss(
    where: Machine, net: ImageGPT, held: Images, batch: int, gen_weight: float, seed: int
) -> dict[str, Any]:
    """val_accuracy and the joint val_loss over the held-out images; one random mask an image for bert."""
    net.eval()
    masks = None
    if net.shape.objective == "bert":
        masks = random_mask(len(held), net.shape.n_ctx, generator(seed, VALIDATION_MASK_STREAM))
    totals = torch.zeros(2, dtype=torch.float64, device=where.device)
    share, losses = where.share(len(held)), joint_loss(gen_weight)
    for start in range(share.start, share.stop, batch):
        part = range(start, min(start + batch, share.stop))
        x, y = (tensor.to(where.device) for tensor in held.batch(part))
        m = None if masks is None else masks[part.start : part.stop].to(where.device)
        with where.autocast():
            output = net(x, m)
            totals[0] += losses(output, x, y, m)["loss"].double().sum()
        totals[1] += (output.class_logits.argmax(1) == y).sum()
    where.sum([totals])
    net.train()
    return {
        "val_loss": float(totals[0]) / scored_images(len(held), masks),
        "val_accuracy": float(totals[1]) / len(held),
    }
