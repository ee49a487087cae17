"""Drawing pixels one after another with a preallocated key/value cache (§2, BLOG: temperature 1, no truncation).

Every sample brings its own random numbers, and the batch is padded to a multiple of LANES, so that a picture does not
depend on which others were drawn beside it.
Shapes: B samples, T positions, P prompt tokens, D width, H heads, K head width, V colours, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pixseq.models.igpt import ImageGPT, Shape

# Matrix products choose their kernel, hence the order of their sums, by the number of rows; at multiples of a few rows
# the rows of the result no longer depend on how many there are.
LANES = 8


@dataclass
class Cache:
    """Keys and values of all positions so far: each [L, B, H, T, K]."""

    keys: Tensor
    values: Tensor

    @staticmethod
    def bytes(shape: Shape, width: int) -> int:
        """What one sample takes, in numbers of `width` bytes."""
        return 2 * shape.n_layer * shape.n_ctx * shape.d_model * width

    @classmethod
    def empty(cls, model: ImageGPT, batch: int, dtype: torch.dtype) -> Cache:
        s = model.shape
        size = (s.n_layer, batch, s.n_head, s.n_ctx, s.d_model // s.n_head)
        return cls(*(torch.zeros(size, dtype=dtype, device=model.wte.device) for _ in range(2)))


def prefill(model: ImageGPT, prompt: Tensor, cache: Cache) -> Tensor:
    """Run sos and the prompt, int [B, P], at once; fills the cache, returns the logits of pixel P, [B, V]."""
    b, p = prompt.shape
    h = model.embed(torch.cat([prompt, prompt.new_zeros(b, 1)], dim=1))  # the last token is not an input
    for layer, block in enumerate(model.blocks):
        q, k, v = block.attn.heads(block.ln_1(h))
        cache.keys[layer, :, :, : p + 1], cache.values[layer, :, :, : p + 1] = k, v
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + block.attn.proj(y.transpose(1, 2).flatten(2))
        h = h + block.mlp(block.ln_2(h))
    return model.head(model.ln_f(h[:, -1]))


def decode_one(model: ImageGPT, token: Tensor, position: int, cache: Cache) -> Tensor:
    """Feed pixel `position` - 1, int [B]; returns the logits of pixel `position`, [B, V]."""
    b, heads = len(token), model.shape.n_head
    h = F.embedding(token, model.wte) + model.places()[position]
    for layer, block in enumerate(model.blocks):
        q, k, v = block.attn.qkv(block.ln_1(h)).view(b, 3, heads, 1, -1).unbind(1)  # each [B, H, 1, K]
        cache.keys[layer, :, :, position], cache.values[layer, :, :, position] = k[:, :, 0], v[:, :, 0]
        keys, values = cache.keys[layer, :, :, : position + 1], cache.values[layer, :, :, : position + 1]
        y = F.scaled_dot_product_attention(q, keys, values)
        h = h + block.attn.proj(y.reshape(b, -1))
        h = h + block.mlp(block.ln_2(h))
    return model.head(model.ln_f(h))


def draw(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """logits [B, V], uniform [B] in [0, 1) -> int [B], by inversion of the cumulative distribution.

    temperature 0 takes the most likely colour; top_k 0 and top_p 1 truncate nothing.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the colour that crosses top_p stays in
        probabilities = probabilities.masked_fill(outside.scatter(-1, order, outside), 0.0)
    cumulative = probabilities.double().cumsum(-1)
    return (cumulative <= uniform[:, None].to(cumulative) * cumulative[:, -1:]).sum(-1)


@torch.no_grad()
def sample(
    model: ImageGPT,
    prompt: Tensor,
    uniform: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    advance: Callable[[int], None] = lambda n: None,
) -> Tensor:
    """prompt int [B, P] (P may be 0), uniform [B, T - P] -> tokens int [B, T], the prompt untouched.

    Both run along the model's sequence, which is the picture in raster order unless its shape says otherwise.
    `advance` is told the number of tokens after every step. Raises ValueError for a model that is not autoregressive.
    """
    if not model.shape.can_sample:
        raise ValueError("only autoregressive models can be sampled")
    b, p = prompt.shape
    spare = -b % LANES
    prompt, uniform = F.pad(prompt, (0, 0, 0, spare)), F.pad(uniform, (0, 0, 0, spare))
    autocast = torch.is_autocast_enabled(prompt.device.type)
    dtype = torch.get_autocast_dtype(prompt.device.type) if autocast else model.wte.dtype
    cache = Cache.empty(model, b + spare, dtype)
    tokens = [prompt]
    logits = prefill(model, prompt, cache)
    for position in range(p, model.shape.n_ctx):
        token = draw(logits, uniform[:, position - p], temperature, top_k, top_p)
        tokens.append(token[:, None])
        advance(b)
        if position + 1 < model.shape.n_ctx:
            logits = decode_one(model, token, position + 1, cache)
    return torch.cat(tokens, dim=1)[:b]
