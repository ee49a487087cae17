"""Drawing pixels one after another from keys and values that are kept (§2, BLOG: temperature 1, no truncation).

Every sample brings its own random numbers, and no row of a product depends on how many there are, so that a picture
does not depend on which others are drawn beside it.
Shapes: B samples, T positions, P prompt tokens, D width, H heads, K head width, V colours, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pixseq.models.igpt import NORM_EPS, ImageGPT

if TYPE_CHECKING:
    from pixseq.models.family import Model, Shape  # which imports this module

# A matrix product chooses its kernel, hence the order of its sums, by the number of rows. See `product` for the form
# in which a CPU's choice makes no difference; one row alone is still another kernel. Elsewhere rows are padded more.
LANES_CPU, LANES = 2, 8
SUM = 512  # inputs that one product sums over: more are cut into blocks, where the cuts depend on the number of rows
ROWS = 512  # of prompts that run together


def laid(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[out, in] -> as `product` takes it: float32 [in, out], else [out, in]."""
    return weight.T.contiguous() if dtype == torch.float32 else weight.to(dtype)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """[B, in] times a `laid` weight -> [B, out], each row the same whatever B is.

    With outputs side by side in memory a float32 kernel sums over the inputs in their order, for any number of rows;
    in bf16 it does where the weights, whose number is fixed, are the left operand.
    """
    if weight.dtype != torch.float32:
        return torch.mm(weight, x.to(weight.dtype).T.contiguous()).T
    if len(weight) <= SUM:
        return torch.mm(x, weight)
    first, *others = zip(x.split(SUM, dim=1), weight.split(SUM))
    y = torch.mm(*first)
    for part in others:
        y.addmm_(*part)
    return y


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled queries [B, H, 1, K], keys and values [B, H, t, K] -> [B, D]."""
    if q.dtype == torch.float32 and q.device.type == "cpu":  # plain products read k and v once, at memory's speed
        weights = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1)
        return torch.bmm(weights, v.flatten(0, 1)).view(len(q), -1)
    return F.scaled_dot_product_attention(q, k, v, scale=1.0).reshape(len(q), -1)


class Decoder:
    """A model's weights as a step takes them, and the keys and values of `batch` samples: [L, 2, B, H, T, K].

    What multiplies the input or output of a matrix is multiplied into it once: the gains of norms, the scale of
    queries, and the 1.702 of quick-gelu, which is silu(1.702 x) / 1.702. Computes as autocast says when it is made.
    """

    def __init__(self, model: ImageGPT, batch: int):
        s, device = model.shape, model.wte.device
        autocast = torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type) if autocast else model.wte.dtype
        self.model, self.places, self.eps = model, model.places(), torch.full((1, 1), NORM_EPS, device=device)
        scale = torch.ones(3 * s.d_model, 1, device=device)
        scale[: s.d_model] = (s.d_model // s.n_head) ** -0.5
        self.blocks = [
            (
                laid(block.attn.qkv.weight * block.ln_1.weight * scale, self.dtype),
                laid(block.attn.proj.weight, self.dtype),
                laid(block.mlp.fc.weight * block.ln_2.weight * 1.702, self.dtype),
                laid(block.mlp.proj.weight / 1.702, self.dtype),
            )
            for block in model.blocks
        ]
        self.head = laid(model.head.weight * model.ln_f.weight, self.dtype)
        size = (s.n_layer, 2, batch, s.n_head, s.n_ctx, s.d_model // s.n_head)
        self.kept = torch.zeros(size, dtype=self.dtype, device=device)

    @staticmethod
    def bytes(shape: Shape, width: int) -> int:
        """What is kept of one sample, in numbers of `width` bytes."""
        return 2 * shape.n_layer * shape.n_ctx * shape.d_model * width

    def prefill(self, prompt: Tensor) -> Tensor:
        """Run sos and the prompt, int [B, P], at once; returns the logits of pixel P, [B, V].

        Equal prompts run once, and several together: in bf16 as many at any time, since that many rows may matter.
        """
        inputs = F.pad(prompt, (0, 1))  # the last token is not an input
        different, which = inputs.unique(dim=0, return_inverse=True)
        together, logits = max(ROWS // inputs.shape[1], 1), []
        for first in range(0, len(different), together):
            part = different[first : first + together]
            rows = ((first <= which) & (which < first + len(part))).nonzero()[:, 0]
            n = len(part)
            if self.dtype != torch.float32 and prompt.shape[1]:
                part = F.pad(part, (0, 0, 0, together - n))
            logits.append(self._prefill(part, rows, which[rows] - first)[:n])
        return torch.cat(logits)[which]

    def _prefill(self, inputs: Tensor, rows: Tensor, which: Tensor) -> Tensor:
        """int [U, P + 1] -> logits [U, V]; sample rows[i] begins as number which[i]."""
        u, p = inputs.shape

        def attend_all(heads: Tensor, kept: Tensor) -> Tensor:
            q, k, v = heads.view(u, p, *heads.shape[1:]).permute(2, 0, 3, 1, 4)
            kept[0, rows, :, :p], kept[1, rows, :, :p] = k[which], v[which]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
            return y.transpose(1, 2).reshape(u * p, -1)

        h = self._blocks(self.model.embed(inputs).flatten(0, 1), attend_all)
        return self._logits(h.view(u, p, -1)[:, -1])

    def step(self, token: Tensor, position: int) -> Tensor:
        """Feed pixel `position` - 1, int [B]; returns the logits of pixel `position`, [B, V]."""

        def attend_last(heads: Tensor, kept: Tensor) -> Tensor:
            kept[:, :, :, position] = heads[:, 1:].transpose(0, 1)
            return attend(heads[:, 0, :, None], *kept[:, :, :, : position + 1])

        return self._logits(self._blocks(F.embedding(token, self.model.wte) + self.places[position], attend_last))

    def _blocks(self, h: Tensor, attended: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """h [N, D] through all blocks; `attended`: queries, keys, values [N, 3, H, K] and what is kept -> [N, D]."""
        with torch.autocast(h.device.type, enabled=False):
            for (qkv, proj, fc, out), kept in zip(self.blocks, self.kept):
                heads = product(self._normed(h), qkv).contiguous().view(len(h), 3, self.model.shape.n_head, -1)
                h += product(attended(heads, kept), proj)
                h += product(F.silu(product(self._normed(h), fc), inplace=True), out)
        return h

    def _logits(self, h: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            return product(self._normed(h), self.head)

    def _normed(self, h: Tensor) -> Tensor:
        """h / sqrt(mean(h^2) + eps) in few calls; the gain is in the matrix that follows."""
        size = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
        return h * torch.addcmul(self.eps, size, size, value=1 / h.shape[-1]).rsqrt_()


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
    target = uniform[:, None].to(cumulative) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)


@torch.inference_mode()
def sample(
    model: Model,
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
    spare = -b % (LANES_CPU if prompt.device.type == "cpu" else LANES)
    prompt, uniform = F.pad(prompt, (0, 0, 0, spare)), F.pad(uniform, (0, 0, 0, spare))
    decoder = Decoder(cast(ImageGPT, model), b + spare)
    tokens = F.pad(prompt, (0, model.shape.n_ctx - p))
    logits = decoder.prefill(prompt)
    for position in range(p, model.shape.n_ctx):
        if position > p:
            logits = decoder.step(tokens[:, position - 1], position)
        tokens[:, position] = draw(logits, uniform[:, position - p], temperature, top_k, top_p)
        advance(b)
    return tokens[:b]
