"""What a foreign zarr may ask to be decoded with: opening one makes any codec that is installed, pickle too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pixseq.errors import PixseqError

# numbers in, numbers out: of zarr v2 ("id") and of v3 ("name")
KNOWN = {"blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd"}
KNOWN |= {"adler32", "astype", "bitround", "bytes", "crc32", "crc32c", "delta", "fixedscaleoffset", "fletcher32"}
KNOWN |= {"packbits", "quantize", "sharding_indexed", "shuffle", "transpose"}
MOST_BYTES = 4 << 20  # of one array's metadata


def check_codecs(path: Path) -> None:
    """Raises PixseqError where the array or group at `path` names a codec that is not KNOWN, or holds objects."""
    for file in (*_metadata(path), *(found for each in path.iterdir() if each.is_dir() for found in _metadata(each))):
        if file.stat().st_size > MOST_BYTES:
            raise PixseqError(f"{file} is of {file.stat().st_size:,} bytes, too many for metadata", "make it again")
        try:
            found = json.loads(file.read_bytes())
            for each in _codecs(found):
                name = str(each.get("id", each.get("name"))).removeprefix("numcodecs.")
                if name not in KNOWN:
                    raise PixseqError(
                        f"{file} asks for the codec {name[:40]!r}, which is not one of {', '.join(sorted(KNOWN))}",
                        "write the array again, with blosc, zstd or gzip and without filters",
                    )
            held = found.get("dtype") if isinstance(found, dict) else None
        except (ValueError, RecursionError, AttributeError, TypeError) as error:
            raise PixseqError(f"{file} does not tell how the array is stored: {error}", "it is damaged") from None
        if isinstance(held, str) and "O" in held:
            raise PixseqError(f"{file} holds Python objects, not numbers", "write the array again, as uint16")


def _metadata(folder: Path) -> list[Path]:
    return [folder / name for name in ("zarr.json", ".zarray") if (folder / name).is_file()]


def _codecs(found: Any) -> Iterator[dict[str, Any]]:
    """Every codec that is named in an array's metadata, those within a shard or of a group's own copy too."""
    if isinstance(found, list):
        for each in found:
            yield from _codecs(each)
    if not isinstance(found, dict):
        return
    for key, value in found.items():
        if key in ("codecs", "index_codecs", "filters"):
            yield from value or ()
        elif key == "compressor" and value is not None:
            yield value
        if key in ("codecs", "index_codecs", "configuration", "consolidated_metadata", "metadata") or "/" not in key:
            yield from _codecs(value)
