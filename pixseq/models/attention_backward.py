"""The way back through attention in C: see attention_backward.c."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from pixseq import native

OF_TYPE: dict[torch.dtype, tuple[str, ...]] = {torch.float32: (), torch.bfloat16: ("-DBF16",)}


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The code for activations of this type. None: there is no such, or no compiler."""
    if dtype not in OF_TYPE:
        return None
    return native.library(Path(__file__).with_suffix(".c"), (*OF_TYPE[dtype], *native.THREADS))


class Work(ctypes.Structure):
    """`struct work`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "y", "dy", "logsumexp", "dqkv")),
        *((name, ctypes.c_int32) for name in ("batch", "positions", "heads", "size", "causal", "threads")),
    )


def backward(
    code: ctypes.CDLL, dy: Tensor, qkv: Tensor, y: Tensor, logsumexp: Tensor, n_head: int, causal: bool
) -> Tensor:
    """See attention.attended_backward. Raises MemoryError."""
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    arrays = [x.contiguous() for x in (qkv, y, dy, logsumexp)]
    batch, positions, width = y.shape
    sizes = batch, positions, n_head, width // n_head, causal, torch.get_num_threads()
    work = Work(*(x.data_ptr() for x in (*arrays, dqkv)), *sizes)
    if not code.backward(ctypes.byref(work)):
        raise MemoryError("no room to go back through attention in")
    return dqkv
