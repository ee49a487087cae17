"""Calls of torch's operators that would read or write beyond tensors, leave a result as memory was, or end the process.

torch's own functions ask what is asked here before they call these operators; a file may call them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

NORMS = {
    "native_batch_norm",
    "native_group_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
}
SAMPLERS = {"grid_sampler", "grid_sampler_2d", "grid_sampler_3d"}
SMOOTH_RESIZES = {"_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa"}
DIVISIONS = {"div", "div_", "divide"}


def check_reach(name: str, given: Mapping[str, Any]) -> None:
    """Raises ValueError where an aten operator is `given` arguments, by name, that do not fit each other."""
    if name in NORMS:
        _check_norm(name, given)
    elif name == "_scaled_dot_product_flash_attention_for_cpu":
        _check_attention(given["query"], given["key"], given["value"])
    elif name == "lstm" and "input" in given:
        _check_lstm(given)
    elif name == "median" and "dim" in given and 0 in given["self"].stride():
        raise ValueError("the median along an axis of a tensor that is expanded")
    elif name in SAMPLERS and not {given["interpolation_mode"], given["padding_mode"]} <= {0, 1, 2}:
        raise ValueError(f"{name} knows no mode {given['interpolation_mode']} or no padding {given['padding_mode']}")
    elif name in SMOOTH_RESIZES and "scales_h" in given:  # else the scales are computed
        _check_resize(name, given)
    elif name in DIVISIONS and given.get("rounding_mode") == "trunc":
        _check_division(given["self"], given["other"])


def _check_norm(name: str, given: Mapping[str, Any]) -> None:
    channels = given["C"] if "C" in given else given["input"].shape[1]
    for each in ("weight", "bias", "running_mean", "running_var"):
        x = given.get(each)
        if x is not None and not (x.shape == (channels,) and x.is_contiguous()):
            strides = list(x.stride())
            raise ValueError(f"{name} of {channels} channels is given a {each} of {list(x.shape)}, strides {strides}")


def _check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Queries [B, H, T, K], keys and values [B, G, S, K] where G divides H, numbers of a head side by side."""
    shapes = [list(x.shape) for x in (q, k, v)]
    if any(x.ndim != 4 or not x.numel() or x.stride(3) != 1 for x in (q, k, v)):
        raise ValueError(f"attention of {shapes}, of which one is empty, or does not lie head by head")
    if k.shape != v.shape or len(q) != len(k) or q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention of queries, keys and values {shapes}, which do not fit")


def _check_lstm(given: Mapping[str, Any]) -> None:
    """Of each layer and direction weights [4 H, width] and [4 H, H], biases [4 H]; states of all [L, B, H]."""
    (state, cell), x = given["hx"], given["input"]
    if state.shape[-1] != cell.shape[-1]:
        return  # a projection follows: torch asks itself
    directions, of_one = 1 + given["bidirectional"], 2 + 2 * given["has_biases"]
    cells, wide = given["num_layers"] * directions, state.shape[-1]
    states = (cells, x.shape[0 if given["batch_first"] else 1], wide)
    fits = state.shape == cell.shape == states and len(given["params"]) == cells * of_one
    for i, each in enumerate(given["params"]):
        width = x.shape[2] if i < directions * of_one else wide * directions
        fits &= each.shape == ((4 * wide, width), (4 * wide, wide), (4 * wide,), (4 * wide,))[i % of_one]
    if not fits:
        raise ValueError(f"lstm of {list(x.shape)} is given states {list(state.shape)} or weights that do not fit")


def _check_resize(name: str, given: Mapping[str, Any]) -> None:
    """A scale of n makes no more than n times a side: another leads outside the picture."""
    sizes = zip(given["self"].shape[2:], given["output_size"], (given["scales_h"], given["scales_w"]))
    for side, target, scale in sizes:
        if scale is not None and not target <= side * scale:
            raise ValueError(f"{name} makes {target} of {side}, and is given a scale of {scale}")


def _check_division(x: Any, other: Any) -> None:
    """The least whole number has no negative: a processor stops at it."""
    whole = not any(
        each.is_floating_point() if isinstance(each, Tensor) else isinstance(each, float) for each in (x, other)
    )
    if whole and bool((other == -1).any() if isinstance(other, Tensor) else other == -1):
        raise ValueError("whole numbers are divided by -1")
