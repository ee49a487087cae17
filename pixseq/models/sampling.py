"""Sampling, pixel by pixel, with a KV cache: keys and values are kept (§2, BLOG: temperature 1, no truncation).

Every sample brings its own random numbers, and on a CPU no row of a product depends on how many there are, so that a
picture does not depend on which others are drawn beside it.
Shapes: B samples, T positions, P prompt tokens, D width, H heads, K head width, V colours, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from ctypes import CDLL
from functools import cache, cached_property
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pixseq.models import decoder_step
from pixseq.models.igpt import ImageGPT
from pixseq.models.inference import NORM_EPS
from pixseq.models.static_step import StaticSteps, Step

if TYPE_CHECKING:
    from pixseq.models.family import Model, Shape  # which imports this module

# A matrix product chooses its kernel, hence the order of its sums, by the number of rows. See `Matrix` for the form
# in which a CPU's choice makes no difference; one row alone is still another kernel. Elsewhere rows are padded more.
LANES_CPU, LANES = 2, 8
TOGETHER = 12  # rows of a product whose kernel does not treat all alike: MKL's of AVX2 takes six, of SSE four at a time
SUM = 512  # inputs that one product sums over: more are cut into blocks, where the cuts depend on the number of rows
ROWS, NUMBERS = 512, 1 << 17  # of prompts that run together: rows, and more of narrow models, up to so many numbers
ROWS_STATIC = 1 << 15  # the same where launches cost more than rows
KEPT, LEAST, MOST = 1 << 25, 16, 4096  # bytes of keys and values, and samples, of compiled steps at once
COLDEST = 1e-30  # below it quotients of logits would overflow; the likeliest colour is all that is drawn long before


class Matrix:
    """A weight [out, in] to multiply rows by, each row's product the same whatever their number.

    With outputs side by side in memory a float32 kernel of AVX-512 sums over the inputs in their order, for any number
    of rows; where one does not, rows are multiplied TOGETHER at a time. In bf16 it does where the weights, whose number
    is fixed, are the left operand.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        self.left = None if dtype == torch.float32 else weight.to(dtype)
        self.blocks: tuple[Tensor, ...] = weight.T.contiguous().split(SUM) if self.left is None else ()
        self.chunked = not all(rows_alike(*block.shape, torch.get_num_threads()) for block in self.blocks)

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, in] -> [B, out]."""
        if self.left is not None:
            return torch.mm(self.left, x.to(self.left.dtype).T.contiguous()).T
        if not self.chunked:
            return self._product(x)
        rows = F.pad(x, (0, 0, 0, -len(x) % TOGETHER))
        return torch.cat([self._product(part) for part in rows.split(TOGETHER)])[: len(x)]

    def _product(self, x: Tensor) -> Tensor:
        first, *others = self._parts(x)
        y = torch.mm(*first)
        for part, block in others:
            y.addmm_(part, block)
        return y

    def add(self, h: Tensor, x: Tensor) -> None:
        """h [B, out] += the product with x [B, in]."""
        if self.left is not None or self.chunked:
            h += self(x)
            return
        for part, block in self._parts(x):
            h.addmm_(part, block)

    def _parts(self, x: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        return zip(x.split(SUM, dim=1), self.blocks) if len(self.blocks) > 1 else ((x, self.blocks[0]),)


class Linear:
    """The same for a device whose library chooses its kernel: there the number of rows may change the last bits."""

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        self.weight = weight.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight)

    def add(self, h: Tensor, x: Tensor) -> None:
        h += self(x)


@cache
def rows_alike(inputs: int, outputs: int, threads: int) -> bool:
    """Whether a row's float32 product is the same beside any number of others: tried, since each library, processor
    and shape has kernels of its own.
    """
    x, weight = (torch.arange(n * inputs).double().sin().float().view(n, inputs) for n in (256, outputs))
    weight = weight.T.contiguous()
    whole, added = x @ weight, torch.addmm(torch.ones(256, outputs), x, weight)
    return all(
        torch.equal(x[:rows] @ weight, whole[:rows])
        and torch.equal(torch.addmm(torch.ones(rows, outputs), x[:rows], weight), added[:rows])
        for rows in (2, 3, 7, 8, 13, 30, 64, 200)
    )


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled queries [..., 1, K], keys and values [..., t, K] -> [..., 1, K]."""
    if q.dim() == 3:  # plain products read k and v once, at memory's speed
        return torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)


def is_static(model: ImageGPT) -> bool:
    """Whether its steps are those of static_step.py: anywhere but on a CPU, which has no launches to save."""
    return model.wte.device.type != "cpu"


def computed(model: ImageGPT) -> tuple[torch.dtype, CDLL | None]:
    """In which type a step computes, as autocast says, and by what compiled code, if by any."""
    device = model.wte.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.wte.dtype
    return dtype, None if is_static(model) else decoder_step.library(dtype)


class Decoder:
    """A model's weights as a step takes them, and the keys and values of `batch` samples: [L, 2, B, H, T, K].

    Computes as autocast says when it is made; on a CPU with a compiler by `decoder_step.Step`, which holds its own.
    """

    def __init__(self, model: ImageGPT, batch: int):
        s, device = model.shape, model.wte.device
        self.dtype, library = computed(model)
        self.model, self.batch, self.places = model, batch, model.position_embeddings()
        self.static = is_static(model)
        self.product = Linear if self.static else Matrix
        self.eps = torch.full((1, 1), NORM_EPS, device=device)
        self.compiled = None if library is None else decoder_step.Step(library, model, batch, self.dtype, NORM_EPS)
        size = (s.n_layer, 2, batch if library is None else 0, s.n_head, s.n_ctx, s.d_model // s.n_head)
        self.kept = torch.zeros(size, dtype=self.dtype, device=device)
        plain = self.dtype == torch.float32 and not self.static
        self.seen = self.kept.flatten(2, 3) if plain else self.kept  # as `attend` takes them

    @cached_property
    def blocks(self) -> list[tuple[Matrix | Linear, ...]]:
        """Of each block, see decoder_step.folded."""
        return [tuple(self.product(weight, self.dtype) for weight in each) for each in decoder_step.folded(self.model)]

    @cached_property
    def head(self) -> Matrix | Linear:
        return self.product(decoder_step.folded_head(self.model), self.dtype)

    @staticmethod
    def bytes(shape: Shape, width: int) -> int:
        """What is kept of one sample, in numbers of `width` bytes."""
        return 2 * shape.n_layer * shape.n_ctx * shape.d_model * width

    def prefill(self, prompt: Tensor) -> Tensor:
        """Run sos and the prompt, int [B, P], at once; returns the logits of pixel P, [B, V].

        Equal prompts run once, and several together: on a CPU in bf16 as many at any time, since that many rows may
        matter; in float32 two at least, since a last row alone is multiplied by another kernel.
        """
        if self.compiled is not None and not prompt.shape[1]:
            return self.compiled((self.model.sos + self.places[0]).expand(self.batch, -1), 0)
        inputs = F.pad(prompt, (0, 1))  # the last token is not an input
        different, which = inputs.unique(dim=0, return_inverse=True)
        rows_together = ROWS_STATIC if self.static else max(ROWS, NUMBERS // self.model.shape.d_model)
        together, logits = max(rows_together // inputs.shape[1], 1), []
        least = 1 if self.static else 2 if self.dtype == torch.float32 else together
        for first in range(0, len(different), together):
            part = different[first : first + together]
            rows = ((first <= which) & (which < first + len(part))).nonzero()[:, 0]
            n = len(part)
            part = F.pad(part, (0, 0, 0, max(least - n, 0)))
            logits.append(self._prefill(part, rows, which[rows] - first)[:n])
        return torch.cat(logits)[which]

    def _prefill(self, inputs: Tensor, rows: Tensor, which: Tensor) -> Tensor:
        """int [U, P + 1] -> logits [U, V]; sample rows[i] begins as number which[i]."""
        u, p = inputs.shape

        def attend_all(heads: Tensor, layer: int) -> Tensor:
            q, k, v = heads.view(u, p, *heads.shape[1:]).permute(2, 0, 3, 1, 4)
            self._keep(layer, rows, k[which], v[which])
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
            return y.transpose(1, 2).reshape(u * p, -1)

        with torch.autocast(inputs.device.type, enabled=False):
            h = self._blocks(self.model.embed(inputs).flatten(0, 1), attend_all)
            return self.head(self._normed(h.view(u, p, -1)[:, -1]))

    def step(self, token: Tensor, position: int) -> Tensor:
        """Feed pixel `position` - 1, int [B]; returns the logits of pixel `position`, [B, V]."""
        h = F.embedding(token, self.model.wte).add_(self.places[position])
        if self.compiled is not None:
            return self.compiled(h, position)
        new = self.kept[..., position, :].unbind()  # views of all layers at once: each call takes a microsecond
        seen = [part.unbind() for part in self.seen[..., : position + 1, :].unbind(1)]
        q_shape = (*self.seen.shape[2:-2], 1, self.seen.shape[-1])

        def attend_last(heads: Tensor, layer: int) -> Tensor:
            heads = heads.transpose(0, 1)
            new[layer].copy_(heads[1:])
            return attend(heads[0].reshape(q_shape), seen[0][layer], seen[1][layer]).reshape(len(token), -1)

        return self.logits(h, attend_last)

    def logits(self, h: Tensor, attended: Callable[[Tensor, int], Tensor]) -> Tensor:
        """h^0 [B, D] of a position -> [B, V]; `attended` as of `_blocks`."""
        with torch.autocast(h.device.type, enabled=False):
            return self.head(self._normed(self._blocks(h, attended)))

    def _keep(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Keys and values [B', H, P, K] of the first positions of samples `rows`."""
        if self.compiled is not None:
            self.compiled.keep(layer, rows, k, v)
        else:
            self.kept[layer, 0, rows, :, : k.shape[2]], self.kept[layer, 1, rows, :, : k.shape[2]] = k, v

    def _blocks(self, h: Tensor, attended: Callable[[Tensor, int], Tensor]) -> Tensor:
        """h [N, D] through all blocks; `attended`: queries, keys, values [N, 3, H, K] of a layer -> [N, D]."""
        for layer, (qkv, proj, fc, out) in enumerate(self.blocks):
            heads = qkv(self._normed(h)).contiguous().view(len(h), 3, self.model.shape.n_head, -1)
            proj.add(h, attended(heads, layer))
            out.add(h, F.silu(fc(self._normed(h)), inplace=True))
        return h

    def _normed(self, h: Tensor) -> Tensor:
        """h / sqrt(mean(h^2) + eps) in few calls; the gain is in the matrix that follows."""
        if self.static:
            return F.rms_norm(h, h.shape[-1:], eps=NORM_EPS)
        size = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
        return h * torch.addcmul(self.eps, size, size, value=1 / h.shape[-1]).rsqrt_()


def draw(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """logits [B, V], uniform [B] in [0, 1) -> int [B], by inversion of the cumulative distribution.

    temperature 0 takes the most likely colour; top_k 0 and top_p 1 truncate nothing.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    if temperature != 1:
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
    record: Callable[[Sequence[Step]], Sequence[Step]] = lambda steps: steps,
) -> Tensor:
    """prompt int [B, P] (P may be 0), uniform [B, T - P] -> tokens int [B, T], the prompt untouched.

    Both run along the model's sequence, which is the picture in raster order unless its shape says otherwise.
    `advance` is told the number of tokens after every few steps, which a device may yet have to do; `record` makes of
    its steps what runs them, see StaticSteps. Raises ValueError for a model that draws nothing and for lengths that do
    not make T, and FloatingPointError where logits are infinite or no number.
    """
    if not model.shape.can_sample:
        raise ValueError("only autoregressive models can be sampled")
    if not uniform.shape[1] or prompt.shape[1] + uniform.shape[1] != model.shape.n_ctx:
        raise ValueError(f"{prompt.shape[1]} and {uniform.shape[1]} positions of {model.shape.n_ctx} to keep and draw")
    model, b, temperature = cast(ImageGPT, model), len(prompt), temperature if temperature >= COLDEST else 0.0
    size = samples_together(model, b)
    spare = -b % size
    prompt, uniform = F.pad(prompt, (0, 0, 0, spare)), F.pad(uniform, (0, 0, 0, spare))
    decoder, most = Decoder(model, size), torch.zeros((), device=prompt.device)

    def choose(logits: Tensor, number: Tensor) -> Tensor:
        torch.maximum(most, torch.linalg.vector_norm(logits, torch.inf, dtype=torch.float32), out=most)
        return draw(logits, number, temperature, top_k, top_p)

    static = StaticSteps(decoder, prompt.shape[1], choose, record) if decoder.static else None
    drawn = []
    for starts, numbers in zip(prompt.split(size), uniform.split(size)):
        if static is not None:
            drawn.append(static.draw(starts, numbers, advance))
        elif decoder.compiled is not None and not top_k and top_p == 1:
            logits = decoder.prefill(starts)
            drawn.append(decoder.compiled.draw(logits, starts, numbers, temperature, advance))
        else:
            drawn.append(_step_by_step(decoder, starts, numbers, choose, advance))
    if not most.isfinite():
        raise FloatingPointError("logits are not finite")
    return torch.cat(drawn)[:b]


def way_of_steps(model: Model) -> str:
    """How they are computed here: these ways may differ in the last bits, so pictures may too."""
    model = cast(ImageGPT, model)
    return "static" if is_static(model) else "plain" if computed(model)[1] is None else "compiled"


def samples_together(model: ImageGPT, samples: int) -> int:
    """How many of them are drawn at once: equal parts whose keys and values stay in the caches, where steps cost
    little; else all, filled up to the lanes of a matrix product.
    """
    dtype, library = computed(model)
    if library is None:
        return samples + -samples % (LANES if is_static(model) else LANES_CPU)
    most = min(max(KEPT // Decoder.bytes(model.shape, dtype.itemsize), LEAST), MOST)
    return -(-samples // -(-samples // most))


def _step_by_step(
    decoder: Decoder,
    prompt: Tensor,
    uniform: Tensor,
    choose: Callable[[Tensor, Tensor], Tensor],
    advance: Callable[[int], None],
) -> Tensor:
    logits = decoder.prefill(prompt)
    columns = list(prompt.unbind(1))
    for position, number in enumerate(uniform.unbind(1), prompt.shape[1]):
        if position > prompt.shape[1]:
            logits = decoder.step(columns[-1], position)
        columns.append(choose(logits, number))
        advance(len(prompt))
    return torch.stack(columns, dim=1)
