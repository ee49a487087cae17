"""Optimizers whose states are those of torch.optim, without its base class: that imports torch's compiler, which takes
as long as a small model takes to train, only to be told not to compile an update.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]


class Optimizer(ABC):
    """Groups of weights, `params` of each, with its settings; `state` is of each weight what `step` has put there."""

    def __init__(self, groups: Iterable[Mapping[str, Any]], defaults: Mapping[str, Any]):
        self.param_groups: list[Group] = [{**group, "params": list(group["params"])} for group in groups]
        for group in self.param_groups:
            for key, value in defaults.items():
                group.setdefault(key, value)
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @abstractmethod
    def step(self, lr: float) -> None:
        """Change the weights by their gradients, at this learning rate: a schedule's, so that no group holds one."""

    def zero_grad(self) -> None:
        for p in self._weights():
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim has it: weights are their numbers. What it holds is not copied."""
        weights = self._weights()
        numbers = {p: i for i, p in enumerate(weights)}
        groups = [{**group, "params": [numbers[p] for p in group["params"]]} for group in self.param_groups]
        return {"state": {numbers[p]: self.state[p] for p in weights if p in self.state}, "param_groups": groups}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """`saved` is of these weights, of this class or of torch's."""
        for group, theirs in zip(self.param_groups, saved["param_groups"]):
            group |= {key: theirs[key] for key in group.keys() & theirs.keys() - {"params"}}
        weights = self._weights()
        for i, state in saved["state"].items():
            self.state[weights[i]] = {name: value.to(weights[i].device) for name, value in state.items()}

    def _weights(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


class AdamW(Optimizer):
    """Adam with decoupled decay (Loshchilov and Hutter 2019), in one kernel for all weights of a group."""

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ):
        super().__init__(groups, {"betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            states = [self._state(p) for p in weights]
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                weights,
                [p.grad for p in weights],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                steps,
                lr=lr,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        if p not in self.state:
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            self.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        return self.state[p]
