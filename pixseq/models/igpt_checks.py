"""Certificates of Image GPT: causality, the cache, and the loss by its definition.

Shapes: T positions, V colours. Everything here runs along the sequence: a model of another order than raster is first
turned into its twin whose raster order is that sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixseq.models.certificates import STILL, Check, moves, some_positions
from pixseq.models.igpt import ImageGPT
from pixseq.models.objectives import generative_nats, random_mask
from pixseq.models.sampling import Decoder, is_static
from pixseq.models.static_step import StaticSteps
from pixseq.streams import Stream

CACHED = 256  # positions at most that are drawn one by one


def certify(net: ImageGPT, x: Tensor, generator: torch.Generator, close: float) -> Iterator[Check]:
    """The certificates of `net` on tokens int [B, T]. Raises nothing: what does not hold is a check that fails."""
    if net.order is not None:
        yield _same_in_order(net, x, close)
        net, x = _in_raster_order(net), net.to_sequence(x)
    probe = _with_head(net, generator)
    if net.shape.objective == "bert":
        yield from _bert_pattern(probe, x[:1], generator)
    else:
        yield _causality(probe, x[:1], generator)
        if net.shape.shifted:
            yield _cache(probe, x, close)
    if net.shape.head:
        yield _loss(net, x, generator, close)


def _with_head(net: ImageGPT, generator: torch.Generator) -> ImageGPT:
    """The same model, with a random head where it has none or an untrained one: zero logits would show nothing."""
    if net.shape.head and bool(net.head.weight.any()):
        return net
    head = torch.randn(net.shape.n_vocab, net.shape.d_model, generator=generator) / net.shape.d_model**0.5
    return _copy(net, {"head.weight": head.to(net.wte.device)}, head=True)


def _in_raster_order(net: ImageGPT) -> ImageGPT:
    """The twin whose positions are those of the sequence."""
    return _copy(net, {"wpe": net.position_embeddings()}, order="raster")


def _copy(net: ImageGPT, tensors: dict[str, Tensor], **shape: Any) -> ImageGPT:
    """The same model with some tensors, and what its shape says of them, replaced."""
    with torch.device("meta"):
        new = ImageGPT(replace(net.shape, **shape))
    state = {**net.state_dict(), **tensors}
    new.load_state_dict({name: state[name] for name in new.state_dict()}, assign=True)
    return new.eval()


def _same_in_order(net: ImageGPT, x: Tensor, close: float) -> Check:
    """Content, positions, mask and outputs follow one order: the model equals its twin on the sequence."""
    probe = _with_head(net, torch.Generator().manual_seed(Stream.CHECK_HEAD))
    ours, twin = probe(x).logits, _in_raster_order(probe)(net.to_sequence(x)).logits
    worst, scale = float((net.to_sequence(ours) - twin).abs().max()), float(twin.abs().max())
    about = f"largest difference to the model of raster order on the sequence, in {net.shape.order} order: 0"
    return Check("order", worst <= close * scale, worst, about)


def _perturbed(net: ImageGPT, x: Tensor, generator: torch.Generator) -> Iterator[tuple[int, Tensor]]:
    """(t, x with another colour at t) for some t; none where there is one colour only. x is int [1, T]."""
    v = net.shape.n_vocab
    for t in () if v < 2 else some_positions(x.shape[1], generator):
        other = x.clone()
        other[0, t] = (x[0, t] + int(torch.randint(1, v, (1,), generator=generator))) % v
        yield t, other


def _causality(net: ImageGPT, x: Tensor, generator: torch.Generator) -> Check:
    """Change pixel t: the logits that predict pixels <= t stay, some later ones move (unshifted: < t stay)."""
    before = net(x).logits[0]
    scale, leaked, moved, later = float(before.abs().max()), 0.0, 0.0, 0
    for t, other in _perturbed(net, x, generator):
        change = moves(net(other).logits[0], before).amax(-1)
        unseen = t + 1 if net.shape.shifted else t
        leaked = max(leaked, float(change[:unseen].max()) if unseen else 0.0)
        moved = max(moved, float(change[unseen:].max()) if unseen < len(change) else 0.0)
        later += len(change) - unseen
    side = "<= t" if net.shape.shifted else "< t"
    rest = f"later ones move by {moved:.3g}" if later else f"{_single(net)}: nothing later that could move"
    about = f"largest move of a logit at positions {side} when pixel t changes: 0 ({rest})"
    return Check("causality", leaked <= STILL * scale and (moved > STILL * scale or not later), leaked, about)


def _single(net: ImageGPT) -> str:
    """Why there is nothing to test."""
    return "a single colour, which cannot change" if net.shape.n_vocab < 2 else "a single pixel"


def _bert_pattern(net: ImageGPT, x: Tensor, generator: torch.Generator) -> Iterator[Check]:
    """A hidden pixel's colour moves nothing; a visible one moves logits before it and after it."""
    total = x.shape[1]
    before = net(x, torch.zeros_like(x, dtype=torch.bool)).logits[0]
    scale, leaked = float(before.abs().max()), 0.0
    earlier, later = math.inf, math.inf
    for t, other in _perturbed(net, x, generator):
        hidden = torch.zeros_like(x, dtype=torch.bool)
        hidden[0, t] = True
        leaked = max(leaked, float(moves(net(other, hidden).logits, net(x, hidden).logits).max()))
        change = moves(net(other, torch.zeros_like(hidden)).logits[0], before).amax(-1)
        earlier = min(earlier, float(change[:t].max()) if t else math.inf)
        later = min(later, float(change[t + 1 :].max()) if t + 1 < total else math.inf)
    about = "largest move of a logit when a hidden pixel changes: 0"
    yield Check("hidden pixels unseen", leaked <= STILL * scale, leaked, about)
    least = min(earlier, later)
    if not math.isfinite(least):
        yield Check("attention sees all", True, "nothing to test", f"{_single(net)}: no other position to see")
        return
    about = f"least move when a visible pixel changes, before it ({earlier:.3g}) and after it ({later:.3g}): over 0"
    yield Check("attention sees all", STILL * scale < least, least, about)


def _cache(net: ImageGPT, x: Tensor, close: float) -> Check:
    """Logits drawn one by one through the cache against those of a full forward, by the steps that drawing takes."""
    full, drawn = net(x).logits, _by_static_steps if is_static(net) else _one_by_one
    differences = [(logits - full[:, position]).abs().max() for position, logits in drawn(net, x)]
    worst = float(torch.stack(differences).max())  # no number where one of them is none
    about = f"largest difference of a cached logit to the full forward's: under {close:g} of the largest logit"
    return Check("cache", worst <= close * float(full.abs().max()), worst, about)


def _one_by_one(net: ImageGPT, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The first and last positions of x, and the logits [B, V] of each."""
    decoder = Decoder(net, len(x))
    for start, stop in _stretches(x.shape[1]):
        logits = decoder.prefill(x[:, :start])
        for position in range(start, stop):
            if position > start:
                logits = decoder.step(x[:, position - 1], position)
            yield position, logits


def _by_static_steps(net: ImageGPT, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The second half of x, where what is drawn is what stands there."""
    half, found = x.shape[1] // 2, []

    def choose(logits: Tensor, number: Tensor) -> Tensor:
        found.append(logits)
        return number.long()

    steps = StaticSteps(Decoder(net, len(x)), half, choose, lambda steps: steps)
    steps.draw(x[:, :half], x[:, half:].float(), lambda n: None)
    return enumerate(found, half)


def _stretches(total: int) -> list[tuple[int, int]]:
    return [(0, total)] if total <= CACHED else [(0, CACHED // 2), (total - CACHED // 2, total)]


def _loss(net: ImageGPT, x: Tensor, generator: torch.Generator, close: float) -> Check:
    """The loss as `evaluate` has it against its definition, written out: every pixel scored, in float64."""
    masked = None
    content = F.embedding(x, net.wte)
    if net.shape.objective == "bert":
        masked = random_mask(len(x), x.shape[1], generator).to(x.device)
        masked[:, 0] = True  # so that every image has one
        inputs = torch.where(masked[..., None], 0.0, content) + net.wpe
        scored = masked
    else:  # [sos, x_1 .. x_{T-1}] against x_1 .. x_T
        inputs = torch.cat([net.sos.expand(len(x), 1, -1), content[:, :-1]], dim=1) + net.wpe
        scored = torch.ones_like(x, dtype=torch.bool)
    h = inputs
    for block in net.blocks:
        h, _ = block(h)
    log_p = net.head(net.ln_f(h)).double().log_softmax(-1).gather(-1, x[..., None])[..., 0]
    defined = float(-torch.stack([row[seen].mean() for row, seen in zip(log_p, scored)]).mean())
    ours = float(generative_nats(net(x, masked).logits, x, masked).double().mean())
    which = "masked" if masked is not None else f"all {x.shape[1]}"
    chance = math.log(net.shape.n_vocab)
    about = f"nats per token over {which} pixels of {len(x)} images; by definition {defined:.6f}, ln V is {chance:.4f}"
    return Check("loss", abs(ours - defined) <= close * max(defined, 1.0), ours, about)
