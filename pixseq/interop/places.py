"""Where other programs' weights lie, and whether anything is there: told without torch, which takes a second."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from pixseq.bounded.files import open_regular
from pixseq.errors import PixseqError

SUFFIX = ".pt2"  # as torch.export.save names its files


def check_folder(path: Path) -> None:
    """Raises PixseqError where a Hugging Face directory is none."""
    if not path.is_dir():
        raise PixseqError(
            f"{path} is {'no folder' if path.exists() else 'not there'}",
            "name the downloaded folder that holds config.json and model.safetensors",
        )


def check_file(path: Path) -> None:
    """Raises PixseqError where a file of tensors is none."""
    if not path.is_file():
        raise PixseqError(
            f"{path} is {'no file' if path.exists() else 'not there'}", "name a .pth or .safetensors file"
        )


def is_exported(path: str | Path) -> bool:
    """Whether it is named as a file of torch.export."""
    return Path(path).suffix == SUFFIX


def file_id(path: str | Path) -> str:
    """sha256 of the file. Raises PixseqError where there is none."""
    with _exported(path) as file:
        return f"sha256:{hashlib.file_digest(cast(io.BufferedReader, file), 'sha256').hexdigest()}"


def check_exported(path: str | Path) -> None:
    """Raises PixseqError where there is no file that can be read."""
    with _exported(path):
        pass


@contextlib.contextmanager
def _exported(path: str | Path) -> Iterator[BinaryIO]:
    try:
        with open_regular(path) as file:
            yield file
    except OSError as error:
        raise PixseqError(f"{path} cannot be read: {error.strerror}", "check the path") from None
