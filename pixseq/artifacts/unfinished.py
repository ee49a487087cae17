"""The folder of a training run until it is a checkpoint: owned, gone on with after a stop, extended, published."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pixseq.artifacts import disk, layout, manifest, publishing
from pixseq.artifacts.checkpoint import (
    BEGIN_ANEW,
    best_weights,
    drop_leftovers,
    has_state,
    load_state,
    read_weights,
    save_state,
    weights_id,
)
from pixseq.artifacts.codec import Codec
from pixseq.artifacts.locking import read_recipe
from pixseq.artifacts.owning import resuming
from pixseq.bounded.saved import is_plain
from pixseq.bounded.structure import read_json, read_object
from pixseq.bounded.tensors import read_shapes
from pixseq.errors import PixseqError
from pixseq.text import word


@contextlib.contextmanager
def run_folder(
    target: str | Path, command: str, recipe: Mapping[str, Any], resume: bool, overwrite: bool
) -> Iterator[tuple[Path, dict[str, Any] | None, manifest.Manifest | None]]:
    """The partial folder of a training run, owned: (folder, state to go on from, manifest if it only lacks its name).

    What the caller makes of it is published at the end. Raises PixseqError if an interrupted run stands there and
    neither `resume` nor `overwrite` is given, or if its recipe is another one; with both given, another recipe begins
    anew. With `resume` alone, a run of the same recipe but for more steps goes on where the shorter one ended:
    of a finished one, which stays until the longer one is done, from its end.
    """
    target = Path(target)
    recipe = json.loads(manifest.canonical_json(recipe))
    if resume and read_recipe(target) == recipe:  # killed when it had its name already
        publishing.finish(target)
        yield target, None, manifest.read(target)
        return
    extended = resume and not overwrite and can_go_on(target, recipe)
    with resuming(target, overwrite or extended, command) as partial:
        _check_recipe(partial, recipe, resume, overwrite)
        finished = _finished(partial)
        if not finished:
            disk.write_text(partial / layout.RECIPE, json.dumps(recipe, indent=1))
        if extended and not finished and not has_state(partial):
            copy_end(target, partial)
        try:
            state = None if finished else load_state(partial)
            check_best(partial, state)
            yield partial, state, finished
        except BaseException:
            if not finished and not has_state(partial) and not (partial / "log.jsonl").exists():
                layout.delete(partial, keep=True)  # it failed before its first step: nothing to go on from
            raise


def _check_recipe(partial: Path, recipe: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
    """Clear what an interrupted run left where the new one begins anew. Raises PixseqError where that was not asked."""
    if not layout.holds_work(partial):
        return
    if not resume and not overwrite:
        raise PixseqError(f"{partial} holds an interrupted run", "go on with --resume, or begin anew with --overwrite")
    theirs = read_recipe(partial)
    if resume and (theirs == recipe or (not overwrite and more_steps(theirs, recipe) and is_constant(recipe))):
        return
    if not overwrite and resume and more_steps(theirs, recipe):
        raise PixseqError(
            f"{partial} was begun with another recipe: of {more_steps(theirs, recipe)} steps, over which its learning "
            "rate comes down to zero",
            "finish it as it was begun, then train on with pretrain --from; a train.schedule=constant takes more steps",
        )
    if not overwrite:
        differing = "there is no record of it" if theirs is None else f"it differs in {_differing(theirs, recipe)}"
        raise PixseqError(
            f"{partial} was begun with another recipe; {differing}",
            "repeat the command that began it with --resume, or begin anew with --overwrite",
        )
    layout.delete(partial, keep=True)


def more_steps(theirs: Any, ours: Mapping[str, Any]) -> int | None:
    """The steps of a recipe that differs from `ours` in nothing but having fewer of them; None for any other."""
    try:
        section = theirs["config"]["train"]
        longer = {**section, "steps": ours["config"]["train"]["steps"]}
        same = {**theirs, "config": {**theirs["config"], "train": longer}} == ours
        return section["steps"] if same and section["steps"] < longer["steps"] else None
    except (KeyError, TypeError):
        return None


def is_constant(recipe: Mapping[str, Any]) -> bool:
    """Whether a pretraining run's learning rate stays, so that steps can be added."""
    return recipe["config"]["train"]["schedule"] == "constant"


def can_go_on(target: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether `target` is a finished run of `recipe` with fewer steps, whose state at the end is there.

    Raises PixseqError where it is such a run and cannot be gone on with.
    """
    if not (target / "manifest.json").is_file():
        return False
    record = manifest.read(target)
    config = {key: value for key, value in record["config"].items() if key in recipe["config"]}
    flags = {key: value for key, value in record["config"].items() if key not in config}
    inputs = {role: parent.get("id") for role, parent in record["inputs"].items()}
    steps = more_steps({"config": config, "inputs": inputs, **flags}, recipe)
    if steps is None:
        return False
    train_on = f"pixseq pretrain --from {word(target)}, and another --out"
    hint = f"train on from its weights, with a schedule of their own: {train_on}"
    if not is_constant(recipe):
        raise PixseqError(f"{target} is finished: after {steps} steps its learning rate has come down to zero", hint)
    if not has_state(target):
        raise PixseqError(
            f"{target} is finished after {steps} steps, and its optimizer's state is not kept there", hint
        )
    return True


def copy_end(target: Path, partial: Path) -> None:
    """What a finished run goes on from: its log, its best weights, its state, which makes it whole."""
    state = load_state(target) or {}  # it is there: see can_go_on
    shutil.copyfile(target / "log.jsonl", partial / "log.jsonl")
    if (best := best_of(partial, state)) is not None:
        shutil.copyfile(target / "best.safetensors", best)
    save_state(partial, state)


def best_of(partial: Path, state: Mapping[str, Any] | None) -> Path | None:
    """Where the best weights stand that a state names; None where it names none."""
    best = (state or {}).get("best")
    return best_weights(partial, best) if isinstance(best, dict) and type(best.get("step")) is int else None


def check_best(partial: Path, state: Mapping[str, Any] | None) -> None:
    """Raises PixseqError where the best weights of a state are missing, damaged or not of the shapes of its last ones:
    the run would end with them.
    """
    path, last = best_of(partial, state), (state or {}).get("model")
    if path is None or not isinstance(last, dict):
        return
    try:
        found = read_shapes(path)
    except (OSError, ValueError) as error:
        raise PixseqError(f"{path} is damaged: {error}", BEGIN_ANEW) from None
    ours = {name: tuple(x.shape) for name, x in last.items() if is_plain(x)}
    for name in sorted(found.keys() | ours.keys(), key=str):
        if found.get(name) != ours.get(name):
            shapes = (str(list(has[name])) if name in has else "missing" for has in (found, ours))
            raise PixseqError(f"{path} does not fit the run: {name} is {' and not '.join(shapes)}", BEGIN_ANEW)


def _finished(partial: Path) -> manifest.Manifest | None:
    """The manifest of a checkpoint that only lacks its name: killed after its last write.

    A manifest alone is not believed: the weights must be those it names. Raises PixseqError where they are not and
    there is no state to make them again from.
    """
    path = partial / "manifest.json"
    if not path.is_file():
        return None
    try:
        record = read_json(path, "")
        ids, shape = record["summary"]["weights"], record["summary"]["shape"]
        codec = Codec.read(read_object(partial / "codec.json", ""))
        weights = {name: read_weights(partial / f"{name}.safetensors") for name in ids}
        whole = all(weights_id(weights[name], codec, shape) == ids[name] for name in ids)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError, PixseqError):
        whole = False
    if whole:
        drop_leftovers(partial, record)
        return record
    if not has_state(partial):
        raise PixseqError(
            f"{partial} is damaged: its weights are not those of its manifest.json",
            BEGIN_ANEW,
        )
    path.unlink()
    return None


def _differing(theirs: Any, ours: Any) -> str:
    return ", ".join(_differences(theirs, ours))


def _differences(a: Any, b: Any, place: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        found = []
        for key in sorted({*a, *b}):
            found += _differences(a.get(key), b.get(key), f"{place}.{key}" if place else key)
        return found
    return [] if a == b else [f"{place} ({a} then, {b} now)"]
