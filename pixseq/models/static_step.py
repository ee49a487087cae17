"""A decoder's step that a device can record once and repeat: from one to the next nothing changes but numbers in its
memory, the position among them, and nobody waits for any.

A step reads keys and values up to an end that is fixed, those yet to come masked. With one end for all, sampling would
read twice what it needs; with one at each eighth of the positions it reads an eighth more.
Shapes: B samples, T positions, P prompt tokens, D width, H heads, K head width, V colours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pixseq.models.attention_mask import attend_masked

if TYPE_CHECKING:
    from pixseq.models.sampling import Decoder  # which imports this module

Step = Callable[[], None]
PARTS, LEAST = 8, 64  # of the positions at most, and positions of a part


class StaticSteps:
    """Draws a decoder's samples after prompts of `kept` tokens; `choose`: logits [B, V], uniform [B] -> int [B].

    `record` is given the steps, one an end, and may run each once: what a drawing starts from is set after that.
    """

    def __init__(
        self,
        decoder: Decoder,
        kept: int,
        choose: Callable[[Tensor, Tensor], Tensor],
        record: Callable[[Sequence[Step]], Sequence[Step]],
    ):
        total, device = decoder.model.shape.n_ctx, decoder.kept.device
        self.decoder, self.kept, self.choose = decoder, kept, choose
        self.tokens = torch.zeros(decoder.batch, total, dtype=torch.int64, device=device)
        self.uniform = torch.zeros(decoder.batch, total, device=device)
        self.all_positions = torch.arange(total, device=device)
        self.position = torch.ones(1, dtype=torch.int64, device=device)
        self.part = max(-(-total // PARTS), LEAST)
        parts = sorted({position // self.part for position in range(kept + 1, total)})
        steps = record([partial(self.step, min((part + 1) * self.part, total)) for part in parts])
        self.steps = dict(zip(parts, steps, strict=True))

    def draw(self, prompt: Tensor, uniform: Tensor, advance: Callable[[int], None]) -> Tensor:
        """int [B, P], [B, T - P] -> tokens int [B, T]."""
        self.tokens[:, : self.kept] = prompt
        self.uniform[:, self.kept :] = uniform
        self.tokens[:, self.kept] = self.choose(self.decoder.prefill(prompt), uniform[:, 0])
        self.position.fill_(self.kept + 1)
        advance(len(prompt))
        for position in range(self.kept + 1, self.tokens.shape[1]):
            self.steps[position // self.part]()
            advance(len(prompt))
        return self.tokens.clone()

    def step(self, end: int) -> None:
        """Draw the pixel at `position`, which lies below `end`, and go on to the next."""
        decoder, position = self.decoder, self.position
        token = self.tokens.index_select(1, position - 1)[:, 0]
        h = F.embedding(token, decoder.model.wte).add_(decoder.places.index_select(0, position))
        mask = torch.zeros(1, end, dtype=decoder.dtype, device=h.device)
        mask.masked_fill_(self.all_positions[:end] > position, -torch.inf)

        def attend_seen(heads: Tensor, layer: int) -> Tensor:
            kept, heads = decoder.kept[layer], heads.transpose(0, 1).unsqueeze(-2)
            kept.index_copy_(3, position, heads[1:])
            k, v = kept[..., :end, :]
            return attend_masked(heads[0], k, v, mask, scale=1.0).flatten(1)

        logits = decoder.logits(h, attend_seen)
        chosen = self.choose(logits, self.uniform.index_select(1, position)[:, 0])
        self.tokens.index_copy_(1, position, chosen[:, None])
        position.add_(1)
