"""check: certificates that a checkpoint is what it says, each with its figure.

Shapes: T positions, V colours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pixseq.artifacts.arrays import Store
from pixseq.artifacts.atomic import check_target
from pixseq.artifacts.checkpoint import Checkpoint, weights_id
from pixseq.artifacts.manifest import reference
from pixseq.artifacts.metrics import write_metrics
from pixseq.artifacts.palette import checked_colours, nearest, palette_id
from pixseq.errors import PixseqError
from pixseq.models.igpt import ImageGPT
from pixseq.models.objectives import generative_nats, random_mask
from pixseq.models.sampling import Cache, decode_one, prefill
from pixseq.numerics.quantize import nearest_table, to_tokens
from pixseq.runtime import generator, machine
from pixseq.stages import opening

IMAGES = 4  # of TOKENS, for the loss
CACHED = 256  # positions at most that are drawn one by one
CLOSE = 1e-4  # of the largest logit: what float32 sums in another order differ by
STILL = 1e-6  # of the largest logit: what may not depend on a pixel does not move
TOKEN_STREAM, PROBE_STREAM = 18, 19


@dataclass(frozen=True)
class Check:
    """One certificate: `figure` is what was measured, `about` says what it must be."""

    name: str
    ok: bool
    figure: float | int | str
    about: str


def run(
    model: str | Path,
    tokens: str | Path | None = None,
    out: str | Path | None = None,
    weights: str = "model",
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """{"ok": whether all hold, "checks": [{name, ok, figure, about}]}, written as metrics too when `out` is given.

    Computed in float32, on the first images of `tokens` or on random ones.
    """
    if out is not None:
        check_target(out, overwrite)
    store = opening.open_tokens(tokens) if tokens is not None else None
    with machine(device, "fp32") as where, torch.inference_mode():
        net, checkpoint = opening.open_model(model, where, weights)
        inputs = {"model": reference(model, checkpoint.manifest)}
        checks = list(_file_checks(net, checkpoint, weights))
        if store is not None:
            inputs["tokens"] = reference(tokens, store.manifest)
            checks.append(_pairing(checkpoint, store))
            store = store if checks[-1].ok else None
        if all(bool(torch.isfinite(x).all()) for x in net.state_dict().values()):
            checks += _model_checks(net, _tokens(net, store, seed).to(where.device), seed)
    rows = [{**asdict(check), "figure": _plain(check.figure)} for check in checks]
    numbers = {"ok": all(check.ok for check in checks), "checks": rows}
    if out is not None:
        write_metrics(out, "check", {"weights": weights, "seed": seed}, inputs, numbers, overwrite)
    return numbers


def _plain(figure: float | int | str) -> float | int | str:
    """JSON knows no NaN."""
    return str(figure) if isinstance(figure, float) and not math.isfinite(figure) else figure


def _file_checks(net: ImageGPT, checkpoint: Checkpoint, weights: str) -> Iterator[Check]:
    """What the files say about themselves: content id, finite weights, parameter count, palette."""
    state, summary = net.state_dict(), checkpoint.manifest["summary"]
    id = weights_id(state, checkpoint.codec, checkpoint.shape)
    yield Check("content id", id == summary["weights"].get(weights), id, "the manifest's")
    wild = sum(int((~torch.isfinite(x)).sum()) for x in state.values())
    yield Check("finite weights", wild == 0, wild, "weights that are not finite: 0")
    count, formula = sum(x.numel() for x in state.values()), net.shape.parameter_count()
    yield Check("parameters", count == formula, count, f"the formula's {formula:,}")
    yield from _palette(checkpoint.codec)


def _palette(codec: dict[str, Any]) -> Iterator[Check]:
    if codec["palette"] is None:
        return
    colors = np.array(codec["palette"])
    id = palette_id(colors)
    ok = id == codec["palette_id"] and len(colors) == codec["n_vocab"]
    yield Check("palette", ok, id, f"the {codec['n_vocab']} colours of the model's palette id")
    rgb = checked_colours()
    equal = int((to_tokens(rgb[None], "palette", nearest_table(colors))[0] == nearest(rgb, colors)).sum())
    yield Check("palette self-check", equal == len(rgb), equal, f"colours of {len(rgb)} that become their nearest")


def _pairing(checkpoint: Checkpoint, store: Store) -> Check:
    try:
        opening.check_pairing(checkpoint.path, checkpoint.codec, store)
        opening.some_tokens(store, slice(0, IMAGES))
    except PixseqError as error:
        return Check("pairing", False, str(store.meta["palette_id"]), error.message)
    return Check("pairing", True, str(store.meta["palette_id"]), "model and tokens: one palette, size and scheme")


def _tokens(net: ImageGPT, store: Store | None, seed: int) -> Tensor:
    """int [IMAGES or fewer, T]: the first of the store, or random ones."""
    if store is not None:
        return torch.from_numpy(opening.some_tokens(store, slice(0, IMAGES)).astype(np.int64))
    return torch.randint(net.shape.n_vocab, (IMAGES, net.shape.n_ctx), generator=generator(seed, TOKEN_STREAM))


def _model_checks(net: ImageGPT, x: Tensor, seed: int) -> Iterator[Check]:
    probe = _with_head(net, seed)
    if net.shape.objective == "bert":
        yield from _bert_pattern(probe, x[:1], seed)
    else:
        yield _causality(probe, x[:1], seed)
        if net.shape.shifted:
            yield _cache(probe, x)
    if net.shape.head:
        yield _loss(net, x, seed)


def _with_head(net: ImageGPT, seed: int) -> ImageGPT:
    """The same model, with a random head where it has none or an untrained one: zero logits would show nothing."""
    if net.shape.head and bool(net.head.weight.any()):
        return net
    with torch.device("meta"):
        probe = ImageGPT(replace(net.shape, head=True))
    d = net.shape.d_model
    head = torch.randn(net.shape.n_vocab, d, generator=generator(seed, PROBE_STREAM)) / d**0.5
    probe.load_state_dict({**net.state_dict(), "head.weight": head.to(net.wte.device)}, assign=True)
    return probe.eval()


def _perturbed(net: ImageGPT, x: Tensor, seed: int) -> Iterator[tuple[int, Tensor]]:
    """(t, x with another colour at t) for the ends, the middle and some positions between. x is int [1, T]."""
    total, v = x.shape[1], net.shape.n_vocab
    stream = generator(seed, PROBE_STREAM)
    some = torch.randint(total, (4,), generator=stream).tolist()
    for t in sorted({0, 1 % total, total // 2, max(total - 2, 0), total - 1, *some}):
        other = x.clone()
        other[0, t] = (x[0, t] + int(torch.randint(1, v, (1,), generator=stream))) % v
        yield t, other


def _causality(net: ImageGPT, x: Tensor, seed: int) -> Check:
    """Change pixel t: the logits that predict pixels <= t stay, some later ones move (unshifted: < t stay)."""
    before = net(x).logits[0]
    scale, leaked, moved = float(before.abs().max()), 0.0, 0.0
    for t, other in _perturbed(net, x, seed):
        change = (net(other).logits[0] - before).abs().amax(-1)
        unseen = t + 1 if net.shape.shifted else t
        leaked = max(leaked, float(change[:unseen].max()) if unseen else 0.0)
        moved = max(moved, float(change[unseen:].max()) if unseen < len(change) else 0.0)
    side = "<= t" if net.shape.shifted else "< t"
    about = f"largest move of a logit at positions {side} when pixel t changes: 0 (later ones move by {moved:.3g})"
    return Check("causality", leaked <= STILL * scale and moved > STILL * scale, leaked, about)


def _bert_pattern(net: ImageGPT, x: Tensor, seed: int) -> Iterator[Check]:
    """A hidden pixel's colour moves nothing; a visible one moves logits before it and after it."""
    total = x.shape[1]
    before = net(x, torch.zeros_like(x, dtype=torch.bool)).logits[0]
    scale, leaked = float(before.abs().max()), 0.0
    earlier, later = math.inf, math.inf
    for t, other in _perturbed(net, x, seed):
        hidden = torch.zeros_like(x, dtype=torch.bool)
        hidden[0, t] = True
        leaked = max(leaked, float((net(other, hidden).logits - net(x, hidden).logits).abs().max()))
        change = (net(other, torch.zeros_like(hidden)).logits[0] - before).abs().amax(-1)
        earlier = min(earlier, float(change[:t].max()) if t else math.inf)
        later = min(later, float(change[t + 1 :].max()) if t + 1 < total else math.inf)
    about = "largest move of a logit when a hidden pixel changes: 0"
    yield Check("hidden pixels unseen", leaked <= STILL * scale, leaked, about)
    least = min(earlier, later)
    about = f"least move when a visible pixel changes, before it ({earlier:.3g}) and after it ({later:.3g}): over 0"
    yield Check("attention sees all", total == 1 or STILL * scale < least < math.inf, least, about)


def _cache(net: ImageGPT, x: Tensor) -> Check:
    """Logits drawn one by one through the cache against those of a full forward, at the first and last positions."""
    full, total = net(x).logits, x.shape[1]
    cache, worst = Cache.empty(net, len(x), net.wte.dtype), 0.0
    for start, stop in _stretches(total):
        logits = prefill(net, x[:, :start], cache)
        for position in range(start, stop):
            if position > start:
                logits = decode_one(net, x[:, position - 1], position, cache)
            worst = max(worst, float((logits - full[:, position]).abs().max()))
    about = f"largest difference of a cached logit to the full forward's: under {CLOSE:g} of the largest logit"
    return Check("cache", worst <= CLOSE * float(full.abs().max()), worst, about)


def _stretches(total: int) -> list[tuple[int, int]]:
    return [(0, total)] if total <= CACHED else [(0, CACHED // 2), (total - CACHED // 2, total)]


def _loss(net: ImageGPT, x: Tensor, seed: int) -> Check:
    """The loss as `evaluate` has it against its definition, written out: every pixel scored, in float64."""
    masked = None
    content = F.embedding(x, net.wte)
    if net.shape.objective == "bert":
        masked = random_mask(*x.shape, generator(seed, TOKEN_STREAM)).to(x.device)
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
    return Check("loss", abs(ours - defined) <= CLOSE * max(defined, 1.0), ours, about)
