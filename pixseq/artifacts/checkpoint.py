"""Checkpoints: a folder of weights with all that is needed to use them, and the state an unfinished run resumes from.

model.safetensors is what a reader gets by default; best, last and ema may stand beside it. codec.json tells how tokens
and pixels map (scheme, size, palette, class names), so that a model needs no other file.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from pixseq.artifacts import disk, layout, manifest
from pixseq.artifacts.codec import Codec, is_texts
from pixseq.bounded.saved import check_stored, is_plain, load_saved
from pixseq.bounded.structure import read_object
from pixseq.bounded.tensors import read_shapes
from pixseq.errors import PixseqError

if TYPE_CHECKING:
    from torch import Tensor

Weights = Mapping[str, "Tensor"]
DEEPEST_STATE = 8  # levels
FULL = 1 << 20  # bytes: a disk with less that fails to take a file is full
BEGIN_ANEW = "begin anew with --overwrite and no --resume"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. `codec` is the meaning of its tokens or pixels."""

    path: Path
    manifest: manifest.Manifest
    codec: Codec

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

    def count(self, name: str = "model") -> int:
        """The numbers in a set of weights, told by the file's header; 0 where it cannot be read."""
        try:
            return sum(map(math.prod, read_shapes(self.path / f"{name}.safetensors").values()))
        except (OSError, ValueError, PixseqError):
            return 0


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Raises PixseqError where `path` is no checkpoint."""
    path = Path(path)
    record = manifest.expect(path, "checkpoint")
    again = "copy the checkpoint again"
    try:
        codec = Codec.read(read_object(path / "codec.json", again))
    except (OSError, ValueError) as error:
        raise PixseqError(f"{path}/codec.json cannot be read: {error}", again) from None
    summary = record["summary"]
    if not isinstance(summary.get("shape"), dict) or not is_texts(summary.get("weights")):
        raise PixseqError(f"{path}/manifest.json does not tell the model's shape and weights", again)
    return Checkpoint(path, record, codec)


def weights_id(weights: Weights, codec: Codec, shape: Mapping[str, Any]) -> str:
    """The content id of one set of weights; that of `model` is the checkpoint's."""
    arrays = {name: manifest.whole(tensor.detach().cpu().numpy()) for name, tensor in weights.items()}
    return manifest.content_id("checkpoint", arrays, {"codec": codec.written(), "shape": dict(shape)})


def finish_checkpoint(
    partial: Path,
    weights: Mapping[str, Weights],
    shape: Mapping[str, Any],
    codec: Codec,
    stage: str,
    config: Mapping[str, Any],
    flags: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, Any]],
    summary: Mapping[str, Any],
) -> manifest.Manifest:
    """Write weights ({"model": ..., "ema": ...}), codec, config.yaml and, last of all, the manifest into `partial`.

    The manifest's config is `config` (accepted back as --config) and `flags`. What the run resumed from goes only when
    all is written, so that a kill at any moment loses nothing; see `drop_leftovers`.
    """
    import yaml

    for name, tensors in weights.items():
        save_weights(partial / f"{name}.safetensors", tensors)
    disk.write_text(partial / "codec.json", json.dumps(codec.written(), ensure_ascii=False) + "\n")
    disk.write_text(partial / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
    ids = {name: weights_id(tensors, codec, shape) for name, tensors in weights.items()}
    summary = {"shape": dict(shape), "weights": ids, **summary}
    record = manifest.build("checkpoint", ids["model"], stage, {**config, **flags}, inputs, summary)
    disk.write_text(partial / "manifest.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    drop_leftovers(partial, record)
    return record


def drop_leftovers(partial: Path, record: manifest.Manifest) -> None:
    """Remove what only an unfinished run needs. The state at the end stays where more steps can follow."""
    section = record["config"].get("train")
    constant = isinstance(section, dict) and section.get("schedule") == "constant"
    for path in partial.iterdir():
        extra = path.suffix == ".safetensors" and path.stem not in record["summary"]["weights"]
        if extra or path.suffix == ".new" or (path.name == "resume" and not constant):
            layout.delete(path)


def save_weights(path: Path, weights: Weights) -> None:
    """One set of weights, whole or not at all."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    _swap_in(path, lambda new: save_file(plain, new))


def _swap_in(path: Path, write: Callable[[Path], None]) -> None:
    """`write` a file that takes the place of `path`. torch and safetensors have errors of their own for a full disk."""
    with disk.swapping_in(path) as new:
        try:
            new.touch()
            mode = new.stat().st_mode  # what the umask leaves; safetensors lets nobody else read
            write(new)
            new.chmod(mode)
        except Exception as error:
            free = shutil.disk_usage(path.parent).free
            if free < FULL:
                raise disk.full(path) from error
            raise PixseqError(
                f"cannot write {path}: {error} ({decimal(free)} are free on its disk)",
                "make room, then repeat the command, with --resume where it has that",
            ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """A safetensors file on the CPU. Raises PixseqError if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        read_shapes(path)
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
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


def save_state(partial: Path, state: Mapping[str, Any]) -> None:
    """Keep what a run resumes from: written beside the last one, flushed, then swapped in."""
    import torch

    folder = partial / "resume"
    folder.mkdir(exist_ok=True)
    _swap_in(folder / "state.pt", lambda new: torch.save(dict(state), new))
    disk.flush(folder)


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
    path = partial / "resume" / "state.pt"
    if not path.is_file():
        return None
    try:
        state = load_saved(path)
        check_stored(_state_tensors(state), path.stat().st_size)
    except (OSError, ValueError) as error:
        raise PixseqError(f"{path} is damaged: {error}", BEGIN_ANEW) from None
    return state


def _state_tensors(state: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a saved state by where it stands. Raises ValueError for what no state holds."""
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, not keys and values")
    left = [(str(key), value, 0) for key, value in state.items()]
    while left:
        place, value, depth = left.pop()
        if isinstance(value, dict | list | tuple):
            if depth > DEEPEST_STATE:
                raise ValueError(f"{place} is nested without end")
            each = value.items() if isinstance(value, dict) else enumerate(value)
            left += [(f"{place}.{key}", one, depth + 1) for key, one in each]
        elif is_plain(value):
            yield place, value
        elif not isinstance(value, bool | int | float | str | None):
            raise ValueError(f"{place} is a {type(value).__name__}")
