"""check: certificates that a checkpoint is what it says, each with its figure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixseq.artifacts.arrays import Store
from pixseq.artifacts.checkpoint import Checkpoint, weights_id
from pixseq.artifacts.codec import Codec
from pixseq.artifacts.manifest import reference
from pixseq.artifacts.metrics import write_metrics
from pixseq.artifacts.owning import owns
from pixseq.artifacts.palette import checked_colours, load_palette
from pixseq.choices import Precision, Weights
from pixseq.engine import image_store, opening
from pixseq.engine.images import as_tensor
from pixseq.engine.parts import part_of_store
from pixseq.errors import PixseqError
from pixseq.models.certificates import CLOSE, Check
from pixseq.models.family import Model, certify
from pixseq.numerics.quantize import nearest, nearest_table, to_tokens
from pixseq.runtime import generator, machine
from pixseq.streams import Stream

IMAGES = 4
FINITE = "finite weights"  # without which the other figures are of nothing


@owns("check", "out")
def run(
    model: str | Path,
    tokens: str | Path | None = None,
    out: str | Path | None = None,
    weights: Weights = "model",
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
    precision: Precision = "fp32",
) -> dict[str, Any]:
    """{"ok": whether all hold, "checks": [{name, ok, figure, about}], "precision", "device"}.

    Written as metrics too when `out` is given. Computed on some images of `tokens` or on random ones, in float32
    unless `precision` says otherwise: bf16 certifies that path, as closely as its rounding lets it.
    """
    store = None
    with machine(device, precision) as where, torch.inference_mode():
        net, checkpoint = opening.open_model(model, where, weights)
        inputs = {"model": reference(model, checkpoint.manifest)}
        checks = list(_file_checks(net, checkpoint, weights))
        if tokens is not None:
            store = image_store.open_images(tokens, net.shape.reads)
            inputs["tokens"] = reference(tokens, store.manifest)
            checks.append(_pairing(checkpoint, store))
            store = store if checks[-1].ok else None
        if all(check.ok for check in checks if check.name == FINITE):
            x = net.prepare(_images(net, store, checkpoint.codec, seed).to(where.device))
            with where.autocast():
                checks += certify(net, x, generator(seed, Stream.CHECK_PROBE), CLOSE[where.precision])
    rows = [{**asdict(check), "figure": _plain(check.figure)} for check in checks]
    numbers = {"ok": all(check.ok for check in checks), "checks": rows, **where.used()}
    if out is not None:
        write_metrics(out, "check", {"weights": weights, "seed": seed, **where.used()}, inputs, numbers, overwrite)
    return numbers


def _plain(figure: float | int | str) -> float | int | str:
    """JSON knows no NaN."""
    return str(figure) if isinstance(figure, float) and not math.isfinite(figure) else figure


def _file_checks(net: Model, checkpoint: Checkpoint, weights: str) -> Iterator[Check]:
    """What the files say about themselves: content id, finite weights, parameter count, palette."""
    state, summary = net.state_dict(), checkpoint.manifest["summary"]
    id = weights_id(state, checkpoint.codec, checkpoint.shape)
    yield Check("content id", id == summary["weights"].get(weights), id, "the manifest's")
    wild = sum(int((~torch.isfinite(x)).sum()) for x in state.values())
    yield Check(FINITE, wild == 0, wild, "weights that are not finite: 0")
    count, formula = sum(x.numel() for x in net.parameters()), net.shape.parameter_count()
    yield Check("parameters", count == formula, count, f"the formula's {formula:,}")
    if checkpoint.codec.palette is not None:
        yield from _palette(checkpoint)


def _palette(checkpoint: Checkpoint) -> Iterator[Check]:
    codec = checkpoint.codec
    try:
        palette = load_palette(checkpoint.path, inside=True)
    except PixseqError as error:
        yield Check("palette", False, "none", error.message)
        return
    colors, ok = palette.colors, palette.id == codec.palette_id and palette.size == codec.n_vocab
    yield Check("palette", ok, palette.id, f"the {codec.n_vocab} colours of the model's palette id")
    rgb = checked_colours()
    equal = int((to_tokens(rgb[None], "palette", nearest_table(colors))[0] == nearest(rgb, colors)).sum())
    yield Check("palette self-check", equal == len(rgb), equal, f"colours of {len(rgb)} that become their nearest")


def _pairing(checkpoint: Checkpoint, store: Store) -> Check:
    """The figure is the palette of the pictures, or their size where they have none."""
    figure = store.codec.palette_id or store.codec.size
    try:
        checkpoint.codec.must_pair(checkpoint.path, store.codec, store.path)
        image_store.some_images(store, part_of_store(store, IMAGES)[0])
    except PixseqError as error:
        return Check("pairing", False, figure, error.message)
    return Check("pairing", True, figure, "model and tokens: one palette, size and scheme")


def _images(net: Model, store: Store | None, codec: Codec, seed: int) -> Tensor:
    """IMAGES or fewer, as models see them: from all over the store, or random ones."""
    if store is not None:
        return as_tensor(image_store.seen_images(store, part_of_store(store, IMAGES)[0], codec))
    return net.random_images(IMAGES, generator(seed, Stream.CHECK_IMAGES))
