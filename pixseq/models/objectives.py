"""The losses of §2.1 and §2.3, per image, in float32 whatever the compute type.

Shapes: B images, T positions, V colours, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pixseq.models.gradients import TokenNats, takes_own_gradient

MASK_RATE = 0.15  # "each index independently"; 0.20 did as well, more did worse (appendix A.1)


def token_nats(logits: Tensor, tokens: Tensor) -> Tensor:
    """logits [B, T, V], tokens int [B, T] -> nats [B, T]. All pixels are scored, the first included."""
    rows = logits.flatten(0, 1)
    if takes_own_gradient(logits):
        return TokenNats.apply(rows, tokens.flatten()).view_as(tokens)
    return F.cross_entropy(rows.float(), tokens.flatten(), reduction="none").view_as(tokens)


def generative_nats(logits: Tensor, tokens: Tensor, masked: Tensor | None = None) -> Tensor:
    """Mean nats a token of each image [B]: over all positions (ar), or over its masked ones (bert, bool [B, T]).

    An image without a masked position, possible in tiny contexts, has nothing to predict: its value is 0, and
    `scored_images` leaves it out of the mean.
    """
    nats = token_nats(logits, tokens)
    if masked is None:
        return nats.mean(1)
    return (nats * masked).sum(1) / masked.sum(1).clamp(min=1)


def scored_images(count: int, masked: Tensor | None) -> int:
    """How many of `count` images have a token to predict, perhaps none: the counts of batches add up."""
    return count if masked is None else int(masked.any(1).sum())


def class_nats(class_logits: Tensor, labels: Tensor) -> Tensor:
    """class_logits [B, C], labels int [B] -> cross-entropy of each image [B]."""
    return F.cross_entropy(class_logits.float(), labels, reduction="none")


def random_mask(count: int, positions: int, generator: torch.Generator) -> Tensor:
    """bool [count, positions], True where the content is hidden."""
    return torch.rand(count, positions, generator=generator) < MASK_RATE
