"""Attention of whole sequences, and faster backwards for it on a CPU.

With a C compiler it is that of attention_backward.c, which takes 0.5 to 0.7 of the time of those below, from 256
positions to 1,024. Without, it is torch's own; but in bf16 that takes longer than its float32 one: seven times at 64
positions, twice at 256, since it works in small pieces. So it is taken in float32, from what the bf16 forward keeps:
nearer to the exact gradient, and the forward is the same to the last bit. Measured from 64 to 1,024 positions and for
heads 16 to 64 wide, with AMX and without; it loses, by a tenth, for heads 64 wide on sequences of 1,024 with AMX alone.
Shapes: B images, T positions, D width, H heads, K head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pixseq.models import attention_backward

POSITIONS = 128  # from which on attention takes so long that half a second of compiling is soon made good
NUMBERS = 1 << 17  # queries that are taken back through attention at once: with all that belongs to them, a cache full


def self_attention(qkv: Tensor, n_head: int, causal: bool) -> Tensor:
    """[B, T, 3 D], queries, keys and values, each head-major -> [B, T, D]."""
    if takes_float32_backward(qkv):
        return Float32Backward.apply(qkv, n_head, causal)
    q, k, v = split_heads(qkv, n_head)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return y.transpose(1, 2).flatten(2)


def split_heads(qkv: Tensor, n_head: int) -> Tensor:
    """[B, T, 3 D] -> queries, keys and values, [3, B, H, T, K]."""
    return qkv.unflatten(-1, (3, n_head, -1)).permute(2, 0, 3, 1, 4)


def side_by_side(qkv: Tensor) -> Tensor:
    """As torch's fast attention takes it: it reads numbers of a head as if they lay so, and does not ask."""
    return qkv.contiguous()


def takes_float32_backward(x: Tensor) -> bool:
    """Whether a gradient comes back in bf16 to a CPU that runs this line by line."""
    wanted = torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()
    return wanted and x.device.type == "cpu" and x.dtype == torch.bfloat16


class Float32Backward(torch.autograd.Function):
    """[B, T, 3 D] -> [B, T, D]."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, n_head: int, causal: bool) -> Tensor:
        y, logsumexp = attended(qkv, n_head, causal)
        ctx.save_for_backward(qkv, y, logsumexp)
        ctx.n_head, ctx.causal = n_head, causal
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        qkv, y, logsumexp = ctx.saved_tensors
        return attended_backward(dy, qkv, y, logsumexp, ctx.n_head, ctx.causal), None, None


def attended(qkv: Tensor, n_head: int, causal: bool) -> tuple[Tensor, Tensor]:
    """[B, T, 3 D] -> [B, T, D], and the logarithms of the sums of weights, which the way back takes."""
    q, k, v = split_heads(side_by_side(qkv), n_head)
    y, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    return y.transpose(1, 2).flatten(2), logsumexp


def attended_backward(dy: Tensor, qkv: Tensor, y: Tensor, logsumexp: Tensor, n_head: int, causal: bool) -> Tensor:
    """The gradient of qkv, [B, T, 3 D], in float32 inside."""
    code = attention_backward.library(qkv.dtype) if qkv.shape[1] >= POSITIONS else None
    if code is not None:
        return attention_backward.backward(code, dy, qkv, y, logsumexp, n_head, causal)
    gradient = torch.empty_like(qkv)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    images = max(NUMBERS // y[0].numel(), 1)  # at a time
    for dqkv, *part in zip(*(x.split(images) for x in (gradient, qkv, dy, y, logsumexp))):
        q, k, v = split_heads(side_by_side(part[0].to(wide)), n_head)
        dout, out = (x.to(wide).unflatten(-1, (n_head, -1)).transpose(1, 2) for x in part[1:3])
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, part[3], 0.0, causal
        )
        for whole, dx in zip(split_heads(dqkv, n_head), found):
            whole.copy_(dx)
    return gradient
