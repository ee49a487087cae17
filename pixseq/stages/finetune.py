"""finetune: a checkpoint and labelled tokens in, a classifier out (§2.3, §3.4)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pixseq import progress
from pixseq.artifacts.arrays import Store
from pixseq.artifacts.checkpoint import best_weights, finish_checkpoint, load_state, open_checkpoint, read_weights
from pixseq.artifacts.manifest import Manifest, reference
from pixseq.config import FinetuneConfig, FinetuneFile, as_dict
from pixseq.engine.opening import held_out, load_weights, read_images, some_of, use_attention
from pixseq.engine.training import (
    Counts,
    Images,
    Limits,
    Losses,
    averaged_weights,
    checkpointed,
    micro_batch_images,
    recipe_of,
    run_summary,
    train,
)
from pixseq.engine.validation import validation_sums
from pixseq.errors import PixseqError, UsageError
from pixseq.models.family import Model, Shape, build, shape_from
from pixseq.models.lora import PLACES, add_low_rank, low_rank_count, merged, targets_of, trainable_share
from pixseq.models.objectives import class_nats
from pixseq.models.output import Output
from pixseq.numerics.probes import elected
from pixseq.numerics.schedule import warmup_steps
from pixseq.runtime import Machine, generator, machine, placed
from pixseq.streams import Stream

MOST_CLASSES = 100_000  # more are not labels of classes


def run(
    model: str | Path,
    tokens: str | Path,
    out: str | Path,
    config: FinetuneFile,
    val: str | Path | None = None,
    val_fraction: float | None = None,
    weights: str = "model",
    attention: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    limits: Limits | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Manifest | None:
    """Train on L_clf + gen_weight * L_gen, stop early on validation accuracy, keep the best weights or a refit.

    A model that cannot predict, for lack of a head or with an attention that sees everything, has no L_gen. Raises what
    pretrain raises, and PixseqError for images without labels.
    """
    limits, recipe = limits or Limits(), config.finetune
    targets = _targets(recipe)
    if val is None and val_fraction is None:
        val_fraction = 0.1  # the paper's split; early stopping needs one
    with machine(device, precision, ranks=True) as where:
        parent = open_checkpoint(model)
        before = shape_from(parent.shape)
        side = parent.codec.side
        scratch = Path(out).absolute().parent
        store, images, held, inputs = read_images(
            tokens, before.reads, val, val_fraction, recipe.seed, classes=True, side=side, scratch=scratch
        )
        parent.codec.must_pair(parent.path, store.codec, store.path)
        n_classes = count_classes(store, images, held, tokens if val is None else val)
        inputs["model"] = reference(model, parent.manifest)
        shape = replace(before.adapted_to(before.uses[0]), n_classes=n_classes)
        everything = _everything(images, held, tokens, val) if recipe.refit else None
        codec = replace(parent.codec, class_names=store.codec.class_names)
        flags = {"val_fraction": val_fraction, "weights": weights, "precision": where.precision, "attention": attention}
        flags |= held_out(images, held, val_fraction)

        def pretrained() -> Model:
            """The model as training begins."""
            net = with_new_head(load_weights(before, parent, weights), shape, recipe.seed)
            use_attention(net, parent.path, attention)
            if recipe.lora_rank:
                rng = generator(recipe.seed, Stream.LOW_RANK)
                add_low_rank(net, targets, recipe.lora_rank, recipe.lora_alpha, rng)
            return placed(net, where)

        def work(partial: Path, state: dict[str, Any] | None) -> Manifest | None:
            net, began = pretrained(), time.monotonic()
            about = said_of(net, shape, recipe)
            losses = joint_loss(recipe.gen_weight if shape.predicts(net.attention) else 0.0)
            end = choose(where, net, recipe, images, held, losses, partial, state, limits)
            used = asdict(shape.adapted_to(net.attention))
            again = None
            if everything is not None:
                net, left = pretrained(), limits.after(time.monotonic() - began)
                again = refit(where, net, recipe, images, everything, losses, partial, end, left)
                about |= said_of_refit(everything, end, again)
            if not where.leads:
                return None
            kept = weights_of(partial, end, again, recipe.lora_alpha)
            summary = {**run_summary(where, shape, images, end), **about}
            return finish_checkpoint(partial, kept, used, codec, "finetune", as_dict(config), flags, inputs, summary)

        same = recipe_of(as_dict(config), inputs, flags)
        return checkpointed(where, out, "finetune", same, resume, overwrite, work)


def _targets(recipe: FinetuneConfig) -> list[str]:
    try:
        return targets_of(recipe.lora_targets)
    except ValueError as error:
        raise UsageError(f"finetune.lora_targets: {error}", f"some of {', '.join(PLACES)}, as q,k,v,o") from None


def _everything(images: Images, held: Images, tokens: str | Path, val: str | Path | None) -> Images:
    """What a refit trains on."""
    try:
        return images.joined(held)
    except ValueError:
        raise PixseqError(
            f"{val} does not store its pictures as {tokens} does, and a refit trains on both",
            "encode both at one stored size, or leave out --refit",
        ) from None


def said_of(net: Model, shape: Shape, recipe: FinetuneConfig) -> dict[str, Any]:
    """What the summary says of the weights that are trained; that and what is left out is told on stderr, too."""
    if recipe.gen_weight and not shape.predicts(net.attention):
        why = f"with {net.attention} attention" if shape.head else "without a prediction head"
        progress.note(f"there is nothing to predict {why}: the class loss alone is trained on")
    about: dict[str, Any] = {"trained_share": round(trainable_share(net), 6)}
    if recipe.lora_rank:
        updates, trunk = low_rank_count(net), shape.trunk_count()
        about |= {"low_rank_parameters": updates, "low_rank_share_of_trunk": round(updates / trunk, 6)}
        progress.say(
            f"low-rank updates of {recipe.lora_targets} have {updates:,} weights, "
            f"{updates / trunk:.2%} of the trunk's {trunk:,}; they and the class head are trained"
        )
    return about


def said_of_refit(everything: Images, end: Mapping[str, Any], again: Mapping[str, Any]) -> dict[str, Any]:
    """What the summary says of the refit; `training_seconds` are of both runs, those of `refit` its own."""
    own = {**everything.count(), "steps": again["step"], "training_seconds": round(again["seconds"], 1)}
    return {"refit": own, "training_seconds": round(end["seconds"] + again["seconds"], 1)}


def choose(
    where: Machine,
    net: Model,
    recipe: FinetuneConfig,
    images: Images,
    held: Images,
    losses: Losses,
    partial: Path,
    state: dict[str, Any] | None,
    limits: Limits,
) -> dict[str, Any]:
    """Train on `images` until validation on `held` no longer gains; returns the state at the end, see `train`."""
    some = some_of(held, recipe.val_images)
    micro = 2 * (limits.micro_batch or micro_batch_images(net, where))
    return train(
        where,
        net,
        recipe,
        images,
        losses,
        lambda m: accuracy_and_loss(where, m, some, micro, losses, recipe.seed),
        partial,
        state,
        limits,
        score=lambda row: row["val_accuracy"],
        patience=recipe.patience,
        name="finetune",
    )


def refit(
    where: Machine,
    net: Model,
    recipe: FinetuneConfig,
    images: Images,
    everything: Images,
    losses: Losses,
    partial: Path,
    end: Mapping[str, Any],
    limits: Limits,
) -> dict[str, Any]:
    """Train the fresh `net` on `everything` for the steps that the run on `images`, at its `end`, found best (§3.1).

    Warm-up takes as many steps as it took there. Its log is refit.jsonl; what it resumes from stands within that of the
    run before, which is at its end by then.
    """
    steps = end["best"]["step"]
    epoch = len(images) / recipe.batch_size
    warmup = warmup_steps(recipe.steps, epoch, recipe.warmup_epochs, recipe.warmup_fraction)
    again = replace(recipe, steps=steps, warmup_epochs=None, warmup_fraction=(warmup + 0.5) / steps)
    folder = partial / "resume" / "refit"
    if where.leads:
        folder.mkdir(parents=True, exist_ok=True)
    where.wait()
    progress.say(f"refit: {steps} steps on all {len(everything)} rows, those of validation too")
    done = train(
        where,
        net,
        again,
        everything,
        losses,
        None,
        folder,
        load_state(folder),
        limits,
        score=lambda row: 0.0,  # nothing validates it
        name="refit",
    )
    if where.leads:
        shutil.copyfile(folder / "log.jsonl", partial / "refit.jsonl")
    return done


def weights_of(
    partial: Path, end: Mapping[str, Any], again: Mapping[str, Any] | None, alpha: float
) -> dict[str, dict[str, Tensor]]:
    """The sets of weights to keep, updates merged. `model`: those that validation chose, or of the refit.

    A refit leaves those that validation chose as `best`.
    """
    best = merged(read_weights(best_weights(partial, end["best"])), alpha)
    kept = {"model": best, "last": merged(end["model"], alpha)}
    if again is not None:
        kept |= {"model": merged(again["model"], alpha), "best": best}
    last = again or end
    if last["ema"] is not None:
        kept["ema"] = merged(averaged_weights(last["ema"]), alpha)
    return kept


def count_classes(store: Store, images: Images, held: Images, val: str | Path) -> int:
    """The number of classes of the labels. Raises PixseqError where there are no labels or only one class.

    `val` is where the images `held` are from.
    """
    for path, labels in ((store.path, images.labels), (val, held.labels)):
        if labels is None:
            raise PixseqError(f"{path} has no labels", "fine-tuning needs a source with labels, such as class folders")
        if labels.min() < 0:
            raise PixseqError(
                f"{path}: {(labels < 0).sum()} images to fine-tune or validate on have no label",
                "encode labelled images only",
            )
        if labels.max() >= MOST_CLASSES:
            raise PixseqError(f"{path} holds the label {labels.max()}", f"labels count classes, up to {MOST_CLASSES}")
    names = store.codec.class_names
    n_classes = max(len(names) if names else 0, int(max(images.labels.max(), held.labels.max())) + 1)
    if n_classes < 2:
        raise PixseqError(f"{store.path} holds labels of {n_classes} class", "fine-tuning needs two classes or more")
    return n_classes


def with_new_head(net: Model, shape: Shape, seed: int) -> Model:
    """The same weights with a class head as its family begins one.

    What an attentive head normalises by is of the layers it reads, not of the classes it told apart: that stays.
    """
    new = build(shape).init_weights(generator(seed, Stream.CLASS_HEAD))
    old = {name for name, _ in net.named_parameters() if name.startswith("classifier.")}
    new.load_state_dict({name: x for name, x in net.state_dict().items() if name not in old}, strict=False)
    return new


def joint_loss(gen_weight: float) -> Losses:
    """Losses of §2.3: the joint loss, and its two parts for the log."""

    def losses(
        model: Model, output: Output, x: Tensor, labels: Tensor, masked: Tensor | None, counts: Counts
    ) -> dict[str, Tensor]:
        clf = class_nats(output.class_logits, labels) / counts.images
        if not gen_weight:
            return {"loss": clf, "clf_loss": clf}
        gen = model.losses(output, x, masked) / counts.scored
        return {"loss": clf + gen_weight * gen, "clf_loss": clf, "gen_loss": gen}

    return losses


def accuracy_and_loss(
    where: Machine, net: Model, held: Images, batch: int, losses: Losses, seed: int
) -> dict[str, Any]:
    """val_accuracy and the joint val_loss over the held-out images, of as many masks an image as `evaluate` has.

    The loss is a mean over masks, the accuracy that of their vote.
    """
    masks, first = net.shape.masks, where.share(len(held)).start

    def measure(net: Model, output: Output, x: Tensor, labels: Tensor, masked: Tensor | None, counts: Counts) -> list:
        nonlocal first
        loss = losses(net, output, x, labels, masked, counts)["loss"]
        voted = elected(output.class_logits.argmax(1).cpu().numpy(), masks, seed, first)
        first += len(voted)
        return [loss.double().sum(), float((voted == labels[::masks].cpu().numpy()).sum())]

    (loss, hits), _ = validation_sums(where, net, held, batch, seed, measure, masks)
    return {"val_loss": loss, "val_accuracy": hits / len(held)}
