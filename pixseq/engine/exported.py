"""Features of pictures by an extractor that another program has exported (interop/torch_export.py), for `features`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pixseq.artifacts.manifest import reference
from pixseq.engine.extraction import EXPORTED, Compute, Extraction
from pixseq.engine.image_store import open_images, seen_images
from pixseq.errors import UsageError
from pixseq.interop.torch_export import Exported, open_exported
from pixseq.runtime import Machine

BATCH = 64


def extraction(where: Machine, model: str | Path, tokens: str | Path, batch_size: int | None, dtype: str) -> Extraction:
    """The features of a store, as the only layer 0. Raises UsageError for pictures of several sizes."""
    extractor = open_exported(model)
    store = open_images(tokens, "tokens", "pixels")
    if store.whole:
        raise UsageError(f"{tokens} holds whole pictures, {model} takes one size", "encode squares: --resize crop")
    compute = _compute(where, extractor, store)
    inputs = {
        "tokens": reference(tokens, store.manifest),
        "model": {"path": str(model), "id": extractor.id},
    }
    config: dict[str, Any] = {"layers": [0], "pool": "none", "dtype": dtype, "masks": 1, "precision": "fp32"}
    meta = {
        "layers": [0],
        "masks": 1,
        "class_names": store.codec.class_names,
        "height": store.codec.height,
        "width": store.codec.width,
        "tap": EXPORTED,
        "pool": "none",
    }
    row = compute(seen_images(store, slice(0, 1)), 0).shape[2:]
    summary = {"device": str(where.device)}
    return Extraction(store, store.codec, compute, row, batch_size or BATCH, config, inputs, meta, summary)


def check(where: Machine, model: str | Path, store: Any) -> int:
    """The width of its features of the pictures of a store. Raises PixseqError where it takes no such pictures."""
    return _compute(where, open_exported(model), store)(seen_images(store, slice(0, 2)), 0).shape[-1]


def _compute(where: Machine, extractor: Exported, store: Any) -> Compute:
    """images [B, ...], index of the first -> [1, B, D]: their colours in [0, 1], channels first, through the model."""
    store.codec.must_have_colours(store.path)
    there = extractor.on(where.device)

    @torch.inference_mode()
    def compute(images: np.ndarray, first: int) -> np.ndarray:
        pictures = store.codec.to_images(images)
        x = torch.from_numpy(pictures).to(where.device).permute(0, 3, 1, 2).float() / 255
        return there.features(x.contiguous())[None].cpu().numpy()

    return compute
