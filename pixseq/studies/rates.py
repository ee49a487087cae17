"""Learning rates of a study swept at its smallest budget, and the rule that the other cells take from it.

Every size of the smallest budget is trained with the rate of the grid's rule times each factor of `rates.sweep`; the
best rate of a width is the lowest point of a parabola of the loss in log rate. The rule lr = a * (d_model / width) **
-exponent is the line through these in log width, as scaling studies fit it (Kaplan et al. 2020, appendix D.6).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pixseq.artifacts.plan import Cell
from pixseq.config import GridFile
from pixseq.errors import PixseqError
from pixseq.numerics.isoflop import parabola
from pixseq.studies.study import DIVERGED, DONE, Study

EXPONENTS = (0.0, 1.5)  # a noisy sweep over few widths must not send the rates of wider models away
LEAST_RATES = 3  # of one width, for a parabola


@dataclass(frozen=True)
class RateRule:
    """lr at `width`, and the `exponent` with which it falls. It rests on `optima`, the best rate of each width;
    `at_edge` of them lie at an end of the sweep.
    """

    lr: float
    width: int
    exponent: float
    optima: list[dict[str, Any]]
    at_edge: int

    def at(self, d_model: int) -> float:
        """The rate of a width."""
        return rounded(self.lr * (d_model / self.width) ** -self.exponent)


def sweep_cells(cells: Sequence[Cell], grid: GridFile) -> list[Cell]:
    """The cells of a sweep beside the planned `cells` of one resolution: those of its smallest budget, first seed."""
    smallest = [cell for cell in cells if cell.budget == grid.budgets[0] and not cell.seed]
    return [
        replace(cell, id=f"{cell.id}-f{i}", sweep=factor, lr=rounded(cell.lr * factor))
        for cell in smallest
        for i, factor in enumerate(grid.rates.sweep or ())
    ]


def waits(study: Study, cell: Cell) -> bool:
    """Whether the rate of a cell is not known before the sweep of its resolution has ended."""
    return cell.sweep is None and waits_for_sweep(study, cell.resolution)


def waits_for_sweep(study: Study, resolution: int) -> bool:
    return bool(study.grid.rates.sweep) and rule_of(study, resolution) is None


def rule_of(study: Study, resolution: int) -> RateRule | None:
    """The rule that was fitted at a resolution; None before that."""
    found = study.manifest["summary"].get("rates", {}).get(str(resolution))
    return found and RateRule(**{key: found[key] for key in RateRule.__dataclass_fields__})


def sweep_of(study: Study, resolution: int) -> list[Cell]:
    return [cell for cell in study.cells if cell.resolution == resolution and cell.sweep is not None]


def settle(study: Study, resolution: int) -> RateRule | None:
    """Fit the rule of a resolution once its sweep has ended, and give it to the cells not begun; returns a new rule.

    Raises PixseqError where no width has enough runs that did not diverge.
    """
    sweep = sweep_of(study, resolution)
    if not sweep or rule_of(study, resolution) is not None:
        return None
    if any(study.status(cell) not in (DONE, DIVERGED) for cell in sweep):
        return None
    rule = fit_rule(study.grid, [(cell, _loss(study, cell)) for cell in sweep])
    summary = dict(study.manifest["summary"])
    summary["rates"] = {**summary.get("rates", {}), str(resolution): asdict(rule)}
    study.manifest["summary"] = summary
    study.rewrite([ruled(study, cell) for cell in study.cells])
    return rule


def ruled(study: Study, cell: Cell) -> Cell:
    """A cell with the rate of its resolution's rule, where there is one and it has not begun."""
    rule = rule_of(study, cell.resolution)
    if rule is None or cell.sweep is not None or study.folder(cell).exists():
        return cell
    return replace(cell, lr=rule.at(cell.d_model))


def fit_rule(grid: GridFile, runs: Sequence[tuple[Cell, float | None]]) -> RateRule:
    """The rule of swept cells and their losses, None where a run diverged."""
    optima = []
    for width in sorted({cell.d_model for cell, _ in runs}):
        found = [(cell.lr, loss) for cell, loss in runs if cell.d_model == width and loss is not None]
        if len(found) >= LEAST_RATES:
            rate, inside = _best(*np.array(found).T)
            optima.append({"d_model": width, "lr": rounded(rate), "inside": inside})
    if not optima:
        raise PixseqError(
            f"a sweep of learning rates has no width with {LEAST_RATES} runs that did not diverge",
            "plan with a lower train.lr, or other rates.sweep",
        )
    width, exponent = grid.rates.width, grid.rates.exponent
    x = np.log([each["d_model"] / width for each in optima])
    y = np.log([each["lr"] for each in optima])
    if len(optima) > 1:
        exponent = float(np.clip(-np.polyfit(x, y, 1)[0], *EXPONENTS))
    return RateRule(
        lr=rounded(math.exp(float(np.mean(y + exponent * x)))),
        width=width,
        exponent=round(exponent, 4),
        optima=optima,
        at_edge=sum(not each["inside"] for each in optima),
    )


def in_words(resolution: int, rule: RateRule) -> str:
    """A rule in words."""
    widen = (
        f"; the best rate is an end of the sweep at {rule.at_edge} widths: widen rates.sweep" if rule.at_edge else ""
    )
    name = f"lr = {rule.lr:g} (d_model / {rule.width}) ^ -{rule.exponent:g}"
    return f"r{resolution}: {name}, from a sweep over {len(rule.optima)} widths{widen}"


def _best(rates: np.ndarray, losses: np.ndarray) -> tuple[float, bool]:
    """The rate of the lowest loss, kept between those that were tried, and whether it lies inside them."""
    order = np.argsort(rates)
    x, y = np.log(rates[order]), losses[order]
    lowest = int(y.argmin())
    near = slice(max(lowest - 2, 0), lowest + 3)  # rates far off, close to divergence, lie on no parabola
    found = parabola(x[near], y[near])
    best = found.vertex if found.curvature > 0 else x[lowest]
    return float(np.exp(np.clip(best, x.min(), x.max()))), bool(x.min() < best < x.max())


def _loss(study: Study, cell: Cell) -> float | None:
    return study.result(cell).get("loss")


def rounded(rate: float) -> float:
    return float(f"{rate:.4g}")
