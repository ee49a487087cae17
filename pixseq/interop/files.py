"""Files of tensors as PyTorch programs write them: safetensors and pickles. No code in them is run."""

from __future__ import annotations

import io
import pickletools
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from pixseq.bounded.files import open_regular
from pixseq.bounded.tensors import MOST_TENSORS, read_shapes
from pixseq.errors import PixseqError

if TYPE_CHECKING:
    from torch import Tensor

Tensors = dict[str, "Tensor"]

MAKES_ROOM = ("bytearray", "Counter", "encode")  # what torch lets weights call beside what makes tensors
MOST_STEPS = 1 << 26  # bytes at the beginning of a file of the old form
SHARED, FREE = 4, 1 << 20  # tensors may share what is stored, so many times; and bytes beside


class Refused(Exception):
    """A pickle that asks for more than tensors."""


def load_tensors(path: Path) -> Tensors:
    """The tensors of one file on the CPU, by name; what is not named .safetensors is read as torch.save wrote it.

    Raises PixseqError for a damaged file, and for one that holds anything but tensors by name.
    """
    with open_regular(path) as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            raise PixseqError(f"{path} is a Git LFS pointer, not the weights", "fetch them: git lfs pull")
    tensors = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path)
    import torch

    for name, x in tensors.items():
        plain = isinstance(x, torch.Tensor) and x.layout == torch.strided and not x.is_meta and not x.is_quantized
        if not plain or not isinstance(name, str):
            raise PixseqError(f"{path}: {name!r} is no plain tensor", "save model.state_dict()")
        if x.numel() * x.element_size() > x.untyped_storage().nbytes():  # a stride of zero: one number for millions
            raise PixseqError(
                f"{path}: {name} declares {x.numel():,} numbers, and {x.untyped_storage().nbytes():,} bytes are stored",
                "save the tensors after .clone()",
            )
    stored = path.stat().st_size
    declared = sum(x.numel() * x.element_size() for x in tensors.values())
    if declared > SHARED * stored + FREE:
        raise PixseqError(
            f"{path}: its tensors declare {declared:,} bytes, and it has {stored:,}",
            "save the tensors after .clone()",
        )
    return tensors


def _load_safetensors(path: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        read_shapes(path)
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise PixseqError(f"{path} is damaged or cut short: {error}", "download it again") from None


def _check_calls(data: bytes) -> None:
    """Raises ValueError where a pickle, or one of several in a row, makes room by a number alone."""
    file = io.BytesIO(data)
    while file.tell() < len(data):
        try:
            for step, argument, _ in pickletools.genops(file):
                if step.name == "GLOBAL" and argument.rpartition(" ")[2] in MAKES_ROOM:
                    raise Refused(f"it calls {argument.rpartition(' ')[2]}, which no weights need")
        except ValueError:  # what follows the pickles of the old form are the numbers themselves
            return


def _load_pickle(path: Path) -> Tensors:
    import pickle

    import torch

    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:  # a small file could unfold to more than the memory holds
                if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                    raise ValueError("it is a compressed archive, which torch.save does not write")
                if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
                    raise ValueError("its members declare more bytes than it has")
                if len(archive.infolist()) > MOST_TENSORS:
                    raise ValueError(f"it holds {len(archive.infolist()):,} tensors")
                steps = [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
        else:
            with open_regular(path) as file:
                steps = [file.read(MOST_STEPS)]
        for each in steps:
            _check_calls(each)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols that are read all the same
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error):
            raise PixseqError(f"{path} is damaged: {error}", "download it again") from None
        raise PixseqError(
            f"{path} holds more than tensors, and was not read: it could run code",
            "take the safetensors form of these weights, or convert it where you trust it",
        ) from None
    except Exception as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PixseqError(f"{path} is damaged or cut short: {why}", "download it again") from None
    if not isinstance(found, dict):
        raise PixseqError(f"{path} holds a {type(found).__name__}, no state dict", "save model.state_dict()")
    return found
