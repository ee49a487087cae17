"""finetune: a checkpoint and labelled tokens in, a classifier out (§2.3, §3.4)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixseq.artifacts import atomic
from pixseq.artifacts.arrays import Store
from pixseq.artifacts.checkpoint import finish_checkpoint, open_checkpoint
from pixseq.artifacts.manifest import Manifest, reference
from pixseq.config import FinetuneFile, as_dict
from pixseq.errors import PixseqError
from pixseq.models.igpt import ImageGPT, Output, Shape
from pixseq.models.objectives import class_nats, generative_nats, random_mask, scored_images
from pixseq.runtime import Machine, generator, machine
from pixseq.stages.opening import check_pairing, load_weights
from pixseq.stages.pretrain import averaged_weights, begin, codec, first_images, read_images
from pixseq.stages.training import VALIDATION_MASK_STREAM, Images, Limits, micro_batch_images, train


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

    Raises what pretrain raises, and PixseqError for tokens without labels.
    """
    limits, recipe_config = limits or Limits(), config.finetune
    if val is None and val_fraction is None:
        val_fraction = 0.1  # the paper's split; early stopping needs one
    with machine(device, precision, ranks=True) as where:
        parent = open_checkpoint(model)
        store, images, held, inputs = read_images(tokens, val, val_fraction, recipe_config.seed)
        check_pairing(parent, store)
        inputs["model"] = reference(model, parent.manifest)
        n_classes = count_classes(store, images, held)
        recipe = {
            "config": as_dict(config),
            "inputs": {role: parent["id"] for role, parent in inputs.items()},
            "val_fraction": val_fraction,
            "weights": weights,
            "precision": where.precision,
        }
        partial, state = begin(where, out, recipe, resume, overwrite)
        shape = dataclasses.replace(Shape(**parent.shape), n_classes=n_classes)
        net = with_new_head(load_weights(Shape(**parent.shape), parent, weights), shape).to(where.device)
        held = first_images(held, recipe_config.val_images)
        micro = 2 * (limits.micro_batch or micro_batch_images(net, where))
        end = train(
            where,
            net,
            recipe_config,
            images,
            joint_loss(recipe_config.gen_weight),
            lambda m: accuracy_and_loss(where, m, held, micro, recipe_config.gen_weight, recipe_config.seed),
            partial,
            state,
            limits,
            score=lambda row: row["val_accuracy"],
            patience=recipe_config.patience,
            name="finetune",
        )
        if not where.leads:
            return None
        from safetensors.torch import load_file

        kept = {"model": load_file(partial / "best.safetensors"), "last": end["model"]}
        if end["ema"] is not None:
            kept["ema"] = averaged_weights(end["ema"])
        (partial / "best.safetensors").unlink()  # it is `model` here
        summary = {
            "parameters": shape.parameter_count(),
            "images": len(images),
            "steps": end["step"],
            "stopped_early": end["stopped_early"],
            "training_seconds": round(end["seconds"], 1),
            "best": end["best"],
            "device": str(where.device),
            "precision": where.precision,
        }
        effective = {**as_dict(config), "val_fraction": val_fraction, "weights": weights}
        record = finish_checkpoint(
            partial, kept, dataclasses.asdict(shape), codec(store), "finetune", effective, inputs, summary
        )
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
        clf, gen = class_nats(output.class_logits, labels), generative_nats(output.logits, x, masked)
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
        masks = random_mask(*held.tokens.shape, generator(seed, VALIDATION_MASK_STREAM))
    totals = torch.zeros(2, dtype=torch.float64, device=where.device)
    share, losses = where.share(len(held)), joint_loss(gen_weight)
    for start in range(share.start, share.stop, batch):
        part = slice(start, min(start + batch, share.stop))
        x = torch.from_numpy(held.tokens[part].astype(np.int64)).to(where.device)
        y = torch.from_numpy(held.labels[part].astype(np.int64)).to(where.device)
        m = None if masks is None else masks[part].to(where.device)
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
