"""Attention masks of a sequence with a prefix (causal, bidirectional, prefix), and attention by them.

Shapes: B images, K positions, H heads, W head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

FLEX_BLOCK, FLEX_WIDTH = 128, 16  # positions of a block, and the least width of a head
# Without cuDNN's, which torch prefers on Hopper: with a mask the gradient of its queries may be no number, as at 64
# positions (torch 2.11 and later).
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def prefix_mask(masked: Tensor) -> Tensor:
    """masked bool [B, K], False on the prefix -> bool [B, 1, K, K]: query q sees key k if k <= q or k in the prefix."""
    k = masked.shape[1]
    causal = torch.ones(k, k, dtype=torch.bool, device=masked.device).tril()
    return (causal | ~masked[:, None, :])[:, None]


def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """q [B, H, Q, W], k and v [B, H, K, W], mask of a shape like [B, H, Q, K] -> [B, H, Q, W]."""
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    with sdpa_kernel(KERNELS):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def prefix_block_mask(masked: Tensor) -> BlockMask:
    """`prefix_mask` for FlexAttention, which leaves out whole blocks of it."""
    from torch.nn.attention.flex_attention import create_block_mask

    sizes, total = (~masked).sum(1), masked.shape[1]

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key < sizes[b]) | (key <= query)

    return create_block_mask(seen, len(masked), None, total, total, device=masked.device)


def flex_serves(masked: Tensor, width: int) -> bool:
    """Whether FlexAttention is for sequences masked so and heads of this width: on a card, where there are blocks to
    leave out and its products are wide enough, and in training, which has the time to compile it for a batch's size.
    """
    return masked.is_cuda and torch.is_grad_enabled() and masked.shape[1] > FLEX_BLOCK and width >= FLEX_WIDTH


def flex(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask) -> Tensor:
    """Attention of q, k, v [B, H, K, W]. Uncompiled it makes whole tables, hence AIM.kernels."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, block_mask=blocks)


@dataclass(frozen=True)
class AttentionMask:
    """Which keys each query attends to, made once for all layers: itself and those before it where `causal`, else all,
    or as `mask` says, bool [B, 1, K, K] or a FlexAttention mask, which `flex` reads.
    """

    causal: bool = False
    mask: Tensor | BlockMask | None = None
    flex: Callable = flex

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, K, W] -> [B, H, K, W]."""
        if self.mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        if isinstance(self.mask, Tensor):
            return attend_masked(q, k, v, self.mask)
        return self.flex(q, k, v, self.mask)
