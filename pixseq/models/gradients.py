"""Quick-gelu and RMSNorm with a backward of their own: few passes over memory, and little but the input is kept.

Left to autograd they are a quarter of a bf16 training step on a CPU, most of it fresh pages of temporaries.
Shapes: D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SLOPE = 1.702


class QuickGELU(torch.autograd.Function):
    """x sigmoid(1.702 x), which is silu(1.702 x) / 1.702: its slope at x is that of silu at 1.702 x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x * SLOPE).sigmoid_().mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy, x * SLOPE)


class RMSNorm(torch.autograd.Function):
    """x [..., D], gain [D] -> x / sqrt(mean(x^2) + eps) * gain."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, scale)
        return (x * scale).mul_(gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain, scale = ctx.saved_tensors
        # that of a layer norm whose mean is 0, which takes off the mean gradient too: it is put back
        dx, dgain, _ = torch.ops.aten.native_layer_norm_backward(
            dy, x, gain.shape, torch.zeros_like(scale), scale, gain, None, [True, True, False]
        )
        mean = torch.mv(dy.flatten(0, -2), gain).div_(x.shape[-1]).view_as(scale)
        return dx.addcmul_(mean, scale), dgain, None
