"""Files of tensors as PyTorch programs write them: safetensors and pickles. No code in them is run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pixseq.bounded.files import open_regular
from pixseq.bounded.saved import UnsafeWeights, check_stored, is_plain, load_saved
from pixseq.bounded.tensors import read_shapes
from pixseq.errors import PixseqError

if TYPE_CHECKING:
    from torch import Tensor

Tensors = dict[str, "Tensor"]


def load_tensors(path: Path) -> Tensors:
    """The tensors of one file on the CPU, by name; what is not named .safetensors is read as torch.save wrote it.

    Raises PixseqError for a damaged file, and for one that holds anything but tensors by name.
    """
    with open_regular(path) as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            raise PixseqError(f"{path} is a Git LFS pointer, not the weights", "fetch them: git lfs pull")
    tensors = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path)
    for name, x in tensors.items():
        if not is_plain(x) or not isinstance(name, str):
            raise PixseqError(f"{path}: {name!r} is no plain tensor", "save model.state_dict()")
    try:
        check_stored(tensors.items(), path.stat().st_size)
    except ValueError as error:
        raise PixseqError(f"{path}: {error}", "save the tensors after .clone()") from None
    return tensors


def _load_safetensors(path: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        read_shapes(path)
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise PixseqError(f"{path} is damaged or cut short: {error}", "download it again") from None


def _load_pickle(path: Path) -> Tensors:
    try:
        found = load_saved(path)
    except UnsafeWeights as error:
        raise PixseqError(
            f"{path} was not read: {error}, and could run code",
            "take the safetensors form of these weights, or convert it where you trust it",
        ) from None
    except (OSError, ValueError) as error:
        raise PixseqError(f"{path} is damaged or cut short: {error}", "download it again") from None
    if not isinstance(found, dict):
        raise PixseqError(f"{path} holds a {type(found).__name__}, no state dict", "save model.state_dict()")
    return found
