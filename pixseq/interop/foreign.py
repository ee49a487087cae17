"""What every reader of other programs' weights hands over, and what they share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixseq.errors import PixseqError

NOT_OURS = "this variant of the model cannot be expressed, so it is not imported"


@dataclass(frozen=True)
class Foreign:
    """Weights of another program by our names. `shape` holds the fields of the family's shape."""

    shape: dict[str, Any]
    weights: dict[str, Tensor]  # float32 on the CPU, contiguous, no two sharing memory
    files: list[Path]  # those that identify what was read
    notes: list[str]  # what the user should hear: what was skipped, in words
    class_names: list[str] | None = None
    palette: Path | None = None  # a palette file found beside the weights
    config: dict[str, Any] = field(default_factory=dict)  # what else the files said, for the record
    positions: dict[str, Tensor] = field(default_factory=dict)  # fixed ones that were stored: to equal those computed


def as_weight(file: Path, name: str, values: Tensor) -> Tensor:
    """`values` as float32. Raises PixseqError for integers and for values that are, or become, non-finite."""
    if not values.is_floating_point():
        raise PixseqError(
            f"{name} in {file} holds {type_name(values.dtype)}, not weights",
            "quantized weights are not read: take them in a floating-point type",
        )
    values = values.to(torch.float32)
    if not torch.isfinite(values).all():
        raise PixseqError(f"{name} in {file} holds non-finite values", "take another checkpoint of that run")
    return values


def type_name(dtype: torch.dtype) -> str:
    """float32, where torch says torch.float32."""
    return str(dtype).removeprefix("torch.")
