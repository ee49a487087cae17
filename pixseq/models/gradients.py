"""RMSNorm and cross-entropy with backwards of their own: few passes over memory, and few temporaries.

Left to autograd, the first is a tenth of a bf16 training step on a CPU, most of it fresh pages, and the second holds
three float32 copies of all logits. Shapes: D width, N tokens, V colours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS = 1 << 18  # that are held in float32 at once


def takes_own_gradient(x: Tensor) -> bool:
    """Where a gradient is wanted on a CPU; CUDA, and a compiler, join the plain steps themselves."""
    return torch.is_grad_enabled() and x.device.type == "cpu" and not torch.compiler.is_compiling()


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


class TokenNats(torch.autograd.Function):
    """Logits [N, V] and tokens int [N] -> nats [N]: as cross-entropy of the logits in float32, some rows at a time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        rows = max(LOGITS // logits.shape[1], 1)
        logsumexp = torch.cat([part.to(wide).logsumexp(-1) for part in logits.split(rows)])
        ctx.save_for_backward(logits, tokens, logsumexp)
        return logsumexp - logits.gather(1, tokens[:, None])[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        logits, tokens, logsumexp = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        rows = max(LOGITS // logits.shape[1], 1)
        parts = (x.split(rows) for x in (logits, gradient, tokens[:, None], logsumexp[:, None], dy[:, None]))
        for z, dz, token, total, weight in zip(*parts):
            p = torch.sub(z, total).exp_()
            p.scatter_add_(1, token, p.new_full((len(p), 1), -1.0))
            torch.mul(p, weight, out=dz)
        return gradient, None
