"""Image GPT's blocks where they are learnt, on a CPU: each branch off the residual stream has a backward of its own,
which takes few passes over memory and needs little kept.

As in inference.py, what multiplies the input of a matrix is multiplied into it: the gain of the norm, the 1.702 of
quick-gelu. Nothing is kept of the stream itself: its norm's backward needs but what came out of it.
Shapes: B images, T positions, D width, N = B * T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pixseq.models.attention import attended, attended_backward
from pixseq.models.gradients import normed, normed_backward, takes_own_gradient
from pixseq.models.inference import NORM_EPS, SLOPE, are_plain

if TYPE_CHECKING:
    from pixseq.models.igpt import Block  # which imports this module


def applies(blocks: Sequence[Block], h: Tensor) -> bool:
    """Whether `run` takes these blocks: plain ones of which all is learnt."""
    return takes_own_gradient(h) and are_plain(blocks) and all(p.requires_grad for b in blocks for p in b.parameters())


def run(blocks: Sequence[Block], h: Tensor) -> Tensor:
    """h^0 [B, T, D] -> h^L. Computes as autocast says."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else h.dtype
    with torch.autocast("cpu", enabled=False):
        for block in blocks:
            attn, mlp = block.attn, block.mlp
            weights = block.ln_1.weight, attn.qkv.weight, attn.proj.weight
            h = AttentionBranch.apply(h, *weights, attn.n_head, attn.causal, dtype)
            h = MLPBranch.apply(h, block.ln_2.weight, mlp.fc.weight, mlp.proj.weight, dtype)
    return h


class AttentionBranch(torch.autograd.Function):
    """h [B, T, D], gain [D], qkv [3 D, D], proj [D, D] -> h + proj(attention(qkv(norm(h) * gain)))."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, gain: Tensor, qkv: Tensor, proj: Tensor, n_head: int, causal: bool, dtype: torch.dtype
    ) -> Tensor:
        n, scale = normed(h, dtype, NORM_EPS)
        x = F.linear(n, (qkv * gain).to(dtype))
        y, logsumexp = attended(x, n_head, causal)
        ctx.save_for_backward(gain, qkv, proj, n, scale, x, y, logsumexp)
        ctx.n_head, ctx.causal = n_head, causal
        return plus_product(h, y, proj.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        gain, qkv, proj, n, scale, x, y, logsumexp = ctx.saved_tensors
        dout = dh.to(y.dtype)
        dproj = rows(dout).T @ rows(y)
        dx = attended_backward(dout @ proj.to(y.dtype), x, y, logsumexp, ctx.n_head, ctx.causal)
        return *folded_backward(dh, dx, n, scale, qkv, gain), dproj.to(proj.dtype), None, None, None


class MLPBranch(torch.autograd.Function):
    """h [B, T, D], gain [D], fc [4 D, D], proj [D, 4 D] -> h + proj(quick_gelu(fc(norm(h) * gain)))."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, gain: Tensor, fc: Tensor, proj: Tensor, dtype: torch.dtype) -> Tensor:
        n, scale = normed(h, dtype, NORM_EPS)
        x = F.linear(n, (fc * (SLOPE * gain)).to(dtype))
        ctx.save_for_backward(gain, fc, proj, n, scale, x)
        return plus_product(h, F.silu(x), proj.to(dtype), 1 / SLOPE)  # quick-gelu is silu(1.702 x) / 1.702

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        gain, fc, proj, n, scale, x = ctx.saved_tensors
        dout = (dh / SLOPE).to(x.dtype)
        dproj = rows(dout).T @ rows(F.silu(x))  # a pass over x costs less time than the memory to keep it so long
        dx = dout @ proj.to(x.dtype)
        torch.ops.aten.silu_backward(dx, x, grad_input=dx)
        dh, dgain, dfc = folded_backward(dh, dx, n, scale, fc, SLOPE * gain)
        return dh, SLOPE * dgain, dfc, dproj.to(proj.dtype), None


def rows(x: Tensor) -> Tensor:
    """[B, T, D] -> [N, D]."""
    return x.flatten(0, 1)


def plus_product(h: Tensor, x: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    """h + scale * x W^T."""
    if x.dtype == h.dtype:
        return torch.addmm(rows(h), rows(x), weight.T, alpha=scale).view_as(h)
    return h.add(F.linear(x, weight), alpha=scale)


def folded_backward(
    dh: Tensor, dx: Tensor, n: Tensor, scale: Tensor, weight: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x = n (weight * gain)^T, n the norm of h: `dh` with what comes back through x, dgain and dweight."""
    dfolded = (rows(dx).T @ rows(n)).to(weight.dtype)
    dn = dx @ (weight * gain).to(dx.dtype)
    return normed_backward(dh, dn, n, scale), (dfolded * weight).sum(0), dfolded.mul_(gain)
