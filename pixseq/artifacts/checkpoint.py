"""Checkpoints: a folder of weights with all that is needed to use them, and the state an unfinished run resumes from.

model.safetensors is what a reader gets by default; best, last and ema may stand beside it. codec.json tells how tokens
and pixels map (scheme, size, palette, class names), so that a model needs no other file.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixseq.artifacts import atomic, manifest
from pixseq.errors import PixseqError

if TYPE_CHECKING:
    from torch import Tensor

Weights = Mapping[str, "Tensor"]

CODEC = {"scheme", "height", "width", "n_vocab", "palette", "palette_id", "class_names"}


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. `codec` is the meaning of its tokens or pixels."""

    path: Path
    manifest: manifest.Manifest
    codec: dict[str, Any]

    @property
    def shape(self) -> dict[str, Any]:
        """The fields of its family's shape, see models.family.shape_from."""
        return self.manifest["summary"]["shape"]

    def weights(self, name: str = "model") -> dict[str, Tensor]:
        """Tensors by name on the CPU. Raises PixseqError for a set that is not there or a damaged file."""
        path = self.path / f"{name}.safetensors"
        if not path.is_file():
            there = sorted(p.stem for p in self.path.glob("*.safetensors"))
            raise PixseqError(f"{self.path} has no weights {name!r}", f"it has: {', '.join(there) or 'none'}")
        return read_weights(path)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Raises PixseqError where `path` is no checkpoint."""
    path = Path(path)
    record = manifest.expect(path, "checkpoint")
    try:
        codec = json.loads((path / "codec.json").read_text())
        if not isinstance(codec, dict) or not codec.keys() >= CODEC:
            raise ValueError(f"it does not say {', '.join(sorted(CODEC))}")
    except (OSError, ValueError, RecursionError) as error:
        raise PixseqError(f"{path}/codec.json cannot be read: {error}", "copy the checkpoint again") from None
    return Checkpoint(path, record, codec)


def weights_id(weights: Weights, codec: Mapping[str, Any], shape: Mapping[str, Any]) -> str:
    """The content id of one set of weights; that of `model` is the checkpoint's."""
    arrays = {name: manifest.whole(tensor.detach().cpu().numpy()) for name, tensor in weights.items()}
    return manifest.content_id("checkpoint", arrays, {"codec": dict(codec), "shape": dict(shape)})


def finish_checkpoint(
    partial: Path,
    weights: Mapping[str, Weights],
    shape: Mapping[str, Any],
    codec: Mapping[str, Any],
    stage: str,
    config: Mapping[str, Any],
    flags: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, Any]],
    summary: Mapping[str, Any],
) -> manifest.Manifest:
    """Write weights ({"model": ..., "ema": ...}), codec, config.yaml and, last of all, the manifest into `partial`.

    The manifest's config is `config` (accepted back as --config) and `flags`. What the run resumed from goes only when
    all is written, so that a kill at any moment loses nothing.
    """
    import yaml

    for name, tensors in weights.items():
        save_weights(partial / f"{name}.safetensors", tensors)
    atomic.write_text(partial / "codec.json", json.dumps(codec, ensure_ascii=False) + "\n")
    atomic.write_text(partial / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
    ids = {name: weights_id(tensors, codec, shape) for name, tensors in weights.items()}
    summary = {"shape": dict(shape), "weights": ids, **summary}
    record = manifest.build("checkpoint", ids["model"], stage, {**config, **flags}, inputs, summary)
    atomic.write_text(partial / "manifest.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    drop_leftovers(partial, ids)
    return record


def drop_leftovers(partial: Path, kept: Collection[str]) -> None:
    """Remove what only an unfinished run needs."""
    for path in partial.iterdir():
        extra = path.suffix == ".safetensors" and path.stem not in kept
        if extra or path.suffix == ".new" or path.name in ("resume", "recipe.json"):
            atomic.remove(path)


def save_weights(path: Path, weights: Weights) -> None:
    """One set of weights, whole or not at all."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    _swap_in(path, lambda new: save_file(plain, new))


def _swap_in(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside `path`, flush, rename. torch and safetensors have errors of their own for a full disk."""
    new = path.with_name(path.name + ".new")
    try:
        write(new)
        atomic.flush(new)
        os.replace(new, path)
    except Exception as error:
        new.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise PixseqError(
            f"cannot write {path}: {error} ({free / 1e9:.2f} GB are free on its disk)",
            "make room, then repeat the command, with --resume where it has that",
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """A safetensors file on the CPU. Raises PixseqError if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise PixseqError(f"{path} is damaged: {error}", "copy the checkpoint again, or train it again") from None


def verify_checkpoint(path: str | Path) -> list[str]:
    """Faults of a checkpoint: unreadable weights, non-finite values, a wrong id. None when all is well."""
    import torch

    checkpoint = open_checkpoint(path)
    faults = []
    for name, id in checkpoint.manifest["summary"]["weights"].items():
        try:
            weights = checkpoint.weights(name)
        except PixseqError as error:
            faults.append(error.message)
            continue
        faults += [
            f"{name}: {key} holds non-finite values" for key, x in weights.items() if not torch.isfinite(x).all()
        ]
        if weights_id(weights, checkpoint.codec, checkpoint.shape) != id:
            faults.append(f"{name}.safetensors or codec.json does not match its id {id}")
    return faults


@contextlib.contextmanager
def run_folder(
    target: str | Path, recipe: Mapping[str, Any], resume: bool, overwrite: bool
) -> Iterator[tuple[Path, dict[str, Any] | None, manifest.Manifest | None]]:
    """The partial folder of a training run, locked: (folder, state to go on from, manifest if it only lacks its name).

    Raises PixseqError if an interrupted run stands there and neither `resume` nor `overwrite` is given, or if its
    recipe is another one; with both given, another recipe begins anew.
    """
    target = atomic.check_target(target, overwrite)
    partial = atomic.partial_path(target)
    recipe = json.loads(manifest.canonical_json(recipe))
    if partial.exists() and not resume and not overwrite:
        raise PixseqError(f"{partial} holds an interrupted run", "go on with --resume, or begin anew with --overwrite")
    partial.mkdir(exist_ok=True)
    with atomic.lock(partial):
        if not resume:
            atomic.clear(partial)
        elif (partial / "recipe.json").is_file():
            theirs = json.loads((partial / "recipe.json").read_text())
            if theirs != recipe and not overwrite:
                raise PixseqError(
                    f"{partial} was begun with another recipe; it differs in {', '.join(_differences(theirs, recipe))}",
                    "repeat the command that began it with --resume, or begin anew with --overwrite",
                )
            if theirs != recipe:
                atomic.clear(partial)
        elif not (partial / "manifest.json").is_file():
            atomic.clear(partial)
        finished = None
        if (partial / "manifest.json").is_file():  # killed between its last write and its new name
            finished = json.loads((partial / "manifest.json").read_text())
            drop_leftovers(partial, finished["summary"]["weights"])
        elif not (partial / "recipe.json").is_file():
            atomic.write_text(partial / "recipe.json", json.dumps(recipe, indent=1))
        try:
            yield partial, None if finished else load_state(partial), finished
        except BaseException:
            if not finished and not has_state(partial) and not (partial / "log.jsonl").exists():
                atomic.remove(partial)  # it failed before its first step: nothing to go on from
            raise


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
    _swap_in(folder / "state.pt", lambda new: torch.save(dict(state), new))
    atomic.flush(folder)


def best_weights(partial: Path, best: Mapping[str, Any]) -> Path:
    """Where the weights of a run's best record stand: by its step, so that a state and its weights never part."""
    return partial / f"best-{best['step']}.safetensors"


def keep_best(partial: Path, *records: Mapping[str, Any] | None) -> None:
    """Remove the best weights of all but these records."""
    for path in set(partial.glob("best-*.safetensors")) - {best_weights(partial, best) for best in records if best}:
        path.unlink()


def has_state(partial: Path) -> bool:
    return (partial / "resume" / "state.pt").is_file()


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
