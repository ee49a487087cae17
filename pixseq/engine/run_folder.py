"""The folder of a training run: opened or gone on with, and published as the checkpoint that it has become."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixseq import progress
from pixseq.artifacts import unfinished
from pixseq.artifacts.checkpoint import load_state
from pixseq.artifacts.layout import partial_path
from pixseq.artifacts.manifest import Manifest
from pixseq.engine.images import Images
from pixseq.models.family import Shape
from pixseq.runtime import Machine


@dataclass
class RunFolder:
    """`path` is NAME.partial; `state` what a run goes on from there, None: it begins. `made` is the checkpoint's
    manifest once it is written, by the first rank; where it only lacked its name, from the start.
    """

    path: Path
    state: dict[str, Any] | None
    made: Manifest | None


def recipe_of(config: Mapping[str, Any], inputs: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to be gone on with."""
    return {"config": dict(config), "inputs": {role: parent["id"] for role, parent in inputs.items()}, **flags}


@contextmanager
def run_folder(
    machine: Machine, out: str | Path, command: str, recipe: dict[str, Any], resume: bool, overwrite: bool
) -> Iterator[RunFolder]:
    """Of all ranks: the first one makes, locks and at the end publishes it, the others read it."""
    if machine.leads:
        with unfinished.run_folder(out, command, recipe, resume, overwrite) as opened:
            machine.any(opened[2] is not None)
            folder = RunFolder(*opened)
            if resume and folder.made is None:
                progress.say(_where_it_begins(folder))
            yield folder
        return
    finished = machine.any(False)  # from the first rank, which may give the folder its name at once
    path = partial_path(out)
    yield RunFolder(path, None if finished else load_state(path), {} if finished else None)


def _where_it_begins(folder: RunFolder) -> str:
    if folder.state is None:
        return f"--resume: no saved state in {folder.path}, beginning at step 0"
    return f"--resume: going on from {folder.path} after {folder.state['step']} steps"


def run_summary(machine: Machine, shape: Shape, images: Images, end: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run that made it."""
    return {
        "parameters": shape.parameter_count(),
        **images.count(),
        "steps": end["step"],
        "stopped_early": end["stopped_early"],
        "training_seconds": round(end["seconds"], 1),
        "best": end["best"],
        "device": str(machine.device),
    }
