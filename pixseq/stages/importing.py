"""import: weights that another program published or trained, as a checkpoint like any other."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from pixseq import progress
from pixseq.artifacts.checkpoint import finish_checkpoint
from pixseq.artifacts.codec import Codec
from pixseq.artifacts.manifest import Manifest
from pixseq.artifacts.owning import owns, writing
from pixseq.artifacts.palette import load_palette
from pixseq.artifacts.targets import check_apart
from pixseq.errors import PixseqError
from pixseq.interop.aim import read_aim
from pixseq.interop.bundle import find_prefix
from pixseq.interop.foreign import NOT_OURS, Foreign
from pixseq.interop.huggingface import read_hf
from pixseq.interop.openai import read_openai
from pixseq.interop.places import file_id
from pixseq.models.family import Shape, build, shape_from

READERS = {"hf": read_hf, "openai": read_openai}


@owns("import", "out")
def run(
    form: str, path: str | Path, out: str | Path, palette: str | Path | None = None, overwrite: bool = False
) -> Manifest:
    """Write the weights at `path`, of the form "hf" or "openai", as a checkpoint; returns its manifest.

    `palette`: the colours of its tokens, else those found beside the weights; without any, the model goes only with
    tokens that have none either. Raises PixseqError for what is damaged, and for models that ours cannot express.
    """
    if form == "openai":
        check_apart([out], [find_prefix(Path(path)).parent])  # `path` may be no file's name
    found = READERS[form](path)
    shape = shape_from(found.shape)
    _check(path, found, shape)
    codec, inputs = _codec(found, shape, palette)
    return _write(form, found, shape, codec, inputs, out, overwrite)


@owns("import", "out")
def run_aim(
    backbone: str | Path,
    out: str | Path,
    head: str | Path | None = None,
    probe_layers: str | None = None,
    n_heads: int | None = None,
    size: int = 224,
    overwrite: bool = False,
) -> Manifest:
    """Write an AIM backbone, and with `head` its attentive probe, as a checkpoint; returns its manifest.

    `probe_layers`, `n_heads` and `size` are what the files do not tell, see `interop.aim.read_aim`, which also says
    what is refused.
    """
    found = read_aim(backbone, head, probe_layers, n_heads, size)
    shape = shape_from(found.shape)
    _check(backbone, found, shape)
    _check_positions(backbone, found, shape, size)
    codec = Codec("pixels", size, size, None, class_names=found.class_names)
    return _write("aim", found, shape, codec, {}, out, overwrite)


def _write(
    form: str,
    found: Foreign,
    shape: Shape,
    codec: Codec,
    inputs: dict[str, Any],
    out: str | Path,
    overwrite: bool,
) -> Manifest:
    """The checkpoint, whose config.yaml holds what a configuration says of its shape."""
    for note in found.notes:
        progress.note(note)
    for file in found.files:  # by the file's own hash: what the hub shows beside a download
        role = file.name if file.name not in inputs else str(file)
        inputs[role] = {"path": str(file), "id": file_id(file)}
    flags = {"form": form, "theirs": found.config}
    summary = {"parameters": shape.parameter_count(), "notes": found.notes}
    with writing(out, overwrite, "import") as partial:
        partial.mkdir()
        return finish_checkpoint(
            partial,
            {"model": found.weights},
            asdict(shape),
            codec,
            f"import {form}",
            {"model": shape.config()},
            flags,
            inputs,
            summary,
        )


def _check_positions(path: str | Path, found: Foreign, shape: Shape, size: int) -> None:
    """Stored positions may be left out where they are those that the model computes, up to their type's rounding."""
    ours = shape.positions()
    for name, stored in found.positions.items():
        assert ours is not None  # AIM's are fixed
        if stored.numel() != ours.numel():
            raise PixseqError(
                f"{name} in {path} has shape {list(stored.shape)}, and pictures of {size}x{size} "
                f"have {shape.n_ctx} positions of width {shape.d_model}",
                "give the size of the pictures that it was trained on as --size",
            )
        close = max(1e-5, torch.finfo(stored.dtype).eps) if stored.is_floating_point() else 0.0
        if not bool(((stored.reshape(ours.shape).float() - ours).abs() <= close).all()):
            raise PixseqError(f"{name} in {path} does not hold AIM's sine and cosine positions", NOT_OURS)


def _check(path: str | Path, found: Foreign, shape: Shape) -> None:
    """What every importer must deliver: the tensors of the shape (each was checked as it was read)."""
    with torch.device("meta"):
        wanted = {name: x.shape for name, x in build(shape).state_dict().items()}
    if wanted != {name: x.shape for name, x in found.weights.items()}:
        raise AssertionError(f"the importer of {path} did not make the tensors of {shape}")


def _codec(found: Foreign, shape: Shape, palette: str | Path | None) -> tuple[Codec, dict[str, Any]]:
    """What the tokens mean, and the palette as a parent."""
    side = math.isqrt(shape.n_ctx)
    n_vocab: int = found.shape["n_vocab"]
    codec = Codec("palette", side, side, n_vocab, class_names=found.class_names)
    source = palette or found.palette
    if source is None:
        found.notes.append(
            "no palette was found beside the weights: pictures can neither be encoded for this model nor drawn "
            "with it; import it with --palette kmeans_centers.npy"
        )
        return codec, {}
    loaded = load_palette(source)
    if loaded.size != n_vocab:
        raise PixseqError(
            f"the palette {source} has {loaded.size} colours, the model's vocabulary has {n_vocab}",
            "pass the palette that the model was trained with as --palette",
        )
    codec = replace(codec, palette=loaded.colors.tolist(), palette_id=loaded.id)
    return codec, {"palette": {"path": str(source), "id": loaded.id, "form": loaded.form}}
