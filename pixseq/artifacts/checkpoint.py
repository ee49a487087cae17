"""Checkpoints: a folder of weights with all that is needed to use them, and the state an unfinished run resumes from.

model.safetensors is what a reader gets by default; best, last and ema may stand beside it. codec.json tells how tokens
and pixels map (scheme, size, palette, class names), so that a model needs no other file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixseq.artifacts import atomic, manifest
from pixseq.errors import PixseqError

if TYPE_CHECKING:
    from torch import Tensor

Weights = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. `config` is config.yaml's content, `codec` the meaning of its tokens."""

    path: Path
    manifest: manifest.Manifest
    codec: dict[str, Any]

    @property
    def shape(self) -> dict[str, Any]:
        """The fields of models.igpt.Shape."""
        return self.manifest["summary"]["shape"]

    def weights(self, name: str = "model") -> dict[str, Tensor]:
        """Tensors by name on the CPU. Raises PixseqError for a set that is not there or a damaged file."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.path / f"{name}.safetensors"
        if not path.is_file():
            there = sorted(p.stem for p in self.path.glob("*.safetensors"))
            raise PixseqError(f"{self.path} has no weights {name!r}", f"it has: {', '.join(there) or 'none'}")
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise PixseqError(f"{path} is damaged: {error}", "copy the checkpoint again, or train it again") from None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Raises PixseqError where `path` is no checkpoint."""
    path = Path(path)
    record = manifest.expect(path, "checkpoint")
    try:
        codec = json.loads((path / "codec.json").read_text())
    except (OSError, ValueError) as error:
        raise PixseqError(f"{path}/codec.json cannot be read: {error}", "copy the checkpoint again") from None
    return Checkpoint(path, record, codec)


def checkpoint_id(weights: Weights, codec: Mapping[str, Any], shape: Mapping[str, Any]) -> str:
    arrays = {name: manifest.whole(tensor.detach().cpu().numpy()) for name, tensor in weights.items()}
    return manifest.content_id("checkpoint", arrays, {"codec": dict(codec), "shape": dict(shape)})


def finish_checkpoint(
    partial: Path,
    weights: Mapping[str, Weights],
    shape: Mapping[str, Any],
    codec: Mapping[str, Any],
    stage: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, Any]],
    summary: Mapping[str, Any],
) -> manifest.Manifest:
    """Write weights ({"model": ..., "ema": ...}), codec, config and manifest into `partial`; drop the resume state."""
    import yaml

    for name, tensors in weights.items():
        save_weights(partial / f"{name}.safetensors", tensors)
    (partial / "codec.json").write_text(json.dumps(codec, ensure_ascii=False) + "\n")
    (partial / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
    id = checkpoint_id(weights["model"], codec, shape)
    record = manifest.build("checkpoint", id, stage, config, inputs, {"shape": dict(shape), **summary})
    (partial / "manifest.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    for leftover in ("resume", "recipe.json"):
        atomic.remove(partial / leftover)
    return record


def save_weights(path: Path, weights: Weights) -> None:
    """One set of weights, whole or not at all."""
    from safetensors.torch import save_file

    new = path.with_name(path.name + ".new")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, new)
    atomic.flush(new)
    os.replace(new, path)


def verify_checkpoint(path: str | Path) -> list[str]:
    """Faults of a checkpoint: unreadable weights, non-finite values, a wrong id. None when all is well."""
    import torch

    checkpoint = open_checkpoint(path)
    try:
        weights = checkpoint.weights()
    except PixseqError as error:
        return [error.message]
    faults = [f"{name} holds non-finite values" for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if checkpoint_id(weights, checkpoint.codec, checkpoint.shape) != checkpoint.manifest["id"]:
        faults.append(f"the content does not match its id {checkpoint.manifest['id']}")
    return faults


def begin_run(target: str | Path, recipe: Mapping[str, Any], resume: bool, overwrite: bool) -> tuple[Path, Any]:
    """The partial folder of a training run and the state to go on from (None: from the start).

    Raises PixseqError if an interrupted run stands there and neither `resume` nor `overwrite` is given, or if its
    recipe is another one.
    """
    target = atomic.check_target(target, overwrite)
    partial = atomic.partial_path(target)
    recipe = json.loads(manifest.canonical_json(recipe))
    if partial.exists():
        with atomic.lock(partial):
            pass
    if partial.exists() and not resume:
        if not overwrite:
            raise PixseqError(
                f"{partial} holds an interrupted run", "go on with --resume, or begin anew with --overwrite"
            )
        atomic.remove(partial)
    if (partial / "recipe.json").is_file():
        theirs = json.loads((partial / "recipe.json").read_text())
        if theirs != recipe:
            differing = ", ".join(_differences(theirs, recipe))
            raise PixseqError(
                f"{partial} was begun with another recipe; it differs in {differing}",
                "repeat the command that began it with --resume, or begin anew with --overwrite and no --resume",
            )
        return partial, load_state(partial)
    atomic.remove(partial)
    partial.mkdir()
    atomic.write_text(partial / "recipe.json", json.dumps(recipe, indent=1))
    return partial, None


def _differences(a: Any, b: Any, where: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        found = []
        for key in sorted({*a, *b}):
            found += _differences(a.get(key), b.get(key), f"{where}.{key}" if where else key)
        return found
    return [] if a == b else [f"{where} ({a} then, {b} now)"]


def save_state(partial: Path, state: Mapping[str, Any]) -> None:
    """Keep what a run resumes from: written beside the last one, flushed, then swapped in."""
    import torch

    folder = partial / "resume"
    folder.mkdir(exist_ok=True)
    new = folder / "state.pt.new"
    torch.save(dict(state), new)
    atomic.flush(new)
    os.replace(new, folder / "state.pt")
    atomic.flush(folder)


def load_state(partial: Path) -> dict[str, Any] | None:
    """The last saved state, or None. Only tensors and plain values are read: no code in the file can run."""
    import torch

    path = partial / "resume" / "state.pt"
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise PixseqError(f"{path} is damaged: {error}", "begin anew with --overwrite and no --resume") from None
