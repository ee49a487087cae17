"""The manifest every artifact carries: what it is, how it was made, from what, and the id of its content."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from pixseq import __version__
from pixseq.artifacts.layout import is_partial, partial_path
from pixseq.bounded.files import open_regular
from pixseq.bounded.structure import parse_json, read_json, read_object
from pixseq.errors import PixseqError

KEY = "pixseq"

# The newest layout of each kind that this code writes and reads. What fits into an older one is written in that.
FORMATS = {
    "palette": 1,
    "tokens": 1,
    "pixels": 2,  # 2: whole pictures
    "features": 1,
    "checkpoint": 1,
    "metrics": 1,
    "picture": 1,
    "plan": 1,
}

# What to do where one kind (first) was given for another.
FOREIGN = "pass what a pixseq stage made; pictures become one by `pixseq encode`"
REMEDIES = {
    ("tokens", "pixels"): "models of patches read pixels: encode the pictures with --scheme pixels",
    ("pixels", "tokens"): "Image GPT reads tokens: encode the pictures with --palette PALETTE",
    ("tokens", "palette"): "`pixseq show TOKENS --lineage` names the palette that they were made with",
    ("checkpoint", "palette"): "`pixseq show MODEL --lineage` names the palette that its tokens were made with",
    ("tokens", "features"): "features are what `pixseq features MODEL TOKENS` makes",
    ("pixels", "features"): "features are what `pixseq features MODEL PIXELS` makes",
    ("checkpoint", "features"): "features are what `pixseq features MODEL TOKENS` makes",
    ("plan", "metrics"): "a plan that was run is fitted first: `pixseq scaling fit PLAN -o fit.json`",
}

KEYS = {
    "kind": str,
    "format": int,
    "id": str,
    "stage": str,
    "version": str,
    "config": dict,
    "inputs": dict,
    "summary": dict,
    "made": dict,
    "argv": list,
}

Manifest = dict[str, Any]


class Content(NamedTuple):
    """An array as a stream of blocks in C order."""

    dtype: np.dtype
    shape: tuple[int, ...]
    blocks: Iterable[np.ndarray]


def whole(array: np.ndarray) -> Content:
    return Content(array.dtype, array.shape, [array])


def canonical_json(value: Any) -> str:
    """One spelling for one value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_id(kind: str, arrays: Mapping[str, Content], meta: Mapping[str, Any]) -> str:
    """sha256 over names, types, shapes and C-order bytes of `arrays`, and over `meta`; dates and hosts do not enter."""
    digest = hashlib.sha256()
    digest.update(canonical_json({"kind": kind, "meta": meta}).encode())
    for name in sorted(arrays):
        dtype, shape, blocks = arrays[name]
        little = np.dtype(dtype).newbyteorder("<")
        digest.update(canonical_json({"name": name, "dtype": little.str, "shape": [int(n) for n in shape]}).encode())
        for block in blocks:
            digest.update(memoryview(np.ascontiguousarray(block, dtype=little).data).cast("B"))
    return f"sha256:{digest.hexdigest()}"


def build(
    kind: str,
    id: str,
    stage: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, Any]],
    summary: Mapping[str, Any],
    format: int | None = None,
) -> Manifest:
    """The manifest of a new artifact. `inputs` maps a role to {path, id} of each parent (see `reference`).

    `format`: the layout that it is written in; None: the newest.
    """
    return {
        "kind": kind,
        "format": format or FORMATS[kind],
        "id": id,
        "stage": stage,
        "version": __version__,
        "config": dict(config),
        "inputs": {role: {key: _text(value) for key, value in parent.items()} for role, parent in inputs.items()},
        "summary": dict(summary),
        "made": {"at": datetime.now(UTC).isoformat(timespec="seconds"), "python": platform.python_version()},
        "argv": [_text(word) for word in sys.argv],
    }


def _text(value: Any) -> Any:
    """File names that are not UTF-8 become text that is."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def reference(path: str | Path, manifest: Manifest) -> dict[str, str]:
    """How a child names its parent; the id is what is checked, the path is for people."""
    return {"path": _text(str(path)), "id": manifest["id"]}


DAMAGED = "the file is damaged or cut short; make it again"


def _embedded(path: Path) -> Manifest | None:
    """The manifest inside `path`, or None where there is none."""
    if path.is_dir():
        if (path / "manifest.json").is_file():
            return read_json(path / "manifest.json", DAMAGED)
        if (path / "zarr.json").is_file():
            attributes = read_object(path / "zarr.json", DAMAGED).get("attributes")
            return attributes.get(KEY) if isinstance(attributes, dict) else None
        return None
    with open_regular(path) as file:
        head = file.read(8)
    if head == b"\x89PNG\r\n\x1a\n":
        from PIL import Image

        try:
            with Image.open(path) as image:
                text = image.info.get(KEY)
        except Exception as error:
            raise PixseqError(f"{path} is not a readable PNG: {error}", "make the picture again") from None
        try:
            return parse_json(text) if text else None
        except (ValueError, TypeError):  # a chunk of that name by another hand
            return None
    if head.lstrip()[:1] == b"{":
        return read_object(path, DAMAGED).get(KEY)
    return None


def is_manifest(found: Any) -> TypeGuard[Manifest]:
    """Whether it has the keys of a manifest, and what they hold is of the types that every reader relies on."""
    if not isinstance(found, dict) or not all(isinstance(found.get(key), kind) for key, kind in KEYS.items()):
        return False
    parents = list(found["inputs"].values())
    if found["format"] < 1 or not all(isinstance(parent, dict) for parent in parents):
        return False
    named = (parent.get(key, "") for parent in parents for key in ("id", "path"))
    return all(isinstance(word, str) for word in named)


def check_exists(path: Path) -> None:
    """Raises PixseqError where there is nothing, or something unfinished."""
    if is_partial(path) and path.exists():
        raise PixseqError(f"{path} is unfinished", "finish it with --resume, or make it again")
    if not path.exists():
        partial = partial_path(path)
        if partial.exists():
            raise PixseqError(
                f"{path} does not exist, only its unfinished {partial.name}",
                "its stage was interrupted: run the same command again, with --resume to go on",
            )
        raise PixseqError(f"{path} does not exist", "check the path; a stage prints the path of what it made")


def read(path: str | Path) -> Manifest:
    """The manifest of any artifact.

    Raises PixseqError where there is nothing, something unfinished, a foreign file, or a newer format.
    """
    path = Path(path)
    check_exists(path)
    manifest = _embedded(path)
    if not is_manifest(manifest):
        raise PixseqError(f"{path} is not a pixseq artifact", FOREIGN)
    known = FORMATS.get(manifest["kind"])
    if known is None or manifest["format"] > known:
        raise PixseqError(
            f"{path} holds {manifest['kind']} of format {manifest['format']}, this pixseq {__version__} reads "
            f"{f'up to format {known}' if known else 'no such kind'}",
            f"it was made by pixseq {manifest.get('version', 'unknown')}: upgrade to that version or newer",
        )
    return manifest


def expect(path: str | Path, *kinds: str) -> Manifest:
    """`read`, and the kind must be one of `kinds`."""
    manifest = read(path)
    if manifest["kind"] not in kinds:
        raise PixseqError(
            f"{path} is of kind {manifest['kind']}, where {' or '.join(kinds)} is needed",
            REMEDIES.get(
                (manifest["kind"], *kinds), "check the order of the arguments; `pixseq show PATH` tells what a file is"
            ),
        )
    return manifest
