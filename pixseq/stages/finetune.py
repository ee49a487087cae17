"""finetune: a checkpoint and labelled tokens in, a classifier out (§2.3, §3.4)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixseq import progress
from pixseq.artifacts.arrays import Store
from pixseq.artifacts.checkpoint import (
    Checkpoint,
    best_weights,
    finish_checkpoint,
    load_state,
    open_checkpoint,
    read_weights,
)
from pixseq.artifacts.codec import Codec
from pixseq.artifacts.manifest import Manifest, reference
from pixseq.artifacts.targets import check_apart
from pixseq.choices import Attention, Precision, Weights
from pixseq.config import FinetuneConfig, FinetuneFile, as_dict
from pixseq.engine.cost import WITHOUT_GRADIENTS, micro_batch_images
from pixseq.engine.images import Images
from pixseq.engine.opening import held_out, load_weights, read_images, some_of, use_attention, with_new_head
from pixseq.engine.run_folder import RunFolder, recipe_of, run_folder, run_summary
from pixseq.engine.state import TrainState, averaged_weights
from pixseq.engine.step import Batch, Score
from pixseq.engine.training import Limits, Training, train
from pixseq.engine.validation import score_sums
from pixseq.errors import PixseqError, UsageError
from pixseq.models.family import Model, Shape, shape_from
from pixseq.models.lora import PLACES, add_low_rank, low_rank_count, merged, targets_of, trainable_share
from pixseq.models.objectives import class_nats
from pixseq.models.output import Output
from pixseq.numerics.schedule import warmup_steps
from pixseq.numerics.voting import elected
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
    weights: Weights = "model",
    attention: Attention | None = None,
    device: str = "auto",
    precision: Precision = "auto",
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
    check_apart([out], [model, tokens, val])
    if val is None and val_fraction is None:
        val_fraction = 0.1  # the paper's split; early stopping needs one
    with machine(device, precision, ranks=True) as where:
        pretrained = open_checkpoint(model)
        data = read_data(pretrained, tokens, val, val_fraction, recipe, scratch=Path(out).absolute().parent)
        initial = InitialClassifier(where, pretrained, data.shape, weights, attention, recipe, targets)
        flags = {"val_fraction": val_fraction, "weights": weights, "precision": where.precision, "attention": attention}
        flags |= held_out(data.images, data.held, val_fraction)
        same = recipe_of(as_dict(config), data.inputs, flags)
        with run_folder(where, out, "finetune", same, resume, overwrite) as folder:
            if folder.made is None:
                net, began = initial.model(), time.monotonic()
                about = said_of(net, data.shape, recipe)
                score = joint_loss(net, recipe)
                end, again = choose(where, net, recipe, data, score, folder, limits), None
                if recipe.refit:
                    net, left = initial.model(), limits.after(time.monotonic() - began)
                    again = refit(where, net, recipe, data, score, folder.path, end, left)
                    about |= said_of_refit(data.whole(), end, again)
                if where.leads:
                    sets = weights_of(folder.path, end, again, recipe.lora_alpha)
                    summary = {**run_summary(where, data.shape, data.images, end), **about}
                    used = asdict(data.shape.adapted_to(net.attention))
                    folder.made = finish_checkpoint(
                        folder.path, sets, used, data.codec, "finetune", as_dict(config), flags, data.inputs, summary
                    )
        return folder.made if where.leads else None


@dataclass(frozen=True)
class Data:
    """Labelled images to train on and to validate on (`held`), for a classifier of `shape` and `codec`.

    `everything` is both, for a refit; None where there is none.
    """

    images: Images
    held: Images
    everything: Images | None
    shape: Shape
    codec: Codec
    inputs: dict[str, Any]

    def whole(self) -> Images:
        """`everything`, where there is a refit."""
        assert self.everything is not None
        return self.everything


def read_data(
    pretrained: Checkpoint,
    tokens: str | Path,
    val: str | Path | None,
    val_fraction: float | None,
    recipe: FinetuneConfig,
    scratch: Path,
) -> Data:
    """`scratch`: a folder for what is too large for memory. Raises PixseqError where labels or sizes do not suit."""
    before, side = shape_from(pretrained.shape), pretrained.codec.side
    store, images, held, inputs = read_images(
        tokens, before.reads, val, val_fraction, recipe.seed, classes=True, side=side, scratch=scratch
    )
    assert held is not None  # stopping early takes some: val, or a fraction
    pretrained.codec.must_pair(pretrained.path, store.codec, store.path)
    n_classes = count_classes(store, images, held, tokens if val is None else val)
    inputs["model"] = reference(pretrained.path, pretrained.manifest)
    everything = _everything(images, held, tokens, val) if recipe.refit else None
    codec = replace(pretrained.codec, class_names=store.codec.class_names)
    shape = replace(before.adapted_to(before.attention_patterns[0]), n_classes=n_classes)
    return Data(images, held, everything, shape, codec, inputs)


@dataclass(frozen=True)
class InitialClassifier:
    """What training begins with, and a refit again: the weights of `pretrained` with a class head as `shape` has it."""

    where: Machine
    pretrained: Checkpoint
    shape: Shape
    weights: str
    attention: str | None
    recipe: FinetuneConfig
    targets: list[str]

    def model(self) -> Model:
        recipe = self.recipe
        net = load_weights(shape_from(self.pretrained.shape), self.pretrained, self.weights)
        net = with_new_head(net, self.shape, generator(recipe.seed, Stream.CLASS_HEAD))
        use_attention(net, self.pretrained.path, self.attention)
        if recipe.lora_rank:
            rng = generator(recipe.seed, Stream.LOW_RANK)
            add_low_rank(net, self.targets, recipe.lora_rank, recipe.lora_alpha, rng)
        return placed(net, self.where)


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
    data: Data,
    score: Score,
    folder: RunFolder,
    limits: Limits,
) -> dict[str, Any]:
    """Train until validation no longer gains; returns the state at the end, see `train`."""
    micro = limits.micro_batch or micro_batch_images(net, where)
    held = HeldOut(where, some_of(data.held, recipe.val_images), WITHOUT_GRADIENTS * micro, score, recipe.seed)
    return train(
        Training(
            where,
            TrainState(net, recipe, folder.state),
            data.images,
            score,
            folder.path,
            limits,
            validation=held,
            patience=recipe.patience,
            name="finetune",
        )
    )


def refit(
    where: Machine,
    net: Model,
    recipe: FinetuneConfig,
    data: Data,
    score: Score,
    partial: Path,
    end: Mapping[str, Any],
    limits: Limits,
) -> dict[str, Any]:
    """Train the fresh `net` on everything for the steps that the run before, at its `end`, found best (§3.1).

    Warm-up takes as many steps as it took there. Its log is refit.jsonl; what it resumes from stands within that of the
    run before, which is at its end by then.
    """
    steps = end["best"]["step"]
    epoch = len(data.images) / recipe.batch_size
    warmup = warmup_steps(recipe.steps, epoch, recipe.warmup_epochs, recipe.warmup_fraction)
    again = replace(recipe, steps=steps, warmup_epochs=None, warmup_fraction=(warmup + 0.5) / steps)
    folder = partial / "resume" / "refit"
    if where.leads:
        folder.mkdir(parents=True, exist_ok=True)
    where.wait()
    progress.say(f"refit: {steps} steps on all {len(data.whole())} rows, those of validation too")
    run = TrainState(net, again, load_state(folder))
    done = train(Training(where, run, data.whole(), score, folder, limits, name="refit"))
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
    most = -1
    for path, labels in ((store.path, images.labels), (val, held.labels)):
        if labels is None:
            raise PixseqError(f"{path} has no labels", "fine-tuning needs a source with labels, such as class folders")
        if labels.min() < 0:
            raise PixseqError(
                f"{path}: {(labels < 0).sum()} images to fine-tune or validate on have no label",
                "encode labelled images only",
            )
        most = max(most, int(labels.max()))
        if labels.max() >= MOST_CLASSES:
            raise PixseqError(f"{path} holds the label {labels.max()}", f"labels count classes, up to {MOST_CLASSES}")
    names = store.codec.class_names
    n_classes = max(len(names) if names else 0, most + 1)
    if n_classes < 2:
        raise PixseqError(f"{store.path} holds labels of {n_classes} class", "fine-tuning needs two classes or more")
    return n_classes


@dataclass(frozen=True)
class JointLoss:
    """The score of §2.3: the joint loss, and its two parts for the log."""

    gen_weight: float

    def __call__(self, model: Model, output: Output, batch: Batch) -> dict[str, Tensor]:
        assert output.class_logits is not None and batch.labels is not None
        clf = class_nats(output.class_logits, batch.labels) / batch.counts.images
        if not self.gen_weight:
            return {"loss": clf, "clf_loss": clf}
        gen = model.losses(output, batch.images, batch.masked) / batch.counts.scored
        return {"loss": clf + self.gen_weight * gen, "clf_loss": clf, "gen_loss": gen}


def joint_loss(net: Model, recipe: FinetuneConfig) -> JointLoss:
    """Without a generative part where the model has nothing to predict."""
    return JointLoss(recipe.gen_weight if net.shape.predicts(net.attention) else 0.0)


@dataclass(frozen=True)
class LossAndHits:
    """The score of validation: the joint loss of each mask, and whether the vote of an image's masks is right."""

    loss: Score
    masks: int
    seed: int

    def __call__(self, model: Model, output: Output, batch: Batch) -> dict[str, Tensor]:
        assert output.class_logits is not None and batch.labels is not None
        predicted = output.class_logits.argmax(1).cpu().numpy()
        voted = elected(predicted, self.masks, self.seed, batch.first)
        hits = torch.from_numpy(voted == batch.labels[:: self.masks].cpu().numpy())
        return {"loss": self.loss(model, output, batch)["loss"], "hits": hits}


def accuracy_and_loss(where: Machine, net: Model, held: Images, batch: int, loss: Score, seed: int) -> dict[str, float]:
    """val_accuracy and the joint val_loss over the held-out images, of as many masks an image as `evaluate` has.

    The loss is a mean over masks, the accuracy that of their vote.
    """
    score, names = LossAndHits(loss, net.shape.masks, seed), ("loss", "hits")
    (mean, hits), _ = score_sums(where, net, held, batch, seed, score, names, net.shape.masks)
    return {"val_loss": mean, "val_accuracy": hits / len(held)}


@dataclass(frozen=True)
class HeldOut:
    """Validation by the accuracy on `images`, `batch` at once."""

    where: Machine
    images: Images
    batch: int
    loss: Score
    seed: int

    def measure(self, model: Model) -> dict[str, float]:
        return accuracy_and_loss(self.where, model, self.images, self.batch, self.loss, self.seed)

    def quality(self, row: dict[str, float]) -> float:
        return row["val_accuracy"]
