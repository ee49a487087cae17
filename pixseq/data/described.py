"""What is told of a source: its identity in manifests, and one line about its labels or its bits."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from pixseq import progress
from pixseq.data.decode import narrow_bits
from pixseq.data.records import Source
from pixseq.data.token_files import TokenSource

COUNTED_LABELS = 65_536  # larger numbers are not told apart where classes are counted


def labels_line(source: Source | TokenSource, classes: int, more: bool = False) -> str:
    """What is said of the labels of a source, whatever they are."""
    if not source.has_labels:
        return f"labels: none ({source.labels_from})"
    return f"labels: {'at least ' * more}{classes} class{'es' * (classes != 1)}, from {source.labels_from}"


def say_narrow(counts: dict[str, int]) -> bool:
    """Say it where 16-bit pictures leave upper bits unused, since they come out dark; whether there was anything to say
    or to hear.
    """
    if not counts.get("sixteen_bit"):
        return False
    bits = narrow_bits(counts)
    if bits is not None:
        progress.say(
            f"note: the 16-bit pictures stay below {1 << bits:,} and come out dark: if they have {bits} bits, "
            f"--bit-depth {bits} scales them right"
        )
    return True


def describe(source: Source) -> dict[str, Any]:
    """How a manifest names a source of images.

    The id is cheap: over the names and sizes of its files and the first bytes of a single file, not over every byte.
    """
    listing = hashlib.sha256()
    path = Path(source.path)
    if path.is_dir():
        for folder, folders, names in os.walk(path):
            folders.sort()
            for name in sorted(names):
                file = Path(folder, name)
                size = file.stat().st_size if file.exists() else 0
                listing.update(os.fsencode(file.relative_to(path)) + f" {size}\n".encode())
    elif path.is_file():
        with path.open("rb") as file:
            listing.update(f"{path.stat().st_size}\n".encode() + file.read(1 << 20))
    found = f"{source.name}:{source.split}:{source.count or 'stream'}"
    return {"path": source.path, "id": f"{found}:{listing.hexdigest()[:16]}"}
