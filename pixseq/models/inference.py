"""Image GPT's blocks where no gradient is needed, on a CPU: the same numbers from fewer passes over memory.

What multiplies the input of a matrix is multiplied into it (the gains of norms, the 1.702 of quick-gelu, which is
silu(1.702 x) / 1.702), and products are added to the residual stream as they are made. A block takes so many images,
and its MLP so many rows, at a time as stay in the caches: of a larger batch only the stream is larger.
Shapes: B images, T positions, D width, N = B * T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixseq.models import gradients

if TYPE_CHECKING:
    from pixseq.models.igpt import Attention, Block  # which imports this module

NORM_EPS, SLOPE = 1e-5, 1.702  # of RMSNorm, of quick-gelu
# Bytes of inner activations of an MLP at once. Its rows come in multiples of ROWS, so that the tiles of a product,
# hence the order of its sums, are those of all rows at once.
BYTES, ROWS, LEAST_ROWS = 1 << 22, 64, 256


def applies(blocks: Sequence[Block], h: Tensor) -> bool:
    """Whether `run` takes these blocks: plain ones (a low-rank update is none), and nothing is learnt or compiled."""
    if torch.is_grad_enabled() or h.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return are_plain(blocks)


def are_plain(blocks: Sequence[Block]) -> bool:
    """Without low-rank updates."""
    return all(type(matrix) is nn.Linear for block in blocks for matrix in matrices(block))


def matrices(block: Block) -> tuple[nn.Linear, ...]:
    return block.attn.qkv, block.attn.proj, block.mlp.fc, block.mlp.proj


def freeze(blocks: Sequence[Block], dtype: torch.dtype) -> None:
    """Fold plain blocks for good, instead of for every batch. Nothing but `run` takes them from here on."""
    for block in blocks:
        for matrix, weight in zip(matrices(block), folded(block, dtype)):
            matrix.weight = nn.Parameter(weight, requires_grad=False)
        block.frozen = True


def run(blocks: Sequence[Block], gain: Tensor, h: Tensor, read: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """h^0 [B, T, D], which becomes n^L, and the last norm's gain [D] -> what `read` gives of every n^l.

    `read` sees n [b, T, D] of some images at a time, before the gain, by which what it gives [b, ..., D] is multiplied.
    Computes as autocast says.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else h.dtype
    parts = h.split(max(BYTES // (4 * h[0].numel() * dtype.itemsize), 1))
    features = []
    with torch.autocast("cpu", enabled=False):
        for block in blocks:
            weights = folded(block, dtype)
            found = [through(block.attn, weights, part, read) for part in parts]
            features.append(torch.cat(found) * block.ln_1.weight)
        found = [read(part.copy_(normed(part))) for part in parts]
    features.append(torch.cat(found) * gain)
    h.mul_(gain)
    return features


def folded(block: Block, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The weights of qkv, proj, fc and proj, with what multiplies their inputs."""
    qkv, attn_proj, fc, mlp_proj = (matrix.weight for matrix in matrices(block))
    if not block.frozen:
        qkv, fc = qkv * block.ln_1.weight, fc * (SLOPE * block.ln_2.weight)
    return tuple(weight.to(dtype) for weight in (qkv, attn_proj, fc, mlp_proj))


def through(attn: Attention, weights: tuple[Tensor, ...], h: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
    """h [b, T, D], which becomes the block's output -> what `read` gives of its norm."""
    qkv, attn_proj, fc, mlp_proj = weights
    n, stream = normed(h), h.flatten(0, 1)
    found, x = read(n), F.linear(n.to(qkv.dtype), qkv)
    del n
    add_product(stream, attn.attend(x).flatten(0, 1), attn_proj)
    del x
    for part in stream.split(max(BYTES // (len(fc) * fc.itemsize) // ROWS * ROWS, LEAST_ROWS)):
        add_product(part, F.silu(F.linear(normed(part).to(fc.dtype), fc), inplace=True), mlp_proj, 1 / SLOPE)
    return found


def normed(h: Tensor) -> Tensor:
    """h / sqrt(mean(h^2) + eps), [N, D]."""
    return gradients.normed(h, h.dtype, NORM_EPS)[0]


def add_product(h: Tensor, x: Tensor, weight: Tensor, scale: float = 1.0) -> None:
    """h += scale * x W^T, [N, D] from [N, in] and [D, in]."""
    if x.dtype == h.dtype:
        h.addmm_(x, weight.T, alpha=scale)
    else:
        h.add_(F.linear(x, weight), alpha=scale)
