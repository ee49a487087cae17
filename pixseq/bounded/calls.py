"""Calls of torch's operators that a file asks for: what they would make is measured before memory is taken for it.

A few letters make a tensor of any size (zeros, expand, pad, repeat). So each call is first made on the meta device,
whose tensors have shapes and no numbers, and what torch composes of smaller calls is measured in each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pixseq.bounded.reach import check_reach

MOST_PARTS = 10_000  # tensors that one call makes: each takes memory however small it is
MOST_NUMBER = 1 << 63
LISTS = {"unbind", "split", "unsafe_split", "chunk", "unsafe_chunk", "tensor_split", "vsplit", "lstm", "gru"}


class TooLarge(ValueError):
    """A call that would make more than is allowed."""


def check_numbers(args: Sequence[Any], result: Any = 0) -> None:
    """Python's own operators take numbers, of a size that sizes have. Raises ValueError: a text times 10^9 is one."""
    for value in (*args, result):
        if not isinstance(value, bool | int | float) or (isinstance(value, int) and abs(value) >= MOST_NUMBER):
            raise ValueError(f"an operator of numbers is given a {type(value).__name__}, or one too large")


def check_call(call: Any, args: Sequence[Any], named: Mapping[str, Any], room: int) -> None:
    """Raises TooLarge for a call of an aten operator whose results or steps take more than `room` bytes together.

    What depends on values, such as the places that are not zero, is measured by them. Raises what the call raises, and
    ValueError where torch would not ask whether arguments fit each other.
    """
    schema = call._schema
    given = {a.name: a.default_value for a in schema.arguments if a.has_default_value()} | dict(named)
    given |= {a.name: value for a, value in zip(schema.arguments, args)}
    name = schema.name.partition("::")[2]
    check_reach(name, given)
    if name in LISTS and _parts(given) > MOST_PARTS:
        raise TooLarge(f"{name} would make {_parts(given):,} tensors, more than {MOST_PARTS:,}")
    made = _by_values(name, given)
    if made is not None:
        _spend(name, made, room)
    elif name not in ("item", "tensor_split"):
        sizes = _Sizes(room)
        with torch.inference_mode(False), torch.no_grad(), sizes:  # in inference mode torch hides its smaller calls
            call(*(_bare(each) for each in args), **{key: _bare(value) for key, value in named.items()})


def _parts(given: Mapping[str, Any]) -> int:
    """How many tensors a call of LISTS makes, at most; of a recurrent network its steps."""
    shape = given["input"].shape if "input" in given else given["self"].shape
    along = shape[given["dim"]] if given.get("dim") is not None and shape else max(shape, default=1)
    for key in ("split_size", "chunks", "sections", "tensor_indices_or_sections", "indices"):
        if isinstance(given.get(key), int):
            return -(-along // max(given[key], 1)) if key == "split_size" else given[key]
        if key in given:
            return len(given[key])
    return along


def _by_values(name: str, given: Mapping[str, Any]) -> int | None:
    """Bytes of the result of a call that no shape tells; None for all others."""
    x: Any = given.get("self")
    if name in ("nonzero", "where") and set(given) <= {"self", "condition"}:
        x = given.get("condition", x)
        return 8 * x.numel() * max(x.ndim, 1)
    if name == "masked_select":
        return math.prod(torch.broadcast_shapes(x.shape, given["mask"].shape)) * x.element_size()
    if name == "one_hot":
        classes = given["num_classes"]
        return 8 * x.numel() * (int(x.max()) + 1 if classes < 0 and x.numel() else max(classes, 0))
    if name == "repeat_interleave" and isinstance(given["repeats"], Tensor):
        times, dim = int(given["repeats"].sum()), given.get("dim")
        if x is None:
            return 8 * times
        row = 1 if dim is None else x.numel() // max(x.shape[dim], 1)
        return (times * (x.numel() if given["repeats"].numel() == 1 and dim is None else row) + times) * 8
    if name in ("index", "_unsafe_index") and any(_is_mask(each) for each in given["indices"]):
        return None if x is None else _masked_index(x, given["indices"])
    return None


def _is_mask(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)


def _masked_index(x: Tensor, indices: Sequence[Tensor | None]) -> int:
    """Bytes of x[indices], where a mask picks as many places as it has."""
    axes = sum(0 if each is None else each.ndim if _is_mask(each) else 1 for each in indices)
    picked = [(int(each.sum()),) if _is_mask(each) else each.shape for each in indices if each is not None]
    rest = math.prod(x.shape[axes:]) * math.prod(n for n, each in zip(x.shape, indices) if each is None)
    return x.element_size() * math.prod(torch.broadcast_shapes(*picked)) * rest


class _Sizes(TorchDispatchMode):
    """Adds up what calls make of memory; each result, though it be but a view, fits the room too."""

    def __init__(self, room: int):
        super().__init__()
        self.room, self.made = room, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if any(argument.name == "device" for argument in func._schema.arguments):
            kwargs["device"] = torch.device("meta")
        found = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        views = any(each.alias_info is not None for each in func._schema.returns)
        for x in _tensors(found):
            size = x.numel() * x.element_size()
            _spend(name, size, self.room)
            self.made += 0 if views else size
        if name in ("convolution", "_convolution", "convolution_overrideable"):
            self.made += _unfolded(args[0], args[1], args[6], found)
        _spend(name, self.made, self.room)
        return found


def _unfolded(x: Tensor, weight: Tensor, transposed: bool, out: Tensor) -> int:
    """Bytes of the matrix that a convolution unfolds its picture to where it has no routine of its own."""
    if x.dtype == torch.float32:
        return 0
    places = math.prod((x if transposed else out).shape[2:])
    return len(x) * places * (weight.numel() // max(len(weight), 1)) * x.element_size()


def _spend(name: str, made: int, room: int) -> None:
    if made > room:
        raise TooLarge(f"{name} would make tensors of {made:,} bytes, {room:,} are left for it")


def _tensors(found: Any) -> Iterator[Tensor]:
    for each in found if isinstance(found, tuple | list) else (found,):
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, tuple | list):
            yield from _tensors(each)


def _bare(value: Any) -> Any:
    """An argument without its numbers."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, list):
        return [_bare(each) for each in value]
    return torch.device("meta") if isinstance(value, torch.device) else value


def live_bytes(values: Iterator[Any]) -> int:
    """What the tensors among `values` hold, each storage counted once."""
    held = {}
    for x in _tensors(list(values)):
        storage = x.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())
