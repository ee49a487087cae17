"""Attentive probe: one learned query pools the patch features of a frozen model ("Scalable Pre-training of Large
Autoregressive Image Models", §4.3 and appendix D; the module as in the released inference code).

R copies of the probe stand side by side, every parameter with a leading axis R, so that one pass over the features
trains each at a learning rate of its own. Shapes: B images, T positions, D width, H attention heads, K head width
(D / H), C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS, NORM_MOMENTUM = 1e-6, 0.1


class AttentiveProbe(nn.Module):
    """Batch norm without scale and shift over images and positions, multi-head attention of one query, a linear layer.

    The query is used as it is, keys and values are projected without bias, and nothing follows the attention but the
    class weights: 2 D^2 + D + D C parameters a copy. In training the statistics are the batch's, in use the running
    ones. Raises ValueError where H does not divide D.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, width: int, n_heads: int, n_classes: int, n_rates: int = 1):
        super().__init__()
        if width % n_heads:
            raise ValueError(f"{n_heads} heads do not divide a width of {width}")
        self.n_heads = n_heads
        self.query = nn.Parameter(torch.empty(n_rates, width))
        self.k = nn.Parameter(torch.empty(n_rates, width, width))
        self.v = nn.Parameter(torch.empty(n_rates, width, width))
        self.linear = nn.Parameter(torch.empty(n_rates, n_classes, width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> AttentiveProbe:
        """Query: normal, deviation 0.02; matrices: uniform within 1 / sqrt(D). All copies start equal."""
        for name, tensor in self.named_parameters():
            one = torch.empty(tensor.shape[1:])
            if name == "query":
                one.normal_(0.0, 0.02, generator=generator)
            else:
                one.uniform_(-(one.shape[1] ** -0.5), one.shape[1] ** -0.5, generator=generator)
            tensor.copy_(one.expand_as(tensor))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> logits [R, B, C].

        Scores of W_k x with a query that is the same for all x are those of x with W_k^T q, and the weighted mean of
        W_v x is W_v of the weighted mean of x. So no position is ever projected, and R copies cost little.
        """
        (r, d), h = self.query.shape, self.n_heads
        b, t, _ = x.shape
        x = F.batch_norm(x.flatten(0, 1), self.mean, self.var, None, None, self.training, NORM_MOMENTUM, NORM_EPS)
        # [R, H, 1, K] @ [R, H, K, D] -> [R, H, 1, D]: what each attention head looks for, in the space of x
        wanted = self.query.view(r, h, 1, d // h) @ self.k.view(r, h, d // h, d) * (d // h) ** -0.5
        weights = (wanted.view(r * h, d) @ x.T).view(r * h, b, t).softmax(-1)
        pooled = weights.transpose(0, 1) @ x.view(b, t, d)  # [B, R * H, D]
        values = pooled.transpose(0, 1).view(r, h, b, d) @ self.v.view(r, h, d // h, d).mT  # [R, H, B, K]
        return values.transpose(1, 2).reshape(r, b, d) @ self.linear.mT


class SideBySideAdamW:
    """AdamW for parameters with a leading axis R, each index at its own rate; betas (0.9, 0.999).

    Decoupled decay is of matrices alone: a query has no scale that could grow with the data.
    """

    def __init__(self, module: nn.Module, rates: Sequence[float], weight_decay: float):
        self.parameters = list(module.parameters())
        self.rates = torch.tensor(rates, dtype=torch.float32, device=self.parameters[0].device)
        self.weight_decay, self.steps = weight_decay, 0
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]

    @torch.no_grad()
    def step(self, share: float) -> None:
        """One step at `share` of every rate; the gradients are taken and cleared."""
        self.steps += 1
        first_bias, second_bias = 1 - 0.9**self.steps, 1 - 0.999**self.steps
        for p, (first, second) in zip(self.parameters, self.moments):
            assert p.grad is not None
            rates = self.rates.view(-1, *[1] * (p.ndim - 1)) * share
            first.lerp_(p.grad, 1 - 0.9)
            second.lerp_(p.grad.square(), 1 - 0.999)
            if p.ndim > 2:
                p.mul_(1 - rates * self.weight_decay)
            p.sub_(rates / first_bias * first / ((second / second_bias).sqrt() + 1e-8))
            p.grad = None
