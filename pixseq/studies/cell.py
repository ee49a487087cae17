"""One cell of a scaling study, through the ordinary stages: train, score, probe, complete, compare.

Each product is an ordinary artifact in the cell's folder. What is there is not made again, so that a cell that was
killed goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pixseq.artifacts.arrays import open_store
from pixseq.artifacts.checkpoint import open_checkpoint
from pixseq.artifacts.layout import partial_path
from pixseq.artifacts.manifest import reference
from pixseq.artifacts.metrics import read_metrics, write_metrics
from pixseq.artifacts.plan import Cell
from pixseq.bounded import forms
from pixseq.choices import Precision
from pixseq.config import StudyData
from pixseq.engine import scores
from pixseq.errors import Diverged, PixseqError
from pixseq.models.family import shape_from
from pixseq.stages import decode, evaluate, features, frechet, pretrain, probe, sample
from pixseq.studies import judge as judging
from pixseq.studies import ladder, rates
from pixseq.studies.judge import OnMachine, once
from pixseq.studies.study import DIVERGED, DONE, EXTRACTOR, Study, check_parents
from pixseq.text import word

SHOWN = 32  # completions in the picture
FRECHET = {
    "frechet_distance": forms.number,
    "n_a": forms.number,
    "floor": forms.maybe(forms.fields({"frechet_distance": forms.number, "n": forms.number})),
    "extractor": forms.maybe(forms.text),
}


def run_named(study: Study, id: str, device: str = "auto", precision: Precision = "auto") -> None:
    """Run a cell, or make a reference, by its id. Raises PixseqError where the study has none of that id."""
    for each in judging.references(study):
        if each.id == id:
            judging.ready(study, each, {"device": device, "precision": precision})
            return
    run(study, study.cell(id), device, precision)


def run(study: Study, cell: Cell, device: str = "auto", precision: Precision = "auto") -> Mapping[str, Any]:
    """The cell's result, written as result.json.

    A cell of a sweep of learning rates is trained and scored, no more. Raises PixseqError where its stores are no
    longer those that it was planned with, or its learning rate is not known yet.
    """
    check_parents(study)
    if rates.waits(study, cell):
        raise PixseqError(
            f"{cell.id}: its learning rate waits for the sweep at r{cell.resolution}",
            f"run {rates.sweep_of(study, cell.resolution)[0].id} and the others of the sweep, then: "
            f"pixseq scaling plan GRID -o {word(study.path)} --recentre",
        )
    folder, data = study.folder(cell), study.data(cell)
    if (folder / "result.json").is_file():
        return study.result(cell)
    folder.mkdir(parents=True, exist_ok=True)
    where: OnMachine = {"device": device, "precision": precision}
    numbers: dict[str, Any] = {"status": DONE, "reason": None}
    try:
        once(folder / "model", lambda out: _train(study, cell, out, where))
        if cell.sweep is None:
            _loss_and_features_once(study, folder, cell, where)
        numbers |= _loss(folder, data.val, where)
        if cell.sweep is None:
            numbers |= _accuracy(study, folder, cell, where)
            numbers |= _completions(study, folder, cell, where)
    except Diverged as fault:
        numbers = {"status": DIVERGED, "reason": fault.message}
    inputs = {"plan": study.reference}
    if numbers["status"] == DONE:
        made = open_checkpoint(folder / "model").manifest
        inputs["model"] = reference(folder / "model", made)
        numbers |= {"precision": made["config"]["precision"], "device": made["summary"]["device"]}
        inputs |= _extractor(folder)
    write_metrics(folder / "result.json", "scaling run", cell.to_json(), inputs, numbers, overwrite=True)
    return numbers


def _extractor(folder: Path) -> dict[str, Any]:
    """The parent of the cell's features of completions, by its role here; none where colours were compared."""
    store = folder / "completions.features.zarr"
    model = open_store(store, "features").manifest["inputs"].get("model") if store.exists() else None
    return {} if model is None else {EXTRACTOR: model}


def _train(study: Study, cell: Cell, out: Path, where: OnMachine) -> None:
    config = ladder.recipe_of(study.grid, cell)
    pretrain.run(study.data(cell).train, out, config, resume=True, overwrite=True, **where)


def _exactly(where: OnMachine) -> OnMachine:
    """Where a model is measured: in float32 unless bf16 was asked for, so that one pass gives loss and features."""
    exact: Precision = "fp32" if where["precision"] == "auto" else where["precision"]
    return {**where, "precision": exact}


def _loss_and_features_once(study: Study, folder: Path, cell: Cell, where: OnMachine) -> None:
    """The held-out loss and the features of the same pictures from one forward pass, where one gives both."""
    loss, held, data = folder / "loss.json", folder / "test.features.zarr", study.data(cell)
    if any(path.exists() for path in (loss, held, partial_path(held), folder / "probe.json")):
        return
    if data.probe_test not in (None, data.val) or not _labelled(data):
        return
    if scores.loss_in_feature_pass(shape_from(open_checkpoint(folder / "model").shape)):
        features.run(folder / "model", data.val, held, loss=loss, resume=True, overwrite=True, **_exactly(where))


def _numbers(path: Path, needed: Mapping[str, forms.Form]) -> dict[str, Any]:
    """The numbers of a product. Raises PixseqError where it lacks what the cell takes from it."""
    numbers = read_metrics(path)[1]
    forms.require(numbers, forms.fields(needed), path, "remove it, and run the cell again")
    return numbers


def _loss(folder: Path, val: str, where: OnMachine) -> dict[str, Any]:
    """The held-out loss in the first unit that its family reports."""
    exact = _exactly(where)
    once(folder / "loss.json", lambda out: evaluate.run(folder / "model", val, out, **exact))
    shape = shape_from(open_checkpoint(folder / "model").shape)
    unit = next(iter(shape.report(0.0, open_checkpoint(folder / "model").codec.grid[2])))
    return {"loss": _numbers(folder / "loss.json", {unit: forms.number})[unit], "loss_unit": unit}


def _probed_stores(data: StudyData) -> tuple[str, str]:
    """What the probe is fitted on and tested on."""
    return data.probe_train or data.train, data.probe_test or data.val


def _labelled(data: StudyData) -> bool:
    return all(open_store(path, "tokens", "pixels").labels() is not None for path in _probed_stores(data))


def _accuracy(study: Study, folder: Path, cell: Cell, where: OnMachine) -> dict[str, Any]:
    """Test accuracy of the linear probe at the layer that validation chose; None without labels."""
    data = study.data(cell)
    train, test = _probed_stores(data)
    if not _labelled(data):
        return {"accuracy": None}

    def extracted(store: str) -> Callable[[Path], Any]:
        exact = _exactly(where)
        return lambda out: features.run(folder / "model", store, out, resume=True, overwrite=True, **exact)

    def probed(out: Path) -> None:
        fit = once(folder / "train.features.zarr", extracted(train))
        held = once(folder / "test.features.zarr", extracted(test))
        how = study.grid.probe
        probe.run(fit, held, out, layers=how.layers, c=how.c, device=where["device"])

    once(folder / "probe.json", probed)
    numbers = _numbers(folder / "probe.json", {"test_accuracy": forms.number, "best_layer": forms.number})
    return {"accuracy": numbers["test_accuracy"], "best_layer": numbers["best_layer"]}


def _completions(study: Study, folder: Path, cell: Cell, where: OnMachine) -> dict[str, Any]:
    """Fréchet distance of completed pictures from other real ones, and its floor; None where none are drawn."""
    how = study.grid.completions
    if how.count == 0 or not shape_from(open_checkpoint(folder / "model").shape).can_sample:
        return {"frechet_distance": None}
    judge = judging.ready(study, cell, where)

    def drawn(out: Path) -> None:
        sample.run(
            folder / "model",
            None,
            count=len(open_store(judge.prompts, "tokens")),
            prompt=str(judge.prompts),
            keep=how.keep,
            temperature=how.temperature,
            seed=how.seed,
            tokens_out=out,
            overwrite=True,
            **where,
        )

    def measured(out: Path) -> None:
        ours = folder / "completions.features.zarr"
        once(ours, lambda out: judge.features(folder / "completions.zarr", out, where))
        frechet.run(ours, judge.real, out, layer=judge.layer, floor=judge.floor)

    once(folder / "completions.zarr", drawn)
    once(folder / "completions.png", lambda out: decode.run(folder / "completions.zarr", out, count=SHOWN))
    once(folder / "frechet.json", measured)
    numbers = _numbers(folder / "frechet.json", FRECHET)
    floor = numbers["floor"] or {"frechet_distance": None, "n": None}
    return {
        "frechet_distance": numbers["frechet_distance"],
        "frechet_n": numbers["n_a"],
        "frechet_floor": floor["frechet_distance"],
        "frechet_floor_n": floor["n"],
        "frechet_extractor": numbers["extractor"],
    }
