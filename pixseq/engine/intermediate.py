"""--keep: checkpoints of a run on its way, OUT-step1000 beside the OUT that it ends as."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pixseq.artifacts import manifest
from pixseq.artifacts.layout import partial_path
from pixseq.artifacts.owning import writing
from pixseq.artifacts.targets import check_target
from pixseq.engine.state import TrainState
from pixseq.errors import UsageError


class IntermediateCheckpoints:
    """Those from where a run has `begun`; where a shorter run is extended, of its end too. The rank that `leads` makes
    them, `write` one in a folder from a state.

    Raises PixseqError where one that is still to be made is there already, unless this very run has kept it before it
    was interrupted.
    """

    def __init__(
        self,
        write: Callable[[Path, Mapping[str, Any]], object],
        leads: bool,
        out: Path,
        recipe: Mapping[str, Any],
        overwrite: bool,
        resume: bool,
        steps: set[int],
        begun: TrainState,
    ):
        self.write, self.leads, self.out, self.overwrite = write, leads, out, overwrite
        ahead = {step for step in steps if step >= begun.step}
        self.steps = {step for step in ahead if not (resume and is_of(step_folder(out, step), recipe))}
        for step in self.steps if leads else ():
            check_target(step_folder(out, step), overwrite)
        if begun.validated:
            self.after_step(begun)

    def after_step(self, run: TrainState) -> None:
        if run.step not in self.steps or not self.leads:
            return
        with writing(step_folder(self.out, run.step), self.overwrite, "pretrain --keep") as folder:
            folder.mkdir()
            shutil.copyfile(partial_path(self.out) / "log.jsonl", folder / "log.jsonl")
            self.write(folder, {**run.snapshot(), "stopped_early": False})


def kept_steps(keep: str | None, steps: int) -> set[int]:
    """The steps that --keep names, below the last. Raises UsageError for a text that names none."""
    if keep is None:
        return set()
    every, colon, number = keep.partition(":")
    try:
        if colon and every == "every" and 0 < int(number) <= steps:
            return set(range(int(number), steps, int(number)))
        named = {int(part) for part in keep.split(",")}
    except ValueError:
        named = set()
    if not named or min(named) < 1 or max(named) > steps:
        raise UsageError(f"--keep {keep!r} names no steps of 1 to {steps}", "for example 1000,2000 or every:500")
    return named - {steps}


def step_folder(out: str | Path, step: int) -> Path:
    out = Path(out)
    return out.with_name(f"{out.name}-step{step}")


def is_of(path: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether a checkpoint stands at `path` that a run of `recipe` has kept, before it was interrupted."""
    if not (path / "manifest.json").is_file():
        return False
    record = manifest.read(path)
    flags = {key: value for key, value in recipe.items() if key not in ("config", "inputs")}
    parents = {role: parent.get("id") for role, parent in record["inputs"].items()}
    return parents == recipe["inputs"] and record["config"] == {**recipe["config"], **flags}
