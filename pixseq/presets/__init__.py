"""The presets that ship with pixseq, and YAML files read as mappings."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pixseq.bounded.files import read_bytes
from pixseq.bounded.structure import MOST_YAML, parse_yaml
from pixseq.errors import PixseqError, UsageError, guess


def preset_names() -> list[str]:
    return sorted(p.name.removesuffix(".yaml") for p in _presets().iterdir() if p.name.endswith(".yaml"))


def read_preset(name: str) -> dict[str, Any]:
    """The YAML of a preset, with its `about`. Raises UsageError for a name that is none."""
    if name not in preset_names():
        raise UsageError(
            f"there is no preset {name!r}", f"{guess(name, preset_names())}presets: {', '.join(preset_names())}"
        )
    return _parse_yaml(_presets().joinpath(f"{name}.yaml").read_text(), f"preset {name}")


def read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        text = read_bytes(path, MOST_YAML).decode()
    except PixseqError as error:
        raise UsageError(error.message, "pass a YAML file") from None
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist", "check the path: it names a YAML file") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}", "pass a YAML file") from None
    return _parse_yaml(text, str(path))


def _presets() -> Traversable:
    return resources.files("pixseq").joinpath("presets")


def _parse_yaml(text: str, place: str) -> dict[str, Any]:
    try:
        found = parse_yaml(text)
    except ValueError as error:
        raise UsageError(f"{place} is not YAML: {error}", "mend the file") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UsageError(
            f"{place} holds a {type(found).__name__}, not keys and values", "for example model: {n_layer: 8}"
        )
    return found
