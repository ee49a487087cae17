"""The checkpoint that pretraining starts from: its shape and order are kept, its weights are trained on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pixseq.artifacts.arrays import Store
from pixseq.artifacts.checkpoint import Checkpoint, open_checkpoint
from pixseq.artifacts.codec import Codec
from pixseq.artifacts.manifest import reference
from pixseq.config import PretrainFile, as_dict, read_preset, read_yaml
from pixseq.engine.opening import load_weights, with_new_head
from pixseq.errors import UsageError
from pixseq.models.family import Model, Shape, shape_from
from pixseq.runtime import generator
from pixseq.streams import Stream

KEPT = "what training starts from keeps its shape and order: leave out what says otherwise"


@dataclass(frozen=True)
class InitialCheckpoint:
    """`shape` is what is trained: that of the checkpoint, with a prediction head and without a class head."""

    checkpoint: Checkpoint
    before: Shape
    shape: Shape

    @classmethod
    def open(cls, path: str | Path) -> InitialCheckpoint:
        """Raises PixseqError where `path` is no checkpoint, UsageError where it cannot be pretrained."""
        checkpoint = open_checkpoint(path)
        before = shape_from(checkpoint.shape)
        try:
            return cls(checkpoint, before, before.for_pretraining())
        except UsageError as error:
            raise UsageError(f"--from {path}: {error.message}", error.hint) from None

    @property
    def codec(self) -> Codec:
        return self.checkpoint.codec

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def reference(self) -> dict[str, str]:
        return reference(self.path, self.checkpoint.manifest)

    @cached_property
    def order(self) -> str:
        """A name, or the file that it was read from, where that is known."""
        sequence = self.checkpoint.manifest["config"].get("sequence")
        named = sequence.get("order") if isinstance(sequence, dict) else None
        return named if self.shape.order == "file" and isinstance(named, str) else self.shape.order

    def config(self) -> dict[str, Any]:
        """The sections of a configuration that say its shape and order."""
        model = {"family": self.shape.family, **self.shape.config()}
        made_with = self.checkpoint.manifest["config"].get("model")
        if isinstance(made_with, dict) and made_with.get("image_size") == self.codec.side is not None:
            model["image_size"] = self.codec.side
        return {"model": model, "sequence": {"order": self.order}}

    def check_family(self, preset: str | None, file: str | Path | None, sets: Iterable[str]) -> None:
        """Raises UsageError for a preset, a file or a --set of another family, whose keys would not be known."""
        named = {} if preset is None else {f"--preset {preset}": read_preset(preset)}
        named |= {} if file is None else {f"--config {file}": read_yaml(file)}
        given = [text.partition("=") for text in sets]
        named |= {
            f"--set {key}={family}": {"model": {"family": family.strip()}}
            for key, _, family in given
            if key.strip() == "model.family"
        }
        for what, values in named.items():
            model, ours = values.get("model"), self.shape.family
            theirs = model.get("family", "igpt") if isinstance(model, dict) else ours
            if theirs != ours:
                raise UsageError(f"model.family of {what} is {theirs}, {self.path} is of {ours}", KEPT)

    def check(self, config: PretrainFile) -> None:
        """Raises UsageError where a configuration is not of its shape and order."""
        ours, theirs = self.config(), {"family": config.model.family, **as_dict(config.model)}
        ours["model"].setdefault("image_size", self.codec.side)
        for key, value in theirs.items():
            wanted = ours["model"].get(key, value)
            if value != wanted and not (key == "image_size" and value is None):
                raise UsageError(f"model.{key} is {value}, {self.path} has {wanted}", KEPT)
        order = config.sequence.order
        if order != self.order and self.shape.order != "file":
            raise UsageError(f"sequence.order is {order}, {self.path} has {self.order}", KEPT)

    def check_order(self, order: np.ndarray, name: str) -> None:
        """Raises UsageError where an order, int [T], that was read from a file is not its own."""
        if not np.array_equal(self.checkpoint.weights()["order"].numpy(), order):
            raise UsageError(f"sequence.order {name} is another permutation than that of {self.path}", KEPT)

    def paired(self, store: Store) -> Codec:
        """Its codec, with the classes of the store. Raises PixseqError where the store does not pair with it."""
        self.codec.must_pair(self.path, store.codec, store.path)
        return replace(self.codec, class_names=store.codec.class_names)

    def remarks(self) -> list[str]:
        """What of it is not trained on, and what is new."""
        said = []
        if self.before.n_classes:
            said.append(f"the class head of {self.path} is left out: pretraining has none")
        if not self.before.head:
            said.append(f"{self.path} has no prediction head: a new one is trained")
        return said

    def model(self, seed: int) -> Model:
        """Its weights as training begins."""
        net = load_weights(self.before, self.checkpoint)
        net = with_new_head(net, self.shape, generator(seed, Stream.MODEL_INIT))
        net.attention = self.shape.pretraining_attention
        return net
