"""Image GPT's blocks where no gradient is needed, on a CPU: the same numbers from fewer passes over memory.

What multiplies the input of a matrix is multiplied into it (the gains of norms, the 1.702 of quick-gelu, which is
silu(1.702 x) / 1.702), products are added to the residual stream as they are made, and an MLP takes so many rows at a
time as stay in the caches. Shapes: B images, T positions, D width, N = B * T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixseq.models import gradients

if TYPE_CHECKING:
    from pixseq.models.igpt import Block  # which imports this module

EPS, SLOPE = 1e-5, 1.702  # of RMSNorm, of quick-gelu
# Of an MLP's inner activations at once. Rows come in multiples of ROWS, so that the tiles of a matrix product, hence
# the order of its sums, are those of all rows at once.
NUMBERS, ROWS, LEAST_ROWS = 1 << 20, 64, 256


def applies(blocks: Sequence[Block], h: Tensor) -> bool:
    """Whether `run` takes these blocks: plain ones (a low-rank update is none), and nothing is learnt or compiled."""
    if torch.is_grad_enabled() or h.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return are_plain(blocks)


def are_plain(blocks: Sequence[Block]) -> bool:
    """Without low-rank updates."""
    return all(type(m) is nn.Linear for b in blocks for m in (b.attn.qkv, b.attn.proj, b.mlp.fc, b.mlp.proj))


def run(blocks: Sequence[Block], h: Tensor, keep: Callable[[Tensor, Tensor], None]) -> Tensor:
    """h^0 [B, T, D], which is overwritten -> h^L. Of each block `keep` gets its input without the gain, and the gain.

    Computes as autocast says.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else h.dtype
    stream = h.flatten(0, 1)
    with torch.autocast("cpu", enabled=False):
        for block in blocks:
            attn, mlp = block.attn, block.mlp
            n = normed(stream)
            keep(n.view_as(h), block.ln_1.weight)
            qkv = F.linear(n.to(dtype), (attn.qkv.weight * block.ln_1.weight).to(dtype))
            y = attn.attend(qkv.unflatten(0, h.shape[:2])).flatten(0, 1)
            add_product(stream, y, attn.proj.weight.to(dtype))
            fc, proj = (mlp.fc.weight * (SLOPE * block.ln_2.weight)).to(dtype), mlp.proj.weight.to(dtype)
            for part in stream.split(max(NUMBERS // len(fc) // ROWS * ROWS, LEAST_ROWS)):
                add_product(part, F.silu(F.linear(normed(part).to(dtype), fc), inplace=True), proj, 1 / SLOPE)
    return stream.view_as(h)


def normed(h: Tensor) -> Tensor:
    """h / sqrt(mean(h^2) + eps), [N, D]."""
    return gradients.normed(h, h.dtype, EPS)[0]


def add_product(h: Tensor, x: Tensor, weight: Tensor, scale: float = 1.0) -> None:
    """h += scale * x W^T, [N, D] from [N, in] and [D, in]."""
    if x.dtype == h.dtype:
        h.addmm_(x, weight.T, alpha=scale)
    else:
        h.add_(F.linear(x, weight), alpha=scale)
