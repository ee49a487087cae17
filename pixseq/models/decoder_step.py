"""A decoder's step as one call of C, which a compiler turns into code for this machine when it is first used.

Some two hundred small operators a step cost more than what they compute, so a CPU with a compiler takes this way, and
any other machine the plain one of sampling.py: the same numbers to rounding.
Shapes: B samples, T positions, P of a prompt, D width, H heads, K head width, V colours, L layers.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pixseq import native
from pixseq.models.inference import SLOPE

if TYPE_CHECKING:
    from pixseq.models.igpt import ImageGPT

MATRICES = 4  # of a block
PANEL, BLOCK, STRIDE = 32, 16, 16  # as in decoder_step.c
OF_TYPE: dict[torch.dtype, tuple[str, ...]] = {torch.float32: (), torch.bfloat16: ("-DBF16",)}
WORK = 1 << 15  # multiplications of a matrix that are worth a thread: it waits for the others after each
STEPS, AT_ONCE = 16, 1 << 30  # of a call at most, and multiplications: a hundredth of a second


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The code for weights of this type. None: there is no such, or no compiler."""
    if dtype not in OF_TYPE:
        return None
    return native.library(Path(__file__).with_suffix(".c"), (*OF_TYPE[dtype], *native.THREADS))


ARRAYS = (
    *("qkv", "proj", "fc", "out", "head", "keys", "values"),
    *("h", "heads", "attended", "inner", "logits"),
    *("embeddings", "places", "uniform", "tokens"),
)
NUMBERS = ("n_layer", "n_head", "d_model", "n_vocab", "n_ctx", "batch", "threads", "wild")


class State(ctypes.Structure):
    """`struct step`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ARRAYS),
        *((name, ctypes.c_int32) for name in NUMBERS),
        ("eps", ctypes.c_float),
        ("temperature", ctypes.c_float),
    )


class Step:
    """A model's weights as decoder_step.c takes them, and the keys and values of `batch` samples."""

    def __init__(self, library: ctypes.CDLL, model: ImageGPT, batch: int, dtype: torch.dtype, eps: float):
        s = model.shape
        self.library, self.shape, self.batch, self.multiplied = library, s, batch, batch * s.block_count()
        size, lead, places = s.d_model // s.n_head, (s.n_layer, batch, s.n_head), rounded(s.n_ctx, BLOCK)
        widths = {"h": 1, "heads": 3, "attended": 1, "inner": 4}
        self.arrays = {
            **{name: panels(matrices, dtype) for name, matrices in zip(ARRAYS, zip(*folded(model)))},
            "head": panels([folded_head(model)], dtype),
            "keys": torch.zeros(*lead, places // BLOCK, size, BLOCK, dtype=dtype),
            "values": torch.zeros(*lead, rounded(size, BLOCK) // BLOCK, places, BLOCK, dtype=dtype),
            **{name: torch.zeros(batch, columns(n * s.d_model)) for name, n in widths.items()},
            "logits": torch.zeros(batch, columns(s.n_vocab)),
            "embeddings": model.wte.detach().float().contiguous(),
            "places": model.position_embeddings().detach().float().contiguous(),
        }
        self.state = State(**{name: array.data_ptr() for name, array in self.arrays.items()}, batch=batch, eps=eps)
        for name in ("n_layer", "n_head", "d_model", "n_vocab", "n_ctx"):
            setattr(self.state, name, getattr(s, name))

    def keep(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Keys and values [B', H, P, K] of the first positions of samples `rows`."""
        p, size = k.shape[-2:]
        k = F.pad(k, (0, 0, 0, -p % BLOCK)).unflatten(-2, (-1, BLOCK)).mT
        v = F.pad(v, (0, -size % BLOCK)).unflatten(-1, (-1, BLOCK)).transpose(-2, -3)
        self.arrays["keys"][layer, rows, :, : k.shape[-3]] = k
        self.arrays["values"][layer, rows, :, :, :p] = v

    def __call__(self, h: Tensor, position: int) -> Tensor:
        """h^0 [B, D] of a position -> logits [B, V]."""
        self.arrays["h"][:, : self.shape.d_model] = h
        self._call(self.library.step, position)
        return self.arrays["logits"][:, : self.shape.n_vocab].clone()

    def draw(
        self, logits: Tensor, prompt: Tensor, uniform: Tensor, temperature: float, advance: Callable[[int], None]
    ) -> Tensor:
        """The logits [B, V] after prompts int [B, P], uniform [B, T - P] -> tokens int [B, T].

        Some steps at a time, so that nothing leaves the caches for what is done between them. Raises FloatingPointError
        for logits that are infinite or no number.
        """
        p, total = prompt.shape[1], self.shape.n_ctx
        tokens, numbers = F.pad(prompt.long(), (0, total - p)).contiguous(), F.pad(uniform.float(), (p, 0)).contiguous()
        self.arrays["logits"][:, : self.shape.n_vocab] = logits
        self.state.tokens, self.state.uniform = tokens.data_ptr(), numbers.data_ptr()
        self.state.temperature = temperature
        self._call(self.library.choose_all, p)
        advance(self.batch)
        at_once = min(max(AT_ONCE // self.multiplied, 1), STEPS)
        for first in range(p + 1, total, at_once):
            last = min(first + at_once, total)
            self._call(self.library.draw, first, last)
            advance(self.batch * (last - first))
        if self.state.wild:
            raise FloatingPointError("logits are not finite")
        return tokens

    def _call(self, function: Callable[..., object], *positions: int) -> None:
        worth = self.multiplied // (MATRICES * self.shape.n_layer * WORK)
        self.state.threads = max(min(torch.get_num_threads(), worth), 1)
        function(ctypes.byref(self.state), *positions)


def folded(model: ImageGPT) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each block the matrices of queries, keys and values, of their projection, and into and out of the MLP.

    What multiplies the input or output of a matrix is multiplied into it: the gains of norms, the scale of queries, and
    the 1.702 of quick-gelu, which is silu(1.702 x) / 1.702.
    """
    s = model.shape
    scale = torch.ones(3 * s.d_model, 1, device=model.wte.device)
    scale[: s.d_model] = (s.d_model // s.n_head) ** -0.5
    return [
        (
            block.attn.qkv.weight * block.ln_1.weight * scale,
            block.attn.proj.weight,
            block.mlp.fc.weight * block.ln_2.weight * SLOPE,
            block.mlp.proj.weight / SLOPE,
        )
        for block in model.blocks
    ]


def folded_head(model: ImageGPT) -> Tensor:
    """The prediction head, with the gain of the last norm."""
    return model.head.weight * model.ln_f.weight


def panels(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Of all layers, [out, in] -> [L, out / PANEL, in, PANEL], where out is filled up with zeros: each panel is read
    from its first number to its last.
    """
    out, width = matrices[0].shape
    whole = torch.zeros(len(matrices), rounded(out, PANEL) // PANEL, width, PANEL, dtype=dtype)
    for layer, matrix in zip(whole, matrices):
        layer.copy_(F.pad(matrix.detach(), (0, 0, 0, -out % PANEL)).unflatten(0, (-1, PANEL)).mT)
    return whole


def columns(width: int) -> int:
    """Of a row in memory: see decoder_step.c."""
    return rounded(width, PANEL) + STRIDE


def rounded(n: int, to: int) -> int:
    return -(-n // to) * to
