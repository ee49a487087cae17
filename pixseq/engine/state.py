"""What changes during a run, saved and restored whole: weights, their average, optimizers, step, best validation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from pixseq.artifacts.checkpoint import BEGIN_ANEW
from pixseq.config import TrainConfig
from pixseq.errors import PixseqError
from pixseq.models.family import Model
from pixseq.models.muon import Muon
from pixseq.models.optimizer import AdamW, Optimizer


class TrainState:
    """A training run between two of its steps. `validated`: whether what follows an update is done too, the validation
    of that step and what is kept of it; a run that is stopped before goes on with that.
    """

    def __init__(self, model: Model, config: TrainConfig, state: dict[str, Any] | None):
        self.model, self.config = model, config
        self.optimizers = make_optimizers(model, config)
        self.averaged = _averaged(model, config.ema)
        self.step, self.validated, self.since_best = 0, True, 0
        self.best: dict[str, float] | None = None
        self.planned = config.steps  # when it began: a run that is extended warms up as long as it was to at first
        self.seconds_before, self.began = 0.0, time.monotonic()
        if state is not None:
            self._restore(state)

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            self._check(state)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else error
            raise PixseqError(f"the saved state does not fit the run: {why}", BEGIN_ANEW) from None
        self.model.load_state_dict(state.pop("model"))  # pop: a second copy of everything would stay in memory
        for optimizer, saved in zip(self.optimizers, state.pop("optimizers")):
            optimizer.load_state_dict(saved)
        if self.averaged is not None:
            self.averaged.load_state_dict(state.pop("ema"))
        self.step, self.best, self.since_best = state["step"], state["best"], state["since_best"]
        self.validated = state.get("settled", True)  # before it was saved, only such states were
        self.planned = state.get("planned", self.planned)
        self.seconds_before = state["seconds"]

    def _check(self, state: dict[str, Any]) -> None:
        """Raises ValueError, or what comes of other types, where a state is not one of this run."""
        check_tensors("model", self.model.state_dict(), state["model"])
        if (state["ema"] is None) != (self.averaged is None):
            raise ValueError(f"it has {'no ' if state['ema'] is None else ''}averaged weights")
        if self.averaged is not None:
            check_tensors("ema", self.averaged.state_dict(), state["ema"])
        if len(state["optimizers"]) != len(self.optimizers):
            raise ValueError(f"it has {len(state['optimizers'])} optimizers, the run {len(self.optimizers)}")
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            check_optimizer(optimizer, saved)
        counts = {"step": state["step"], "since_best": state["since_best"], "plan": state.get("planned", 0)}
        best, seconds = state["best"], state["seconds"]
        if best is not None:
            counts["best step"] = best["step"]
            if not all(isinstance(value, int | float) for value in best.values()) or "score" not in best:
                raise ValueError("its best record holds more than numbers")
        for name, count in counts.items():
            if type(count) is not int or not 0 <= count <= self.config.steps:
                raise ValueError(f"its {name} is {count!r}, of {self.config.steps} steps")
        if not isinstance(seconds, int | float) or not 0 <= seconds < float("inf"):
            raise ValueError(f"it took {seconds!r} seconds")
        if not isinstance(state.get("settled", True), bool):
            raise ValueError(f"its settled is {state['settled']!r}")

    def seconds(self) -> float:
        """Training time, interruptions left out."""
        return self.seconds_before + time.monotonic() - self.began

    def snapshot(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ema": self.averaged.state_dict() if self.averaged is not None else None,
            "step": self.step,
            "settled": self.validated,
            "planned": self.planned,
            "best": self.best,
            "since_best": self.since_best,
            "seconds": self.seconds(),
        }

    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.model.parameters())

    def update(self, rate: float) -> None:
        """One optimizer step at learning rate `rate` from the gradients at hand."""
        for optimizer in self.optimizers:
            optimizer.step(rate)
            optimizer.zero_grad()
        if self.averaged is not None:
            average(self.averaged, cast(nn.Module, self.model), self.config.ema, first=self.step == 0)
        self.step, self.validated = self.step + 1, False

    def measure(self, validate: Callable[[Model], dict[str, float]]) -> dict[str, float]:
        """A validation row, of the averaged weights too."""
        row = validate(self.model)
        if self.averaged is not None:
            row |= {f"ema_{key}": value for key, value in validate(cast(Model, self.averaged.module)).items()}
        return row

    def update_best(self, row: dict[str, float], score: Callable[[dict[str, float]], float]) -> bool:
        """Whether a validation row of this step is the best so far."""
        value = score(row)
        better = self.best is None or value > self.best["score"]
        if better:
            self.best = {"score": value, "step": self.step, **row}
        self.since_best = 0 if better else self.since_best + 1
        return better


def check_tensors(what: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Any]) -> None:
    """Raises ValueError unless both have the same names, each of the same shape and type."""
    for name in sorted({*ours, *theirs}, key=str):
        a, b = (_shown(found.get(name)) for found in (ours, theirs))
        if a != b:
            raise ValueError(f"{what} {name} is {b}, the run's is {a}")


def _shown(x: Any) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else "missing" if x is None else type(x).__name__


def check_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Raises ValueError unless a saved state is of these parameters and of these settings."""
    now = optimizer.state_dict()
    if len(saved["param_groups"]) != len(now["param_groups"]):
        raise ValueError("its optimizer has other groups of weights")
    for ours, theirs in zip(now["param_groups"], saved["param_groups"]):
        for key in ours.keys() & theirs.keys() | {"params"}:
            if ours[key] != theirs[key]:
                raise ValueError(f"its optimizer has another {key}")
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in saved["state"].items():
        if type(index) is not int or not 0 <= index < len(weights):
            raise ValueError(f"its optimizer has a state of weight {index!r}, of {len(weights)}")
        for name, x in values.items():
            if not isinstance(x, Tensor) or (x.ndim and x.shape != weights[index].shape):
                raise ValueError(f"{name} of weight {index} is {_shown(x)}, the weight {list(weights[index].shape)}")


def make_optimizers(model: Model, config: TrainConfig) -> list[Optimizer]:
    """Adam with decoupled decay; with optimizer "muon", Muon on the blocks' matrices instead.

    Neither holds a learning rate, which comes with each step: see TrainState.update. decay "matrices" spares what has
    one axis: biases and the gains of norms.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {}
    if config.optimizer == "muon":
        matrices = {name: p for name, p in parameters.items() if name.startswith("blocks.") and p.ndim == 2}
    rest = [p for name, p in parameters.items() if name not in matrices]
    spared = [p for p in rest if config.decay == "matrices" and p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": [p for p in rest if not any(p is s for s in spared)]}]
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    made: list[Optimizer] = [
        AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=config.weight_decay)
    ]
    if matrices:
        made.append(Muon(matrices.values(), weight_decay=config.weight_decay))
    return made


def averaged_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The plain names of an AveragedModel's state."""
    return {key.removeprefix("module."): value for key, value in state.items() if key.startswith("module.")}


@torch.no_grad()
def average(averaged: torch.optim.swa_utils.AveragedModel, model: nn.Module, decay: float, first: bool) -> None:
    """What AveragedModel.update_parameters does, which asks the device at each step whether it is the first."""
    ours: list[Tensor] = list(averaged.module.parameters())
    theirs: list[Tensor] = list(model.parameters())
    if first:
        torch._foreach_copy_(ours, theirs)
    else:
        torch._foreach_lerp_(ours, theirs, 1 - decay)
    for mine, now in zip(averaged.module.buffers(), model.buffers(), strict=True):
        mine.copy_(now)
    averaged.n_averaged += 1


def _averaged(model: Model, decay: float) -> torch.optim.swa_utils.AveragedModel | None:
    if not decay:
        return None
    from torch.optim.swa_utils import AveragedModel

    return AveragedModel(cast(nn.Module, model))
