"""Reading CIFAR's pickles without running what they say: arrays and plain containers, nothing else.

A pickle is a program, and `find_class` is the only way it reaches code. Here it resolves a handful of names, all of
them to stand-ins made for this load: not even numpy's own unpickling runs, which trusts the state it is given.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any, cast

import numpy as np

from pixseq.data.records import DAMAGE
from pixseq.errors import PixseqError
from pixseq.text import shown

STEPS = {step.code.encode("latin1")[0]: step for step in pickletools.opcodes}
# Bytes of a step's argument; else those of the number before it that says how many.
FIXED = {code: step.arg.n if step.arg else 0 for code, step in STEPS.items() if step.arg is None or step.arg.n >= 0}
COUNTED = {
    code: {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT8U: 8}.get(step.arg.n, 4)
    for code, step in STEPS.items()
    if step.arg is not None and step.arg.n < pickletools.UP_TO_NEWLINE
}
PUT, BINPUT, LONG_BINPUT, GLOBAL, INST, STOP = b"pqrci."
CONTAINERS = {"list": list, "dict": dict, "tuple": tuple, "set": set, "frozenset": frozenset}


class UnsafePickle(Exception):
    """The pickle asks for more than arrays and containers."""


class _DType:
    """Stands in for numpy.dtype: plain numbers only, so no objects and no records."""

    def __init__(self, code: str | bytes, *align_and_copy: Any):
        self.plain = np.dtype(_text(code))
        if self.plain.kind not in "buif":
            raise UnsafePickle(f"it holds an array of {self.plain}")

    def __setstate__(self, state: tuple) -> None:
        self.plain = self.plain.newbyteorder(cast(Any, _text(state[1])))  # refused if it is none


class _Array:
    """Stands in for numpy.ndarray: built from a shape, a number type and its bytes."""

    def __setstate__(self, state: tuple) -> None:
        _version, shape, dtype, fortran, raw = state
        self.array = np.frombuffer(raw, dtype.plain).reshape(shape, order="F" if fortran else "C")


def _check_sizes(data: bytes) -> None:
    """Raises UnsafePickle where a step asks for memory that no bytes stand behind, ValueError, IndexError for damage.

    The unpickler in C makes room for what a length declares, and for a memo of as many entries as a number says. (What
    pickletools.genops tells takes six times as long.)
    """
    at, count, code = 0, 0, None
    while code != STOP:
        code, begin = data[at], at + 1
        if code not in STEPS:
            raise ValueError(f"{code} is no step of a pickle")
        if code in FIXED:
            at = begin + FIXED[code]
        elif code in COUNTED:
            begin += COUNTED[code]
            at = begin + int.from_bytes(data[begin - COUNTED[code] : begin], "little")
        else:
            at = begin
            for _ in range(2 if code in (GLOBAL, INST) else 1):  # lines
                at = data.index(b"\n", at) + 1
        if at > len(data):
            raise ValueError("a step reaches beyond the end")
        if code in (BINPUT, LONG_BINPUT) or code == PUT:
            number = int(data[begin:at]) if code == PUT else int.from_bytes(data[begin:at], "little")
            if number > count:
                raise UnsafePickle(f"it numbers a value {number:,} after {count:,} steps")
        count += 1


class ArraysOnly(pickle.Unpickler):
    """For dicts of lists and arrays, as Python 2 and 3 and numpy 1 and 2 write them at protocols 0 to 5."""

    def __init__(self, data: bytes):
        # "bytes" keeps Python 2's strings as they are: array buffers and latin-1 file names alike.
        super().__init__(io.BytesIO(data), encoding="bytes")
        self.left = len(data)  # what may still be made by calls: each could be repeated without end

    def _spend(self, made: Any) -> Any:
        self.left -= len(made)
        if self.left < 0:
            raise UnsafePickle("it makes more than it holds")
        return made

    def find_class(self, module: str, name: str) -> Any:
        named = (module.replace("numpy._core", "numpy.core"), name)
        if named == ("numpy.core.multiarray", "_reconstruct"):
            return lambda subtype, shape, code: _Array()
        if named == ("numpy.core.numeric", "_frombuffer"):  # protocol 5
            return _from_buffer
        if named == ("numpy", "ndarray"):
            return "ndarray"  # only ever the subtype above
        if named == ("numpy", "dtype"):
            return lambda *arguments: _DType(*arguments)
        if named == ("_codecs", "encode"):  # how Python 3 writes bytes at protocols 0 to 2
            return lambda text, encoding: self._spend(_latin1(text, encoding))
        if module in ("builtins", "__builtin__") and name in CONTAINERS:
            return lambda *values: self._spend(CONTAINERS[name](*values))
        raise UnsafePickle(f"it asks for {module}.{name}, which is neither an array nor a container")


def _from_buffer(raw: bytes, dtype: _DType, shape: tuple[int, ...], order: str, axis_order: object = None) -> _Array:
    if axis_order is not None:
        raise UnsafePickle("it holds an array with permuted axes")
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", raw))
    return array


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise UnsafePickle(f"it encodes text as {encoding}")
    return text.encode("latin1")


def _text(value: str | bytes) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value


def load(data: bytes, place: str) -> dict[str, Any]:
    """The dict in a CIFAR pickle, its keys as text. Raises PixseqError, naming `place`, for anything else."""
    try:
        _check_sizes(data)
        content = ArraysOnly(data).load()
        return {_text(key): value.array if isinstance(value, _Array) else value for key, value in dict(content).items()}
    except UnsafePickle as error:
        raise PixseqError(
            f"{place}: this pickle is refused: {shown(error)}",
            "CIFAR's official files hold arrays and lists only: download them again from a source you trust",
        ) from error
    # Garbage in, anything out.
    except (pickle.UnpicklingError, *DAMAGE, TypeError, AttributeError, LookupError, ImportError) as error:
        raise PixseqError(f"{place} is damaged: {shown(error)}", "copy or download it again") from error
