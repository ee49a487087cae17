"""Certificates of AIM: its attention masks, which patches are scored, and the loss by its definition.

Shapes: K patches, P values a patch. Positions run along the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pixseq.models.aim import AIM, nearest_code, normalised, patchify, unpatchify
from pixseq.models.certificates import STILL, Check, moves, some_positions


def certify(net: AIM, x: Tensor, generator: torch.Generator, close: float) -> Iterator[Check]:
    """The certificates of `net` on pictures uint8 [B, H, W, 3]."""
    with using(net, "bidirectional"):
        yield _sees_all(net, x[:1], generator)
    with using(net, "causal"):
        yield _causality(net, x[:1], None, "causality", generator)
    with using(net, "prefix"):
        masked = _prefixes(net, x[:1], generator)
        yield _causality(net, x[:1], masked, "prefix causality", generator)
        yield _truth_table(net, x[:1], generator)
        yield _supervised(net, x, generator)
    if net.shape.head:
        with using(net, net.shape.pretraining_attention):
            yield _loss(net, x, generator, close)


def _prefixes(net: AIM, x: Tensor, generator: torch.Generator) -> Tensor:
    """A random prefix of each of the images x, bool [B, K], where prefix attention is in use."""
    masked = net.draw_masks(len(x), generator)
    assert masked is not None
    return masked.to(x.device)


@contextmanager
def using(net: AIM, attention: str) -> Iterator[None]:
    before, net.attention = net.attention, attention
    try:
        yield
    finally:
        net.attention = before


def outputs(net: AIM, x: Tensor, masked: Tensor | None = None) -> Tensor:
    """What the prediction head reads (it acts patch by patch), along the sequence: [B, K, D]."""
    last = net(x, masked, logits=False, unpooled=True).features[-1]
    return net.ln_f(net.to_sequence(last))


def perturbed(net: AIM, x: Tensor, generator: torch.Generator) -> Iterator[tuple[int, Tensor]]:
    """(k, x with every value of the sequence's patch k moved) for some k. x is [1, H, W, 3]."""
    patches = net.to_sequence(patchify(x, net.shape.patch_size))
    for k in some_positions(net.shape.n_ctx, generator):
        other = patches.clone()
        other[0, k] += 128  # uint8 wraps around: another value everywhere
        yield k, unpatchify(net.to_grid(other), net.shape.height, net.shape.width)


def _causality(net: AIM, x: Tensor, masked: Tensor | None, name: str, generator: torch.Generator) -> Check:
    """Change patch k: no prediction of a target <= k moves that is scored, that is, lies outside the prefix."""
    before = outputs(net, x, masked)[0]
    total, prefix = len(before), 0 if masked is None else int((~masked).sum())
    scale, leaked, moved = float(before.abs().max()), 0.0, 0.0
    for k, other in perturbed(net, x, generator):
        change = moves(outputs(net, other, masked)[0], before).amax(-1)
        # position p predicts target p + 1; in the prefix, all of the prefix is seen and nothing is scored
        unseen = change[max(prefix - 1, 0) : k] if k >= prefix else change[:0]
        later = change[k : total - 1]
        leaked = max(leaked, float(unseen.max()) if len(unseen) else 0.0)
        moved = max(moved, float(later.max()) if len(later) else 0.0)
    outside = "" if masked is None else f" outside a prefix of {prefix}"
    about = (
        f"largest move of what predicts a target <= k{outside} when patch k changes: 0 (later ones move by {moved:.3g})"
    )
    return Check(name, leaked <= STILL * scale and moved > STILL * scale, leaked, about)


def _sees_all(net: AIM, x: Tensor, generator: torch.Generator) -> Check:
    """With the attention of use every patch reaches every position."""
    before = outputs(net, x)[0]
    least = min(
        float((outputs(net, other)[0] - before).abs().amax(-1).min()) for _, other in perturbed(net, x, generator)
    )
    return Check("bidirectional sees all", least > 0, least, "least move of any position when a patch changes: over 0")


def _truth_table(net: AIM, x: Tensor, generator: torch.Generator) -> Check:
    """Query q is moved by key k exactly if k <= q or k lies in the prefix, read off the first block.

    The first block alone: in deeper ones a query also sees through the positions that it sees.
    """
    total = net.shape.n_ctx
    size = max(total // 2, 1)
    masked = (torch.arange(total, device=x.device) >= size)[None]

    def first_block(pictures: Tensor) -> Tensor:
        return net.to_sequence(net(pictures, masked, logits=False, unpooled=True).features[1])[0]

    before, wrong, seen = first_block(x), 0, 0
    queries = torch.arange(total, device=x.device)
    for k, other in perturbed(net, x, generator):
        moved = (first_block(other) - before).abs().amax(-1) > STILL * float(before.abs().max())
        allowed = (queries >= k) | (k < size)
        wrong += int((moved != allowed).sum())
        seen += total
    about = f"wrong entries of {seen} of the table `key < {size} or key <= query`: 0"
    return Check("prefix mask", wrong == 0, wrong, about)


def _supervised(net: AIM, x: Tensor, generator: torch.Generator) -> Check:
    """Of K patches after a prefix of S, K - S are scored."""
    masked = _prefixes(net, x, generator)
    sizes = (~masked).sum(1)
    wanted = int((net.shape.n_ctx - sizes).sum())
    counted = net.scored(len(x), masked)
    about = f"scored targets of prefixes {sizes.tolist()} of {net.shape.n_ctx} patches: {wanted}"
    return Check("supervised targets", counted == wanted and int(sizes.min()) >= 1, counted, about)


def _loss(net: AIM, x: Tensor, generator: torch.Generator, close: float) -> Check:
    """The loss as it is trained on against its definition, target by target in float64."""
    masked = net.draw_masks(len(x), generator)
    masked = None if masked is None else masked.to(x.device)
    output = net(x, masked)
    assert output.logits is not None
    total, count = 0.0, 0
    patches = net.patches(x)
    for image in range(len(x)):
        for k in range(1, net.shape.n_ctx):
            if masked is not None and not masked[image, k]:
                continue
            predicted, patch = output.logits[image, k - 1].double(), patches[image, k].double()
            if net.shape.target == "codes":
                code = int(nearest_code(patches[image, k][None, None], net.codes))
                total -= float(predicted.log_softmax(-1)[code])
            else:
                target = normalised(patch[None])[0][0] if net.shape.target == "norm-pixels" else patch
                total += float((predicted - target).square().mean())
            count += 1
    defined = total / count
    ours = float(net.losses(output, x, masked).double().sum()) / net.scored(len(x), masked)
    about = f"{net.shape.target} loss over {count} targets of {len(x)} images; by definition {defined:.6f}"
    return Check("loss", abs(ours - defined) <= close * max(defined, 1.0), ours, about)
