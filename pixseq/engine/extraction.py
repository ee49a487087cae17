"""Features that are still to be computed: what a model, an exported extractor or raw pixels hand to `features`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixseq.artifacts.arrays import Store
from pixseq.artifacts.codec import Codec

Compute = Callable[[np.ndarray, int], np.ndarray]

# What features are a tap of where they are of no model of ours, which has layers: raw colours, a file of torch.export.
PIXELS, EXPORTED = "pixels", "exported"


@dataclass(frozen=True)
class Extraction:
    """One forward pass over `store`, as `codec` sees it, `batch` images at a time.

    `compute` makes of images [B, ...], and the index of the first, their features [layers, B * masks, *row]; a row of
    one layer is [D] or [T, D]. `config` has layers, masks and dtype, `summary` what does not make the numbers, such
    as the model's attention heads for those who attend over its features.
    """

    store: Store
    codec: Codec
    compute: Compute
    row: tuple[int, ...]
    batch: int
    config: dict[str, Any]
    inputs: dict[str, Any]
    meta: dict[str, Any]
    summary: dict[str, Any]
