"""Low-rank adaptation: the blocks' matrices stay, and each learns an update of rank r beside them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PARTS = ("lora_a", "lora_b")


class LowRank(nn.Linear):
    """W x + B A x, with W frozen, A [r, in] random and B [out, r] zero at first, so that nothing changes yet.

    Both updates' scale is 1: the learning rate sets it. W may have a bias, which is frozen too.
    """

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator):
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_a = nn.Parameter(torch.randn(rank, self.in_features, generator=generator) / self.in_features**0.5)
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_low_rank(model: nn.Module, rank: int, generator: torch.Generator) -> None:
    """Freeze all but a class head, and give every matrix of the blocks an update of `rank`."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier."))
    for block in model.blocks:
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, name, LowRank(child, rank, generator))


def merged(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the plain model: every update added to its matrix."""
    plain = {name: x for name, x in weights.items() if name.rpartition(".")[2] not in PARTS}
    for name, a in weights.items():
        head, _, part = name.rpartition(".")
        if part == PARTS[0]:
            plain[f"{head}.weight"] = plain[f"{head}.weight"] + weights[f"{head}.{PARTS[1]}"] @ a
    return plain


def trainable_share(model: nn.Module) -> float:
    """Parameters that are trained, as a part of all."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in counts if trained) / sum(n for n, _ in counts)
