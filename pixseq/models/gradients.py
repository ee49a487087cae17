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


def normed(h: Tensor, dtype: torch.dtype, eps: float) -> tuple[Tensor, Tensor]:
    """[..., D] -> n = scale * h of mean square 1, in `dtype`, and scale = 1 / sqrt(mean(h^2) + eps) [..., 1]."""
    size = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    scale = size.square_().div_(h.shape[-1]).add_(eps).rsqrt_()
    return (h * scale).to(dtype), scale


def normed_backward(dh: Tensor, dn: Tensor, n: Tensor, scale: Tensor) -> Tensor:
    """dh + scale * (dn - n * mean(n * dn)): dh with what comes back through `normed`.

    What is in brackets is the gradient of a weight normalised, g v / |v|, for which there is one kernel: v is n, and
    both g and |v| are sqrt(D), but the kernel has g in the type of n, and reads rows one after the other.
    """
    root = torch.full_like(scale, n.shape[-1] ** 0.5).flatten(0, -2)
    g = root.to(n.dtype)
    dw, v = (x.flatten(0, -2).contiguous() for x in (dn, n))
    dv, _ = torch.ops.aten._weight_norm_interface_backward(dw, v, g, root, 0)
    return torch.addcmul(dh, dv.view_as(n), scale * (root[0] / g[0]))


class RMSNorm(torch.autograd.Function):
    """x [..., D], gain [D] -> x / sqrt(mean(x^2) + eps) * gain."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        n, scale = normed(x, x.dtype, eps)
        ctx.save_for_backward(n, gain, scale)
        return n * gain

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        n, gain, scale = ctx.saved_tensors
        dx = normed_backward(dy.new_zeros(()), dy * gain, n, scale)
        return dx, (dy * n).flatten(0, -2).sum(0), None


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
