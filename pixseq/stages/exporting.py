"""export: a checkpoint in the form that transformers opens, with a model card."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pixseq import progress
from pixseq.artifacts.checkpoint import Checkpoint, open_checkpoint
from pixseq.artifacts.metrics import read_metrics
from pixseq.artifacts.owning import owns, writing
from pixseq.bounded.files import read_bytes
from pixseq.bounded.structure import MOST_YAML
from pixseq.choices import Drop, Weights
from pixseq.engine.opening import load_weights
from pixseq.errors import PixseqError
from pixseq.interop.huggingface import write_hf
from pixseq.interop.model_card import model_card
from pixseq.models.family import Shape, shape_from


@owns("export hf", "out")
def run(
    model: str | Path,
    out: str | Path,
    weights: Weights = "model",
    drop: Drop | None = None,
    metrics: Iterable[str | Path] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `model` as an ImageGPT directory; returns what was written: {path, model_id, shape, notes}.

    `drop`: "head" or "classifier", for a model with both, which no class of transformers carries. `metrics`: numbers of
    `evaluate` on these weights, for the card. A model whose palette is not known comes without processor. Raises
    PixseqError for what the form cannot carry, naming the reason.
    """
    target = Path(out)
    checkpoint = open_checkpoint(model)
    shape = _carried(checkpoint, shape_from(checkpoint.shape), drop)
    net = load_weights(shape_from(checkpoint.shape), checkpoint, weights)
    tensors = {name: x for name, x in net.state_dict().items() if not name.startswith(f"{drop}.")}
    card = model_card(
        target.name,
        asdict(shape),
        checkpoint.codec.grid[0],
        checkpoint.codec.palette is not None,
        checkpoint.manifest,
        weights,
        shape.parameter_count(),
        read_bytes(checkpoint.path / "config.yaml", MOST_YAML).decode(errors="replace"),
        [_measured(path, checkpoint, weights) for path in metrics],
    )
    codec = checkpoint.codec
    with writing(target, overwrite, "export hf") as partial:
        write_hf(partial, tensors, asdict(shape), codec.grid[0], codec.palette, codec.class_names, card)
    notes = []
    if codec.palette is None:
        notes.append(f"{model} has no palette: the export has no image processor, and its inputs are palette ids")
    for note in notes:
        progress.note(note)
    return {"path": str(target), "model_id": checkpoint.manifest["id"], "shape": asdict(shape), "notes": notes}


def _carried(checkpoint: Checkpoint, shape: Shape, drop: str | None) -> Shape:
    """The shape of what is exported. Raises PixseqError for what transformers' ImageGPT cannot be."""
    path, scheme = checkpoint.path, checkpoint.codec.scheme
    if shape.family != "igpt":
        raise PixseqError(f"{path} is of the family {shape.family}, the form is Image GPT's", "export an Image GPT")
    if shape.order != "raster":
        raise PixseqError(
            f"{path} runs in {shape.order} order: transformers knows raster order alone",
            "train with --set sequence.order=raster to export",
        )
    if not shape.can_sample:
        raise PixseqError(
            f"{path} is a bert model: transformers' ImageGPT always masks causally and has no masked positions",
            "only autoregressive models can be exported",
        )
    if scheme != "palette":
        raise PixseqError(
            f"{path} is of {scheme} tokens: transformers' processor only knows colours of a palette",
            "train on tokens of --scheme palette to export",
        )
    if drop and not (shape.head and shape.n_classes):
        raise PixseqError(f"{path} does not have both a prediction head and a classifier", "leave --drop out")
    if shape.head and shape.n_classes and not drop:
        raise PixseqError(
            f"{path} has a prediction head and a classifier: no class of transformers carries both",
            "--drop classifier exports the generative model, --drop head the classifier",
        )
    if drop:
        return replace(shape, head=False) if drop == "head" else replace(shape, n_classes=0)
    return shape


def _measured(path: str | Path, checkpoint: Checkpoint, weights: str) -> tuple[str, dict[str, Any]]:
    """The data's name and the numbers. Raises PixseqError if they are another model's, or of other weights of it."""
    record, numbers = read_metrics(path)
    measured, ids = record["inputs"].get("model", {}).get("id"), checkpoint.manifest["summary"]["weights"]
    if measured != checkpoint.manifest["id"]:
        raise PixseqError(
            f"{path} was measured on the model {measured}, {checkpoint.path} is {checkpoint.manifest['id']}",
            "evaluate this model: pixseq evaluate MODEL TOKENS -o eval.json",
        )
    used = record["config"].get("weights", "model")
    if ids.get(used) != ids.get(weights):
        raise PixseqError(
            f"{path} was measured on the weights {used!r}, and {weights!r} are exported",
            f"evaluate these: pixseq evaluate MODEL TOKENS --weights {weights} -o eval.json",
        )
    return Path(record["inputs"].get("tokens", {}).get("path", "tokens")).name, numbers
