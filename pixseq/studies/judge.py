"""What the completions of a study are judged by: real pictures, the features of one extractor, and their floor.

All cells of a resolution complete the same held-out pictures, and are compared with these pictures as they were: what
is kept of them is equal on both sides, so that little but the drawn part moves the distance. The floor is the distance
of other held-out pictures from the same ones, at the same n.

Colours do not judge: on CIFAR-10 at 16x16 (64 colours, n 2,000) lower halves drawn from one linear-Gaussian model of
the colours lie nearer to real pictures (2) than the best Image GPT's (3.4) and other real pictures (2.8). The last
layer of an Image GPT of the largest budget, averaged over the drawn positions, has the floor at 0.22, models of 1.61,
1.82 and 2.12 nats at 0.40, 0.77 and 2.2, and the Gaussian at 3.6; a reference of a tenth of that budget, and the layers
below, give the same order with less between them. At 8x8 the floor is 0.24, models of 2.05, 2.12 and 2.29 nats lie at
0.22, 0.28 and 0.65, and the Gaussian at 2.4.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from pixseq.artifacts.arrays import Store
from pixseq.artifacts.checkpoint import open_checkpoint
from pixseq.artifacts.codec import Codec
from pixseq.artifacts.locking import in_turn
from pixseq.artifacts.manifest import reference
from pixseq.artifacts.owning import discard, writing
from pixseq.artifacts.plan import Cell
from pixseq.artifacts.specs import Spec
from pixseq.artifacts.store_writer import StoreWriter
from pixseq.choices import Precision
from pixseq.config import GridFile, StudyCompletions
from pixseq.engine.image_store import open_images, seen_images
from pixseq.errors import Diverged, PixseqError, UsageError
from pixseq.models.family import SHAPES
from pixseq.stages import features, pretrain
from pixseq.streams import Stream
from pixseq.studies import ladder, rates
from pixseq.studies.study import Study
from pixseq.text import word

REFERENCE = "reference"  # in place of an extractor's path
USUAL_COUNT = 500
OTHER_SEED = 10_000  # of the reference model, above the cells' own: it is none of them


def completes(grid: GridFile) -> bool:
    """Whether cells draw completions: models of tokens do."""
    kind = SHAPES[grid.shapes.family]
    return grid.completions.count != 0 and kind.reads == "tokens"


# ---- the reference model


def reference_cell(grid: GridFile, index: int, codec: Codec, images: int) -> Cell | None:
    """The reference model of one resolution as if it were a cell, or None where completions need none."""
    how = grid.completions
    if how.extractor != REFERENCE or not completes(grid):
        return None
    budget = how.reference_budget or grid.budgets[-1]
    rungs = ladder.ladder(grid, codec)
    middle = ladder.centre(grid, rungs, budget)
    shape = min(rungs, key=lambda rung: abs(np.log(ladder.size(grid, rung) / middle)))
    one_step = shape.flops_per_token(grid.flops) * shape.n_ctx * grid.batch.smallest
    if budget < one_step:
        raise UsageError(
            f"completions.reference_budget is {budget:.3g} FLOPs, below one step of the smallest model {one_step:.3g}",
            "raise it, or leave it out for the largest budget",
        )
    resolution, _, _ = codec.grid
    name = f"{REFERENCE}-r{resolution}"
    return ladder.cell_of(grid, shape, budget, images, id=name, resolution=resolution, data=index, seed=OTHER_SEED)


def references(study: Study) -> list[Cell]:
    """The reference models of a study, one a resolution; none where its completions need none.

    Their learning rates are those of their resolution's rule, where a sweep has given one.
    """
    found = []
    for index, data in enumerate(study.grid.data):
        train = open_images(data.train, SHAPES[study.grid.shapes.family].reads)
        found.append(reference_cell(study.grid, index, train.codec, len(train)))
    return [rates.ruled(study, cell) for cell in found if cell is not None]


def is_ready(study: Study, cell: Cell) -> bool:
    """Whether a reference is made."""
    return (folder_of(study, cell) / "model").exists()


def folder_of(study: Study, cell: Cell) -> Path:
    return study.path / REFERENCE / f"r{cell.resolution}"


# ---- what the cells of one resolution share


class OnMachine(TypedDict):
    """Where a stage computes."""

    device: str
    precision: Precision


@dataclass(frozen=True)
class Judge:
    """Paths of what the cells of one resolution share."""

    extractor: str | Path
    layer: int | None
    below: float | None  # features are averaged below this part of the rows
    prompts: Path  # pictures to complete
    real: Path  # their features
    floor: Path | None  # features of as many others; None: there are none

    def features(self, store: Path, out: Path, where: OnMachine) -> None:
        layers = "all" if self.layer is None else str(self.layer)
        features.run(self.extractor, store, out, layers, below=self.below, resume=True, overwrite=True, **where)


def ready(study: Study, cell: Cell, where: OnMachine) -> Judge:
    """What judges a cell, below PLAN/reference, made where it is not there; a process that makes it is waited for.

    Raises PixseqError where the reference model diverges.
    """
    grid, folder = study.grid, folder_of(study, cell)
    how, val = grid.completions, open_images(grid.data[cell.data].val, "tokens")
    folder.mkdir(parents=True, exist_ok=True)
    with in_turn(folder):
        extractor: str | Path = how.extractor
        if how.extractor == REFERENCE:
            extractor = once(folder / "model", lambda out: _train(study, cell, out, where))
        sides = {name: rows for name, rows in rows_of_sides(how, val).items() if len(rows) > 1}
        judge = Judge(
            extractor,
            layer_of(how, extractor),
            how.keep if features.has_layers(extractor) else None,
            folder / "prompts.zarr",
            folder / "prompts.features.zarr",
            folder / "others.features.zarr" if "others" in sides else None,
        )
        for name, rows in sides.items():
            store = once(folder / f"{name}.zarr", functools.partial(_copy, val, rows))
            once(folder / f"{name}.features.zarr", functools.partial(judge.features, store, where=where))
    return judge


def forget(plan: str | Path) -> None:
    """Remove what was made for a plan that is replaced: another grid has other references.

    Raises PixseqError where something there is not pixseq's.
    """
    products = ["model", *(f"{side}.{what}" for side in ("prompts", "others") for what in ("zarr", "features.zarr"))]
    every = Path(plan) / REFERENCE
    for folder in every.glob("r*"):
        for name in products:
            discard(folder / name)
    for folder in (*every.glob("r*"), every):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def once(path: Path, make: Callable[[Path], Any]) -> Path:
    """`path`, made if it is not there."""
    if not path.exists():
        make(path)
    return path


def _train(study: Study, cell: Cell, out: Path, where: OnMachine) -> None:
    planned = next(each for each in references(study) if each.resolution == cell.resolution)
    if rates.waits(study, planned):
        raise PixseqError(
            f"{planned.id}: its learning rate waits for the sweep at r{planned.resolution}",
            f"run the sweep first: pixseq scaling run {word(study.path)}",
        )
    try:
        pretrain.run(
            study.data(cell).train, out, ladder.recipe_of(study.grid, planned), resume=True, overwrite=True, **where
        )
    except Diverged as fault:  # no fault of the cell that waits for it
        raise PixseqError(
            f"the reference model of completions: {fault.message}",
            "plan with a lower train.lr, or give completions.extractor a checkpoint",
        ) from None


def layer_of(how: StudyCompletions, extractor: str | Path) -> int | None:
    """The layer that is compared: the grid's, else the reference's last or the middle; None where there are none."""
    if not features.has_layers(extractor):
        return None
    if how.layer is not None:
        return how.layer
    layers = open_checkpoint(extractor).shape["n_layer"]
    return layers if how.extractor == REFERENCE else max(layers // 2, 1)


def rows_of_sides(how: StudyCompletions, val: Store) -> dict[str, np.ndarray]:
    """The rows of `val` that are completed, and as many others, or what is left.

    A random choice of completions.seed, in which every class has its share wherever labels are known.
    """
    order = np.arange(len(val))
    if how.images == "spread":
        order = np.random.default_rng([how.seed, 0, Stream.STUDY_PICTURES]).permutation(len(val))
        labels = val.labels()
        if labels is not None:
            share = np.empty(len(val))  # how much of its class stands before an image
            for label in np.unique(labels):
                places = np.flatnonzero(labels[order] == label)
                share[places] = (np.arange(len(places)) + 0.5) / len(places)
            order = order[np.argsort(share, kind="stable")]
    count = USUAL_COUNT if how.count is None else how.count
    prompts, others = order[:count], order[count : 2 * count]
    return {"prompts": np.sort(prompts), "others": np.sort(others)}


def _copy(store: Store, rows: np.ndarray, out: Path) -> None:
    """Some rows of a store as a store of its own, which names its parent and says which they are."""
    images = seen_images(store, slice(None))[rows]
    arrays, labels = {store.kind: images}, store.labels()
    if labels is not None:
        arrays["labels"] = labels[rows]
    if (shown := store.images()) is not None:
        arrays["images"] = shown[rows]
    specs = {name: Spec(str(array.dtype), (None, *array.shape[1:])) for name, array in arrays.items()}
    with writing(out, command="scaling run") as partial:
        writer = StoreWriter(partial, specs, {}, chunk_rows=1024)
        writer.append(arrays, {})
        writer.finish(
            store.kind,
            "scaling run",
            {"rows": rows.tolist()},
            {store.kind: reference(store.path, store.manifest)},
            {"rows": len(rows)},
            store.meta,
        )
