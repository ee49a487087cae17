"""Muon: momentum whose matrix is made orthogonal before each step (Jordan et al. 2024, "Muon").

torch.optim.Muon iterates in bfloat16, which a CPU without matrix units does 25 times slower than float32; this one uses
the type that is fast on the weights' device. Not the paper's optimizer: an option for CPU presets.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pixseq.models.optimizer import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration; they trade exactness for speed
STEPS = 5


class Muon(Optimizer):
    """For matrices only. Updates are scaled to the root mean square of Adam's: one learning rate serves both."""

    def __init__(self, matrices: Iterable[Tensor], weight_decay: float = 0.0, momentum: float = 0.95):
        defaults = {"weight_decay": weight_decay, "momentum": momentum}
        super().__init__([{"params": matrices}], defaults)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group in self.param_groups:
            momentum = group["momentum"]
            for p in group["params"]:
                if p not in self.state:
                    self.state[p] = {"momentum_buffer": torch.zeros_like(p)}
                buffer = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = orthogonal(p.grad.lerp(buffer, momentum))  # Nesterov
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr * 0.2 * max(p.shape) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """Near to U V^T of the singular value decomposition, by Newton-Schulz iteration; singular values end near 1."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide.bfloat16() if matrix.is_cuda else wide
    x = x / (x.norm() + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide is matrix else x.T).to(matrix.dtype)
