"""Files of tensors as PyTorch programs write them: safetensors and pickles. No code in them is run."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from pixseq.errors import PixseqError

if TYPE_CHECKING:
    from torch import Tensor

Tensors = dict[str, "Tensor"]


def load_tensors(path: Path) -> Tensors:
    """The tensors of one file on the CPU, by name; what is not named .safetensors is read as torch.save wrote it.

    Raises PixseqError for a damaged file, and for one that holds anything but tensors by name.
    """
    with path.open("rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            raise PixseqError(f"{path} is a Git LFS pointer, not the weights", "fetch them: git lfs pull")
    tensors = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path)
    import torch

    for name, x in tensors.items():
        plain = isinstance(x, torch.Tensor) and x.layout == torch.strided and not x.is_meta
        if not plain or not isinstance(name, str):
            raise PixseqError(f"{path}: {name!r} is no plain tensor", "save model.state_dict()")
    return tensors


def _load_safetensors(path: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise PixseqError(f"{path} is damaged or cut short: {error}", "download it again") from None


def _load_pickle(path: Path) -> Tensors:
    import pickle

    import torch

    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:  # a small file could unfold to more than the memory holds
                if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                    raise ValueError("it is a compressed archive, which torch.save does not write")
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
