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
from pixseq.artifacts.manifest import reference
from pixseq.artifacts.metrics import read_metrics, write_metrics
from pixseq.artifacts.plan import Cell
from pixseq.errors import Diverged, PixseqError
from pixseq.models.family import shape_from
from pixseq.stages import decode, evaluate, features, frechet, pretrain, probe, sample
from pixseq.stages.scaling import ladder
from pixseq.stages.scaling.study import DIVERGED, DONE, Study, check_parents

SHOWN = 32  # completions in the picture


def run(study: Study, cell: Cell, device: str = "auto", precision: str = "auto") -> Mapping[str, Any]:
    """The cell's result, written as result.json.

    Raises PixseqError where its stores are no longer those that it was planned with.
    """
    check_parents(study)
    folder, data = study.folder(cell), study.data(cell)
    if (folder / "result.json").is_file():
        return read_metrics(folder / "result.json")[1]
    folder.mkdir(parents=True, exist_ok=True)
    where = {"device": device, "precision": precision}
    numbers: dict[str, Any] = {"status": DONE, "reason": None}
    try:
        _once(folder / "model", lambda out: _train(study, cell, out, where))
        numbers |= _loss(folder, data.val, where)
        numbers |= _accuracy(study, folder, cell, where)
        numbers |= _completions(study, folder, data.val, where)
    except Diverged as fault:
        numbers = {"status": DIVERGED, "reason": fault.message}
    inputs = {"plan": study.reference}
    if numbers["status"] == DONE:
        made = open_checkpoint(folder / "model").manifest
        inputs["model"] = reference(folder / "model", made)
        numbers |= {"precision": made["config"]["precision"], "device": made["summary"]["device"]}
    write_metrics(folder / "result.json", "scaling run", cell, inputs, numbers, overwrite=True)
    return numbers


def _once(path: Path, make: Callable[[Path], Any]) -> Path:
    """`path`, made if it is not there."""
    if not path.exists():
        make(path)
    return path


def _train(study: Study, cell: Cell, out: Path, where: Mapping[str, str]) -> None:
    config = ladder.recipe(study.grid, cell["d_model"], cell["steps"], cell["batch_size"], cell["lr"])
    pretrain.run(study.data(cell).train, out, config, resume=True, overwrite=True, **where)


def _loss(folder: Path, val: str, where: Mapping[str, str]) -> dict[str, Any]:
    """The held-out loss in the first unit that its family reports, in float32 unless bf16 was asked for."""
    exact = {**where, "precision": "fp32" if where["precision"] == "auto" else where["precision"]}
    _once(folder / "loss.json", lambda out: evaluate.run(folder / "model", val, out, **exact))
    numbers = read_metrics(folder / "loss.json")[1]
    shape = shape_from(open_checkpoint(folder / "model").shape)
    unit = next(iter(shape.report(0.0, open_checkpoint(folder / "model").codec)))
    return {"loss": numbers[unit], "loss_unit": unit}


def _accuracy(study: Study, folder: Path, cell: Cell, where: Mapping[str, str]) -> dict[str, Any]:
    """Test accuracy of the linear probe at the layer that validation chose; None without labels."""
    data = study.data(cell)
    train, test = data.probe_train or data.train, data.probe_test or data.val
    if any(open_store(path, "tokens", "pixels").labels() is None for path in (train, test)):
        return {"accuracy": None}

    def swept(store: str) -> Callable[[Path], Any]:
        return lambda out: features.run(folder / "model", store, out, resume=True, overwrite=True, **where)

    def probed(out: Path) -> None:
        fit = _once(folder / "train.features.zarr", swept(train))
        held = _once(folder / "test.features.zarr", swept(test))
        probe.run(fit, held, out, layers=study.grid.probe.layers, c=study.grid.probe.c)

    _once(folder / "probe.json", probed)
    numbers = read_metrics(folder / "probe.json")[1]
    return {"accuracy": numbers["test_accuracy"], "best_layer": numbers["best_layer"]}


def _completions(study: Study, folder: Path, val: str, where: Mapping[str, str]) -> dict[str, Any]:
    """Fréchet distance of completed pictures from the real ones of the same prompts; None where none are drawn."""
    how = study.grid.completions
    if not how.count or not shape_from(open_checkpoint(folder / "model").shape).draws:
        return {"frechet_distance": None}

    def drawn(out: Path) -> None:
        options = {"count": how.count, "prompt": val, "keep": how.keep, "temperature": how.temperature}
        sample.run(folder / "model", None, tokens_out=out, seed=how.seed, overwrite=True, **options, **where)

    def measured(out: Path) -> None:
        sides = {"completions": folder / "completions.zarr", "real": Path(val)}
        layer = None if how.extractor == features.PIXELS else how.layer or _middle(how.extractor)
        for name, store in sides.items():
            layers = "all" if layer is None else str(layer)
            _once(
                folder / f"{name}.features.zarr",
                lambda out, store=store, layers=layers: features.run(
                    how.extractor, store, out, layers=layers, resume=True, overwrite=True, **where
                ),
            )
        frechet.run(*(folder / f"{name}.features.zarr" for name in sides), out, layer=layer, count=how.count)

    _once(folder / "completions.zarr", drawn)
    _once(folder / "completions.png", lambda out: decode.run(folder / "completions.zarr", out, count=SHOWN))
    _once(folder / "frechet.json", measured)
    numbers = read_metrics(folder / "frechet.json")[1]
    return {"frechet_distance": numbers["frechet_distance"], "frechet_n": numbers["n_a"]}


def _middle(extractor: str) -> int:
    checkpoint = open_checkpoint(extractor)
    if checkpoint.shape["n_layer"] < 2:
        raise PixseqError(f"{extractor} has one layer", "name one: completions.layer")
    return checkpoint.shape["n_layer"] // 2
