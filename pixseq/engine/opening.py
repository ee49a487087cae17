"""Opening what the model stages read: a model, the images to train and validate on, and the check that they pair.

What a store of images holds is read by image_store.py, which knows nothing of models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.filesize import decimal

from pixseq import progress
from pixseq.artifacts.arrays import Store
from pixseq.artifacts.checkpoint import Checkpoint, open_checkpoint
from pixseq.artifacts.manifest import reference
from pixseq.engine.image_store import open_images, read_all, seen_codec
from pixseq.engine.images import Images
from pixseq.engine.parts import check_disjoint
from pixseq.errors import PixseqError, UsageError
from pixseq.models.family import Model, Shape, build, shape_from
from pixseq.numerics.parts import choose_rows, split_validation
from pixseq.runtime import Machine, placed

MOST_BESIDE = 1 << 20  # weights that a shape may count and a file not hold


def open_model(
    path: str | Path, machine: Machine, weights: str = "model", attention: str | None = None
) -> tuple[Model, Checkpoint]:
    """The model in evaluation mode on the machine's device, with its usual attention or that asked for."""
    checkpoint = open_checkpoint(path)
    model = placed(load_weights(shape_from(checkpoint.shape), checkpoint, weights), machine).eval()
    use_attention(model, checkpoint.path, attention)
    return model, checkpoint


def check_finite(model: Model, path: str | Path) -> None:
    """Raises PixseqError for weights from which nothing can be computed."""
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise PixseqError(f"{path} holds weights that are not finite", "it diverged or is damaged: train it again")


def check_memory(shape: Shape, machine: Machine, each: int) -> None:
    """Raises UsageError where a model's weights, at `each` bytes, are more than the machine's device can hold."""
    count, have = shape.parameter_count(), machine.memory_bytes()
    if count * each > have:
        raise UsageError(
            f"a model of {count:,} parameters takes {decimal(count * each)}, and {machine.device} has "
            f"{decimal(have)} for it",
            "choose a smaller one: model.n_layer, model.d_model and, of AIM, model.head_width",
        )


def use_attention(model: Model, path: Path, attention: str | None) -> None:
    """Set the pattern in use; None leaves the model's usual one. Raises UsageError for one it cannot have."""
    if attention is None:
        return
    if attention not in model.shape.attention_patterns:
        raise UsageError(
            f"--attention is {attention!r}, and {path} can be used with {', '.join(model.shape.attention_patterns)}",
            "leave it out for the model's usual attention",
        )
    model.attention = attention


def load_weights(shape: Shape, checkpoint: Checkpoint, weights: str = "model") -> Model:
    """A model of `shape` filled from the checkpoint. Raises PixseqError if the tensors are not those of its shape."""
    promised, held = shape.parameter_count(), checkpoint.count(weights)
    if held and promised > 2 * held + MOST_BESIDE:  # before it is laid out
        raise PixseqError(
            f"{checkpoint.path}: its shape promises {promised:,} weights, its {weights}.safetensors holds {held:,}",
            "the checkpoint is damaged: copy it again",
        )
    with torch.device("meta"):
        model = build(shape)
    tensors = checkpoint.weights(weights)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        odd = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))[0]
        raise PixseqError(
            f"{checkpoint.path}: tensor {odd} is {found.get(odd, 'missing')}, expected {wanted.get(odd, 'none')}",
            "the checkpoint is damaged: copy it again",
        )
    model.load_state_dict(tensors, assign=True)
    return model


def with_new_head(net: Model, shape: Shape, generator: torch.Generator) -> Model:
    """The same weights in a model of `shape`, with a class head, where it has one, as its family begins one.

    What an attentive head normalises by is of the layers it reads, not of the classes it told apart: that stays.
    """
    new = build(shape).init_weights(generator)
    old = {name for name, _ in net.named_parameters() if name.startswith("classifier.")}
    new.load_state_dict({name: x for name, x in net.state_dict().items() if name not in old}, strict=False)
    return new


def read_images(
    tokens: str | Path,
    kind: str,
    val: str | Path | None,
    val_fraction: float | None,
    seed: int,
    classes: bool = False,
    side: int | None = None,
    scratch: Path | None = None,
) -> tuple[Store, Images, Images | None, dict[str, Any]]:
    """The store of that kind, its training images, the validation images (or None) and the parents' references.

    `side` is that of the model's pictures, see seen_codec; `scratch` is for read_all. Raises UsageError for a
    val_fraction that is no fraction, PixseqError if val does not pair with tokens.
    """
    check_fraction(val, val_fraction)
    store = open_images(tokens, kind)
    codec = seen_codec(store, side)
    inputs = {"tokens": reference(tokens, store.manifest)}
    other = None
    if val is not None:
        other = open_images(val, kind)
        codec.must_pair(store.path, other.codec, other.path, classes)
        check_disjoint(store, other, "what validates must not be trained on")
        if other.images() is not None:
            progress.warn(f"{val} holds several random crops an image; validation usually takes one centre crop")
        inputs["val"] = reference(val, other.manifest)
    split = None if val_fraction is None else split_rows(store, val_fraction, seed)
    images = Images(read_all(store, scratch), store.labels(), codec.grid, shows=store.images())
    if other is not None:
        held = Images(read_all(other, scratch), other.labels(), images.grid, shows=other.images())
        return store, images, held, inputs
    if split is None:
        return store, images, None, inputs
    train_rows, val_rows = split
    return store, images.subset(train_rows), images.subset(val_rows), inputs


def split_rows(store: Store, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and to validate on: the views of one image lie on one side, and every class has its share.

    Raises PixseqError for one image.
    """
    try:
        return split_validation(len(store), val_fraction, seed, store.images(), store.labels())
    except ValueError:
        raise PixseqError(
            f"{store.path} holds one image: no part can be held out", "encode more, or give --val"
        ) from None


def held_out(images: Images, held: Images | None, val_fraction: float | None) -> dict[str, Any]:
    """What a recipe says of the split that `read_images` made: how it was, where labels took part in it."""
    if val_fraction is None or images.labels is None:
        return {}
    assert held is not None
    taken = held.count()["images"]
    return {"held_out": {"of": images.count()["images"] + taken, "taken": taken, "how": "stratified"}}


def check_fraction(val: str | Path | None, val_fraction: float | None) -> None:
    if val is not None and val_fraction is not None:
        raise UsageError("--val and --val-fraction were both given", "keep one of them")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise UsageError(f"--val-fraction is {val_fraction}, it must lie between 0 and 1", "for example 0.1")


def some_of(images: Images, most: int) -> Images:
    """A part of at most `most` rows that stands for all, of every class its share."""
    if len(images) <= most:
        return images
    labels = images.labels if images.labels is None or images.chosen is None else images.labels[images.chosen]
    return images.subset(choose_rows(len(images), most, labels))
