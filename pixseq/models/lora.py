"""Low-rank adaptation (Hu et al. 2021): matrices of the blocks stay, and each learns an update of rank r beside them.

What is adapted goes by the names that the field gives a block's matrices: q, k, v and o, of attention's queries, keys,
values and output, and fc and proj, the MLP's two. q, k and v stand in one matrix here, each in a third of its rows, and
have an update each. Attention's four are adapted by default, as in AIM §5.5.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixseq.models.family import Model


class Place(NamedTuple):
    """Where a matrix stands in a block: `module` holds `parts` matrices of as many rows, and it is number `part`."""

    module: str
    part: int = 0
    parts: int = 1


PLACES = {
    "q": Place("attn.qkv", 0, 3),
    "k": Place("attn.qkv", 1, 3),
    "v": Place("attn.qkv", 2, 3),
    "o": Place("attn.proj"),
    "fc": Place("mlp.fc"),
    "proj": Place("mlp.proj"),
}
A, B = ".lora_a.", ".lora_b."


class LowRank(nn.Linear):
    """W x + alpha / r * B A x in the rows of each target, with W frozen, A [r, in] random and B [out, r] zero at first.

    So nothing changes yet. W may have a bias, which is frozen too.
    """

    def __init__(self, linear: nn.Linear, targets: Iterable[str], rank: int, alpha: float, generator: torch.Generator):
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        self.lora_a, self.lora_b = nn.ParameterDict(), nn.ParameterDict()
        for name in targets:
            self.parts = PLACES[name].parts
            first = torch.randn(rank, self.in_features, generator=generator) / self.in_features**0.5
            self.lora_a[name] = nn.Parameter(first)
            self.lora_b[name] = nn.Parameter(torch.zeros(self.out_features // self.parts, rank))

    def forward(self, x: Tensor) -> Tensor:
        rows = list(super().forward(x).chunk(self.parts, dim=-1))
        for name, a in self.lora_a.items():
            part = PLACES[name].part
            rows[part] = rows[part] + self.scale * F.linear(F.linear(x, a), self.lora_b[name])
        return torch.cat(rows, dim=-1)


def targets_of(text: str) -> list[str]:
    """ "q,k,v,o" -> the names in it, in the order of PLACES. Raises ValueError for one that is none."""
    named = {name.strip() for name in text.split(",")}
    if not named or named - PLACES.keys():
        raise ValueError(f"{text!r} names no matrices of a block")
    return [name for name in PLACES if name in named]


def add_low_rank(model: Model, targets: Collection[str], rank: int, alpha: float, generator: torch.Generator) -> None:
    """Freeze all but a class head, and give the `targets` of every block an update of `rank`."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier."))
    for block in model.blocks:
        for module in dict.fromkeys(place.module for place in PLACES.values()):
            here = [name for name in targets if PLACES[name].module == module]
            if here:
                linear = block.get_submodule(module)
                block.set_submodule(module, LowRank(cast(nn.Linear, linear), here, rank, alpha, generator))


def merged(weights: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The tensors of the plain model: every update added to its rows."""
    plain = {name: x for name, x in weights.items() if A not in name and B not in name}
    for key, a in weights.items():
        module, found, name = key.partition(A)
        if not found:
            continue
        rows = [*plain[f"{module}.weight"].chunk(PLACES[name].parts)]
        rows[PLACES[name].part] = rows[PLACES[name].part] + alpha / len(a) * weights[f"{module}{B}{name}"] @ a
        plain[f"{module}.weight"] = torch.cat(rows)
    return plain


def low_rank_count(model: Model) -> int:
    """The parameters of the updates alone."""
    return sum(p.numel() for name, p in model.named_parameters() if A in name or B in name)


def trainable_share(model: Model) -> float:
    """Parameters that are trained, as a part of all."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in counts if trained) / sum(n for n, _ in counts)
