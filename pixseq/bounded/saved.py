"""What torch.save wrote, read without running code: a pickle that makes no room by numbers alone, and tensors of which
no more is declared than is stored.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pixseq.bounded.files import check_holes, check_members, open_regular
from pixseq.bounded.tensors import MOST_TENSORS

if TYPE_CHECKING:
    from torch import Tensor

MAKES_ROOM = ("bytearray", "Counter", "encode")  # what torch lets weights call beside what makes tensors
OLD_PICKLES = 5  # a number, a version, what wrote it, the tensors, and the order in which they are stored
MOST_STEPS = 1 << 26  # bytes of a pickle, at the beginning of a file of the old form
SHARED, FREE = 4, 1 << 20  # tensors may share what is stored, so many times; and bytes beside


class UnsafeWeights(ValueError):
    """A pickle that asks for more than tensors and plain values."""


def load_saved(path: Path) -> Any:
    """Tensors on the CPU and plain values, nested as they were. Raises UnsafeWeights, OSError, ValueError for damage.

    The tensors have yet to be checked: see check_stored.
    """
    import torch

    with open_regular(path) as file:
        check_holes(file)
        try:
            zipped = zipfile.is_zipfile(file)
        except zipfile.BadZipFile as error:
            raise ValueError(str(error)) from None
        size = os.fstat(file.fileno()).st_size
        for each in _pickles(file) if zipped else _beginning(file):
            _check_steps(each, size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols that are read all the same
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error):
            raise UnsafeWeights("it holds more than tensors") from None
        raise ValueError(str(error)) from None
    except Exception as error:  # damage comes as many types
        raise ValueError(str(error).splitlines()[0] if str(error) else type(error).__name__) from None


def check_stored(tensors: Iterable[tuple[str, Tensor]], size: int) -> None:
    """Raises ValueError where named tensors of a file of `size` bytes declare more numbers than it stores."""
    declared = 0
    for name, x in tensors:
        taken, stored = x.numel() * x.element_size(), x.untyped_storage().nbytes()
        if taken > stored:  # a stride of zero: one number for millions
            raise ValueError(f"{name} declares {x.numel():,} numbers, and {stored:,} bytes are stored")
        declared += taken
    if declared > SHARED * size + FREE:
        raise ValueError(f"its tensors declare {declared:,} bytes, and it has {size:,}")


def is_plain(x: Any) -> bool:
    """Whether it is a tensor whose numbers are all there."""
    import torch

    if not isinstance(x, torch.Tensor):
        return False
    return x.layout == torch.strided and not (x.is_meta or x.is_quantized or x.is_nested)


def _pickles(file: BinaryIO) -> Iterator[bytes]:
    """Of an archive. Raises ValueError for one that unfolds, or declares more than it has."""
    try:
        with zipfile.ZipFile(file) as archive:
            check_members(archive, os.fstat(file.fileno()).st_size, MOST_TENSORS)
            for member in archive.infolist():
                if member.filename.endswith(".pkl"):
                    if member.file_size > MOST_STEPS:
                        raise ValueError(f"{member.filename} has {member.file_size:,} bytes")
                    yield archive.read(member)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, IndexError, EOFError) as error:
        raise ValueError(str(error) or type(error).__name__) from None


def _beginning(file: BinaryIO) -> Iterator[bytes]:
    """Of the old form: so many pickles in a row, and the numbers after them."""
    file.seek(0)
    data = io.BytesIO(file.read(MOST_STEPS))
    for _ in range(OLD_PICKLES):
        first = data.tell()
        if first == len(data.getbuffer()):
            return
        for _ in _steps(data):
            pass
        yield data.getvalue()[first : data.tell()]


def _steps(data: io.BytesIO) -> Iterator[tuple[str, Any]]:
    """The steps of a pickle, by name, with their arguments. Raises ValueError for what is none."""
    try:
        for step, argument, _ in pickletools.genops(data):
            yield step.name, argument
    except Exception as error:  # damage comes as many types
        raise ValueError(str(error) or type(error).__name__) from None


def _check_steps(data: bytes, size: int) -> None:
    """Raises UnsafeWeights where a pickle makes room by a number alone, ValueError where it names a storage of more
    numbers than the file has bytes.
    """
    most = 0  # of the numbers that stand by what is stored: its length, and in old files its place
    for name, argument in _steps(io.BytesIO(data)):
        if name == "GLOBAL" and argument.rpartition(" ")[2] in MAKES_ROOM:
            raise UnsafeWeights(f"it calls {argument.rpartition(' ')[2]}, which no weights need")
        if name == "MARK":
            most = 0
        elif isinstance(argument, int) and name.startswith(("BININT", "INT", "LONG")):
            most = max(most, argument)
        elif name == "BINPERSID" and most > size:
            raise ValueError(f"it declares {most:,} stored numbers, and has {size:,} bytes")
