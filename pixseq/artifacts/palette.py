"""Palettes on disk: our JSON, and the foreign forms accepted wherever a palette is read.

Ours holds the manifest, the colours (K x 3 floats in [-1, 1], whose order is their meaning) and a self-check: 32
colours with the indices they must get, so that a reader can prove that it understands the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pixseq.artifacts import manifest
from pixseq.artifacts.owning import writing
from pixseq.bounded.files import read_bytes
from pixseq.bounded.numpy_files import load_small
from pixseq.bounded.structure import parse_json, read_object
from pixseq.errors import PixseqError
from pixseq.numerics.quantize import nearest, unpack

MAX_COLORS = 65535  # tokens are uint16, and 65535 marks rows that were never written
MAX_BYTES = 1 << 24
CHECKED = 32
FORMS = "a .json of `pixseq palette fit`, OpenAI's kmeans_centers.npy, or a preprocessor_config.json with clusters"


@dataclass(frozen=True)
class Palette:
    """`colors` float64 [K, 3] in [-1, 1]. `form` is the file it came from, in words, as "npy float32".

    `id` is over the float64 values, so the same colours have the same id in every form.
    """

    colors: np.ndarray
    id: str
    form: str

    @property
    def size(self) -> int:
        return len(self.colors)


def palette_id(colors: np.ndarray) -> str:
    return manifest.content_id("palette", {"colors": manifest.whole(np.asarray(colors, np.float64))}, {})


def checked_colours() -> np.ndarray:
    """uint8 [CHECKED, 3]: the colours of the self-check, spread over the cube by golden steps."""
    codes = np.arange(CHECKED) * 0x9E3779 % (1 << 24)
    return unpack(codes)


def save_palette(
    path: str | Path,
    colors: np.ndarray,
    stage: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, Any]],
    summary: Mapping[str, Any],
    overwrite: bool = False,
) -> manifest.Manifest:
    """Write float64 [K, 3] with manifest and self-check; returns the manifest."""
    record = manifest.build("palette", palette_id(colors), stage, config, inputs, summary)
    rgb = checked_colours()
    checks = [{"rgb": list(map(int, row)), "code": int(code)} for row, code in zip(rgb, nearest(rgb, colors))]
    lines = ",\n".join(json.dumps(row) for row in colors.tolist())  # one colour a line; repr keeps every bit
    text = (
        f'{{"{manifest.KEY}": {json.dumps(record, indent=1, ensure_ascii=False)},\n'
        f'"self_check": {json.dumps(checks)},\n"colors": [\n{lines}\n]}}\n'
    )
    with writing(path, overwrite, stage) as partial:
        partial.write_text(text, encoding="utf-8")
    return record


def load_palette(path: str | Path, inside: bool = False) -> Palette:
    """Read a palette in any form; with `inside`, also the one that travels in a tokens store or a checkpoint.

    Raises PixseqError for anything else, for values that are no colours in [-1, 1], and for a failing self-check.
    """
    path = Path(path)
    if path.is_file():
        if path.stat().st_size > MAX_BYTES:
            raise PixseqError(f"{path} is too large for a palette ({path.stat().st_size:,} bytes)", f"pass {FORMS}")
        data = read_bytes(path, MAX_BYTES)
        if data.startswith(b"\x93NUMPY"):
            return _from_npy(path)
        if data.lstrip()[:1] == b"{" and (found := _json_object(path, data)).keys() & {"clusters", "colors"}:
            return _from_json(path, found)
    elif (path / "preprocessor_config.json").is_file():
        return load_palette(path / "preprocessor_config.json")
    try:
        record = manifest.expect(path, *(("palette", "tokens", "checkpoint") if inside else ("palette",)))
    except PixseqError as error:
        hint = "" if error.hint == manifest.FOREIGN else f"{error.hint}; "
        raise PixseqError(error.message, f"{hint}a palette is {FORMS}") from None
    if record["kind"] == "palette":
        raise PixseqError(f"{path} has a palette's manifest, but no colors", "the file is damaged: fit it again")
    return _from_codec(path, record)


def _json_object(path: Path, data: bytes) -> dict[str, Any]:
    try:
        found = parse_json(data)
        return found if isinstance(found, dict) else {}
    except ValueError as error:
        raise PixseqError(f"{path} is not readable as JSON: {error}", "the file is damaged or cut short") from None


def _from_json(path: Path, found: dict[str, Any]) -> Palette:
    if manifest.KEY not in found:
        key = "clusters" if "clusters" in found else "colors"
        return _foreign(path, found[key], f"json {key}")
    record = manifest.expect(path, "palette")
    colors = _colours(path, found.get("colors"))
    id = palette_id(colors)
    if id != record["id"]:
        raise PixseqError(
            f"{path}: its colors have the id {id}, its manifest says {record['id']}",
            "the file was changed by hand or damaged: copy or fit it again",
        )
    _self_check(path, found.get("self_check"), colors)
    return Palette(colors, id, "pixseq palette")


def _from_npy(path: Path) -> Palette:
    try:
        values = load_small(path, MAX_BYTES)
    except (ValueError, OSError) as error:
        raise PixseqError(f"{path} is not a readable .npy: {error}", f"pass {FORMS}") from None
    return _foreign(path, values, f"npy {values.dtype}")


def _from_codec(path: Path, record: manifest.Manifest) -> Palette:
    """The palette that travels in a tokens store (group attributes) or a checkpoint (codec.json)."""
    file = path / ("zarr.json" if record["kind"] == "tokens" else "codec.json")
    damaged = "the artifact is damaged: copy it again"
    try:
        codec = read_object(file, damaged)
    except OSError as error:
        raise PixseqError(f"{file} cannot be read: {error}", damaged) from None
    codec = codec.get("attributes", {}) if record["kind"] == "tokens" else codec
    if codec.get("palette") is None:
        scheme = codec.get("scheme")
        why = (
            "was made without its palette"
            if scheme == "palette"
            else f"has the scheme {scheme}, which needs no palette"
        )
        raise PixseqError(f"{path} of kind {record['kind']} {why}", f"pass {FORMS}")
    colors = _colours(path, codec["palette"])
    return Palette(colors, palette_id(colors), f"palette in {record['kind']}")


def _foreign(path: Path, values: Any, form: str) -> Palette:
    colors = _colours(path, values)
    if len(colors) > 1 and colors.min() >= 0:
        raise PixseqError(
            f"{path}: all values lie in 0..1 ({colors.min():g} to {colors.max():g}), but a palette's run from -1 to 1",
            "rescale them: 2 * x - 1 for values of 0..1",
        )
    return Palette(colors, palette_id(colors), form)


def _colours(path: Path, values: Any) -> np.ndarray:
    """`values` as float64 [K, 3] in [-1, 1]. Raises PixseqError for anything else."""
    try:
        colors = np.asarray(values)
        if colors.dtype.kind not in "fiu":
            raise ValueError(f"they are of type {colors.dtype}")
        colors = colors.astype(np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise PixseqError(f"{path}: its colours are not numbers: {error}", f"pass {FORMS}") from None
    if colors.ndim != 2 or colors.shape[1] != 3 or not 1 <= len(colors) <= MAX_COLORS:
        raise PixseqError(
            f"{path}: its colours have the shape {list(colors.shape)}, a palette has [K, 3] with K up to {MAX_COLORS}",
            "one row a colour: red, green, blue",
        )
    if not np.isfinite(colors).all():
        raise PixseqError(f"{path}: {(~np.isfinite(colors)).sum()} of its values are not finite", "fit it again")
    low, high = colors.min(), colors.max()
    if low < -1 or high > 1:
        guess = "they look like 0..255: rescale by x / 127.5 - 1" if low >= 0 and high <= 255 else "fit it again"
        raise PixseqError(f"{path}: values from {low:g} to {high:g}, but a palette's lie from -1 to 1", guess)
    return colors


def _self_check(path: Path, checks: Any, colors: np.ndarray) -> None:
    try:
        rgb = np.array([check["rgb"] for check in checks], dtype=np.uint8).reshape(-1, 3)
        codes = np.array([check["code"] for check in checks], dtype=np.int64)
        wrong = np.flatnonzero(nearest(rgb, colors) != codes)
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise PixseqError(f"{path} has no usable self_check: {error!r}", "the file is damaged: fit it again") from None
    if len(codes) != CHECKED or len(wrong):
        raise PixseqError(
            f"{path} fails its self-check: {len(wrong)} of {len(codes)} colours do not get the index it states",
            "it was changed or made by another definition of nearest: copy or fit it again",
        )
