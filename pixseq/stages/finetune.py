"""finetune: a checkpoint and labelled tokens in, a classifier out (§2.3, §3.4)."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pixseq import progress
from pixseq.artifacts.arrays import Store
from pixseq.artifacts.checkpoint import best_weights, finish_checkpoint, open_checkpoint, read_weights
from pixseq.artifacts.manifest import Manifest, reference
from pixseq.config import FinetuneFile, as_dict
from pixseq.errors import PixseqError
from pixseq.models.family import Model, Shape, build, shape_from
from pixseq.models.lora import add_low_rank, merged, trainable_share
from pixseq.models.objectives import class_nats
from pixseq.models.output import Output
from pixseq.numerics.probes import elected
from pixseq.runtime import Machine, generator, machine
from pixseq.stages.opening import check_pairing, load_weights, read_images, side_of, some_of, use_attention
from pixseq.stages.training import (
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
from pixseq.stages.validation import validation_sums
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
    """Train on L_clf + gen_weight * L_gen, stop early on validation accuracy, keep the best weights.

    A model that cannot predict, for lack of a head or with an attention that sees everything, has no L_gen. Raises what
    pretrain raises, and PixseqError for images without labels.
    """
    limits, train_config = limits or Limits(), config.finetune
    if val is None and val_fraction is None:
        val_fraction = 0.1  # the paper's split; early stopping needs one
    with machine(device, precision, ranks=True) as where:
        parent = open_checkpoint(model)
        before = shape_from(parent.shape)
        side = side_of(parent.codec)
        store, images, held, inputs = read_images(
            tokens, before.reads, val, val_fraction, train_config.seed, classes=True, side=side
        )
        check_pairing(parent.path, parent.codec, store)
        inputs["model"] = reference(model, parent.manifest)
        shape = replace(before.adapted_to(before.uses[0]), n_classes=count_classes(store, images, held))
        codec = {**parent.codec, "class_names": store.meta["class_names"]}
        flags = {"val_fraction": val_fraction, "weights": weights, "precision": where.precision, "attention": attention}
        recipe = recipe_of(as_dict(config), inputs, flags)

        def work(partial: Path, state: dict[str, Any] | None) -> Manifest | None:
            net = with_new_head(load_weights(before, parent, weights), shape, train_config.seed)
            use_attention(net, parent.path, attention)
            gen_weight = train_config.gen_weight
            if gen_weight and not shape.predicts(net.attention):
                why = f"with {net.attention} attention" if shape.head else "without a prediction head"
                progress.say(f"note: there is nothing to predict {why}: the class loss alone is trained on")
                gen_weight = 0.0
            if train_config.lora_rank:
                add_low_rank(net, train_config.lora_rank, generator(train_config.seed, Stream.LOW_RANK))
                progress.say(f"{trainable_share(net):.2%} of the weights are trained")
            net = net.to(where.device)
            some = some_of(held, train_config.val_images)
            micro = 2 * (limits.micro_batch or micro_batch_images(net, where))
            losses = joint_loss(gen_weight)
            end = train(
                where,
                net,
                train_config,
                images,
                losses,
                lambda m: accuracy_and_loss(where, m, some, micro, losses, train_config.seed),
                partial,
                state,
                limits,
                score=lambda row: row["val_accuracy"],
                patience=train_config.patience,
                name="finetune",
            )
            if not where.leads:
                return None
            best = read_weights(best_weights(partial, end["best"]))
            kept = {"model": merged(best), "last": merged(end["model"])}
            if end["ema"] is not None:
                kept["ema"] = merged(averaged_weights(end["ema"]))
            summary = run_summary(where, shape, images, end)
            summary["trained_share"] = round(trainable_share(net), 6)
            used = asdict(shape.adapted_to(net.attention))
            return finish_checkpoint(partial, kept, used, codec, "finetune", as_dict(config), flags, inputs, summary)

        return checkpointed(where, out, "finetune", recipe, resume, overwrite, work)


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
    unknown = int((images.labels < 0).sum() + (held.labels < 0).sum())
    if unknown:
        raise PixseqError(f"{unknown} images to fine-tune or validate on have no label", "encode labelled images only")
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
