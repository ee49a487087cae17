"""A scaling study on disk: its plan, its stores, and what its cells have come to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixseq.artifacts import manifest
from pixseq.artifacts.fit import MEASURED_WITH, METRICS
from pixseq.artifacts.locking import in_turn
from pixseq.artifacts.manifest import Manifest, reference
from pixseq.artifacts.metrics import read_metrics
from pixseq.artifacts.owning import give_up
from pixseq.artifacts.plan import DAMAGED, Cell, read_plan, write_plan
from pixseq.bounded import forms
from pixseq.config import GridFile, StudyData, check, restored
from pixseq.errors import PixseqError, UsageError
from pixseq.interop.places import file_id, is_exported
from pixseq.studies.ranges import check_ranges

WAITING, BEGUN, DONE, DIVERGED = "waiting", "begun", "done", "diverged"
_measured = forms.maybe(forms.number)
RESULT = forms.fields(
    {"status": forms.one_of(DONE, DIVERGED)},
    {
        "reason": forms.maybe(forms.text),
        **dict.fromkeys((*METRICS, *MEASURED_WITH), _measured),
        "frechet_extractor": forms.maybe(forms.text),
    },
)
RULE = forms.fields(
    {
        "lr": forms.positive,
        "width": forms.positive,
        "exponent": forms.between(-100, 100),
        "optima": forms.several(forms.fields({})),
        "at_edge": forms.number,
    }
)
ROLE = forms.fields({"id": forms.text})


@dataclass(frozen=True)
class Result:
    """What a measured cell has come to: its metrics (see METRICS) and how a distance was measured, None where not."""

    cell: Cell
    status: str
    reason: str | None = None
    loss: float | None = None
    accuracy: float | None = None
    frechet_distance: float | None = None
    frechet_n: float | None = None
    frechet_floor: float | None = None
    frechet_floor_n: float | None = None
    frechet_extractor: str | None = None

    @property
    def metrics(self) -> dict[str, float | None]:
        return {key: getattr(self, key) for key in METRICS}

    def to_json(self) -> dict[str, Any]:
        """One flat row, with the cell's plan."""
        planned = {key: getattr(self.cell, key) for key in (*PLANNED, "seed")}
        return planned | {key: value for key, value in vars(self).items() if key != "cell"}


@dataclass
class Study:
    """A plan folder that is open. `cells` are in the order of resolution, budget and size."""

    path: Path
    manifest: Manifest
    cells: list[Cell]
    grid: GridFile

    @property
    def counting(self) -> str:
        return self.grid.flops

    @property
    def params_counted(self) -> str:
        return self.grid.params

    @property
    def reference(self) -> dict[str, str]:
        return reference(self.path, self.manifest)

    def cell(self, id: str) -> Cell:
        """Raises PixseqError for a cell that is none."""
        for cell in self.cells:
            if cell.id == id:
                return cell
        raise PixseqError(f"{self.path} has no cell {id!r}", f"cells: {self.cells[0].id} ... {self.cells[-1].id}")

    @property
    def measured(self) -> list[Cell]:
        """The cells that a study is about: all but those of a sweep of learning rates."""
        return [cell for cell in self.cells if cell.sweep is None]

    def folder(self, cell: Cell) -> Path:
        return self.path / "cells" / cell.id

    def data(self, cell: Cell) -> StudyData:
        return self.grid.data[cell.data]

    def status(self, cell: Cell) -> str:
        folder = self.folder(cell)
        if (folder / "result.json").is_file():
            return self.result(cell)["status"]
        return BEGUN if folder.exists() else WAITING

    def result(self, cell: Cell) -> dict[str, Any]:
        """What a cell has come to. Raises PixseqError where that is not readable."""
        path = self.folder(cell) / "result.json"
        numbers = read_metrics(path)[1]
        forms.require(numbers, RESULT, path, "remove it, and run the cell again: its products are kept")
        return numbers

    def results(self) -> list[Result]:
        """One a measured cell, in their order."""
        found = []
        for cell in self.measured:
            status = self.status(cell)
            numbers = self.result(cell) if status in (DONE, DIVERGED) else {}
            found.append(
                Result(cell, status, **{key: numbers.get(key) for key in ("reason", *METRICS, *MEASURED_WITH)})
            )
        return found

    def rewrite(self, cells: list[Cell]) -> None:
        """Other cells in place of those not begun; where another process was first, its cells."""
        with in_turn(self.path):
            now, theirs = read_plan(self.path)
            if now["id"] == self.manifest["id"]:
                summary = self.manifest["summary"]
                now = write_plan(self.path, self.manifest["config"], self.manifest["inputs"], cells, summary)
                theirs = cells
            self.manifest, self.cells = now, theirs

    def forget(self, cell: Cell) -> None:
        """Delete what a cell that diverged has made, so that it is made anew.

        Raises PixseqError where another process is at it, or what stands there is not pixseq's.
        """
        folder = self.folder(cell)
        give_up(folder / "model")
        (folder / "result.json").unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


EXTRACTOR = "extractor"  # its role among the inputs of a plan
PLANNED = ("id", "resolution", "budget", "n_layer", "d_model", "params", "tokens", "lr", "flops")


def open_study(path: str | Path) -> Study:
    """Raises PixseqError where `path` holds no plan."""
    record, cells = read_plan(path)
    how = record["config"].get("completions")
    if isinstance(how, dict):
        how.setdefault("images", "first")  # of plans from before there was a choice
    try:
        grid = restored(GridFile, record["config"])
        check(grid)
        check_ranges(grid)
    except UsageError as fault:  # nobody typed it
        raise PixseqError(f"{path}: {fault.message}", DAMAGED) from None
    beside = {"rates": forms.each(RULE)}
    forms.require(record["summary"], forms.fields({}, beside), f"{path}: its summary", DAMAGED)
    forms.require(record["inputs"], forms.each(ROLE), f"{path}: its inputs", DAMAGED)
    index = forms.whole(0, len(grid.data) - 1)
    for cell in cells:
        forms.require({"data": cell.data}, forms.fields({"data": index}), f"{path} has a cell {cell.id}", DAMAGED)
    return Study(Path(path), record, cells, grid)


def stores_of(data: StudyData) -> dict[str, str]:
    """Role: path of the stores that cells of this data read."""
    paths = {"train": data.train, "val": data.val, "probe_train": data.probe_train, "probe_test": data.probe_test}
    return {role: path for role, path in paths.items() if path is not None}


def check_parents(study: Study) -> None:
    """Raises PixseqError where a store or the extractor is not the one that the study was planned with."""
    paths = {f"{role} {i}": path for i, data in enumerate(study.grid.data) for role, path in stores_of(data).items()}
    if EXTRACTOR in study.manifest["inputs"]:  # plans from before it was recorded have none
        paths[EXTRACTOR] = study.grid.completions.extractor
    for role, path in paths.items():
        if role not in study.manifest["inputs"]:
            raise PixseqError(f"{study.path} does not tell the id of {path}, its {role}", DAMAGED)
        planned, now = study.manifest["inputs"][role]["id"], _id_of(path)
        if planned != now:
            raise PixseqError(
                f"{study.path} was planned on {path} of id {planned[:19]}, which now has id {now[:19]}",
                "cells on other data could not be compared: plan again, into another folder",
            )


def _id_of(path: str) -> str:
    """Of an artifact, or of a file of another program."""
    return file_id(path) if is_exported(path) else manifest.read(path)["id"]
