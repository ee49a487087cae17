"""What a forward pass of any family gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Output:
    """None for what was not asked for or does not exist. T positions, D width, L layers."""

    logits: Tensor | None  # Image GPT: [B, T, V], position p predicts pixel p; AIM: see its forward
    features: list[Tensor] | None  # L + 1 of [B, D] in float32, or of [B, T, D]
    class_logits: Tensor | None  # [B, classes]
