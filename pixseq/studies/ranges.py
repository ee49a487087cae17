"""The ranges of a grid's numbers: what no store could make work."""

from __future__ import annotations

from pixseq.config import MOST_BATCH, GridFile
from pixseq.errors import UsageError
from pixseq.stages import probe
from pixseq.stages.features import has_layers


def check_ranges(grid: GridFile) -> None:
    """Raises UsageError for values that no store could make work."""
    if not grid.budgets or not all(0 < budget < float("inf") for budget in grid.budgets):
        raise UsageError(f"budgets are {list(grid.budgets)}, they must be positive numbers of FLOPs")
    bounds = {
        "sizes_per_budget": (grid.sizes_per_budget, 2, 99),
        "size_range": (grid.size_range, 1.05, 1e6),
        "tokens_per_param": (grid.tokens_per_param, 1e-6, 1e9),
        "most_epochs": (grid.most_epochs, 1e-9, 1e9),
        "shapes.aspect_ratio": (grid.shapes.aspect_ratio, 1, 1e4),
        "shapes.min_layers": (grid.shapes.min_layers, 1, 1000),
        "shapes.patch_size": (grid.shapes.patch_size, 1, 1024),
        "shapes.head_depth": (grid.shapes.head_depth, 0, 1000),
        "seeds": (grid.seeds, 1, 1000),
        "rates.width": (grid.rates.width, 1, 1e6),
        "rates.exponent": (grid.rates.exponent, -10, 10),
        "batch.steps": (grid.batch.steps, 1, 1e9),
        "batch.smallest": (grid.batch.smallest, 1, grid.batch.largest),
        "batch.largest": (grid.batch.largest, 1, MOST_BATCH),
        "completions.count": (grid.completions.count or 0, 0, 1e9),
        "completions.temperature": (grid.completions.temperature, 0, 1e9),
        "completions.seed": (grid.completions.seed, 0, 2**63),
    }
    for key, (value, low, high) in bounds.items():
        if not low <= value <= high:
            raise UsageError(f"{key} is {value}, it must lie between {low:g} and {high:g}")
    sweep = grid.rates.sweep
    if sweep is not None and (len(set(sweep)) < 3 or not all(0 < factor < float("inf") for factor in sweep)):
        raise UsageError(
            f"rates.sweep is {list(sweep)}, it must hold three different multiples above 0 or more",
            "for example [0.25, 0.5, 1.0, 2.0, 4.0]",
        )
    how = grid.completions
    if not 0 <= how.keep < 1:
        raise UsageError(f"completions.keep is {how.keep}, it must lie in [0, 1)", "0.5 keeps the top half of the rows")
    if how.count == 1:
        raise UsageError("completions.count is 1, and a covariance needs two pictures", "thousands for a steady number")
    if how.reference_budget is not None and not 0 < how.reference_budget < float("inf"):
        raise UsageError(f"completions.reference_budget is {how.reference_budget}, not a positive number of FLOPs")
    if how.layer is not None and (how.layer < 0 or not has_layers(how.extractor)):
        why = "layers count from 0" if has_layers(how.extractor) else f"{how.extractor} has no layers"
        raise UsageError(f"completions.layer is {how.layer}, and {why}", "leave it out")
    try:
        probe.Recipe.checked("logistic", grid.probe.c, 0.1, None, 0, 1, None, {})
    except UsageError as fault:
        raise UsageError(fault.message.replace("--c", "probe.c", 1), fault.hint) from None
    probe_layers(grid)


def probe_layers(grid: GridFile) -> list[int] | None:
    """The layers that are probed, None: all. Raises UsageError for a text that names none."""
    if grid.probe.layers == "all":
        return None
    try:
        layers = [int(part) for part in grid.probe.layers.split(",")]
    except ValueError:
        layers = [-1]
    if min(layers) < 0:
        raise UsageError(f"probe.layers is {grid.probe.layers!r}, no list of layers", "all, or for example '1,2'")
    return layers
