"""What the numbers of a grid must be to each other, so that no store is opened for a study that cannot work."""

from __future__ import annotations

from pixseq.config import GridFile, check
from pixseq.engine.listed import inverse_strengths, listed_layers
from pixseq.errors import UsageError
from pixseq.stages.features import has_layers


def check_ranges(grid: GridFile) -> None:
    """Raises UsageError for values that no store could make work."""
    check(grid)
    if not grid.budgets:
        raise UsageError("budgets are empty", "name at least one number of FLOPs")
    if grid.batch.smallest > grid.batch.largest:
        raise UsageError(f"batch.smallest is {grid.batch.smallest}, more than batch.largest {grid.batch.largest}")
    sweep = grid.rates.sweep
    if sweep is not None and len(set(sweep)) < 3:
        raise UsageError(
            f"rates.sweep is {list(sweep)}, it must hold three different multiples or more",
            "for example [0.25, 0.5, 1.0, 2.0, 4.0]",
        )
    how = grid.completions
    if how.count == 1:
        raise UsageError("completions.count is 1, and a covariance needs two pictures", "thousands for a steady number")
    if how.layer is not None and (how.layer < 0 or not has_layers(how.extractor)):
        why = "layers count from 0" if has_layers(how.extractor) else f"{how.extractor} has no layers"
        raise UsageError(f"completions.layer is {how.layer}, and {why}", "leave it out")
    inverse_strengths("probe.c", grid.probe.c)
    probe_layers(grid)


def probe_layers(grid: GridFile) -> list[int] | None:
    """The layers that are probed, None: all. Raises UsageError for a text that names none."""
    layers = listed_layers("probe.layers", grid.probe.layers)
    if layers and layers[0] < 0:
        raise UsageError(f"probe.layers is {grid.probe.layers!r}", "layers count from 0")
    return layers
