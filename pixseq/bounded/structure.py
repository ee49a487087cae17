"""JSON and YAML by strangers, as plain values: neither deep nor swollen, of numbers and texts that can be used.

Whatever is wrong with the text comes as one ValueError whose message is a line.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from pixseq.bounded.files import read_bytes
from pixseq.errors import PixseqError

MOST_JSON = 1 << 24  # bytes: a store's metadata with a palette of 65,535 colours takes half of it
MOST_YAML = 1 << 20
MOST_NODES = 100_000  # values in a YAML file, each alias counted as what it stands for
MOST_DIGITS = 100  # of a whole number: a count of all there is takes 80
DEEPEST = 100  # levels
# What of YAML is no text: as YAML 1.1 has it, less its trap doors. A pattern, and the characters it begins with.
PLAIN = {
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    "float": (
        r"""[-+]?(?:[0-9][0-9_]*[.][0-9_]*|[.][0-9][0-9_]*)(?:[eE][-+][0-9]+)?$
            | [-+]?[.](?:inf|Inf|INF)$ | [.](?:nan|NaN|NAN)$""",
        "-+0123456789.",
    ),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$", "-+0123456789"),
}


def parse_json(text: str | bytes, finite: bool = True) -> Any:
    """A value. With `finite`, NaN and the infinities are refused, for which JSON has no word.

    Raises ValueError.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode(json.detect_encoding(text))
        found = json.loads(
            text,
            parse_int=_whole,
            parse_float=_finite if finite else None,
            parse_constant=_refuse_constant if finite else None,
        )
    except RecursionError:
        raise ValueError("it is nested without end") from None
    if text.count("[") + text.count("{") > DEEPEST and _depth(found) > DEEPEST:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels")
    if "\\u" in text and _has_half(json.dumps(found, ensure_ascii=False)):
        raise ValueError("it holds half of a surrogate pair")  # which can be written nowhere
    return found


def _has_half(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"it holds a number of {len(digits):,} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"it holds a number too large to count with, {digits[:20]}")
    return value


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"it holds {word}, which is no number")


def _depth(value: Any) -> int:
    """How many levels there are, level by level and not by recursion."""
    depth, level = 0, [value]
    while level and depth <= DEEPEST:
        depth += 1
        level = [
            each
            for one in level
            if isinstance(one, dict | list)
            for each in (one.values() if isinstance(one, dict) else one)
            if isinstance(each, dict | list)
        ]
    return depth


def read_json(path: str | Path, hint: str, most: int = MOST_JSON) -> Any:
    """The value in a file. Raises PixseqError with `hint` for anything wrong with it, OSError where it is not there."""
    try:
        return parse_json(read_bytes(path, most))
    except ValueError as error:
        raise PixseqError(f"{path} is not readable as JSON: {error}", hint) from None


def read_object(path: str | Path, hint: str, most: int = MOST_JSON) -> dict[str, Any]:
    """The same, of a file that holds keys and values."""
    found = read_json(path, hint, most)
    if not isinstance(found, dict):
        raise PixseqError(f"{path} holds a {type(found).__name__}, not keys and values", hint)
    return found


def parse_yaml(text: str) -> Any:
    """A value: what aliases stand for is counted before it is made. Raises ValueError, for a key given twice too.

    Of what YAML 1.1 takes for something else than it looks like, 1:30 (90), 017 (15), 2001-01-01 and yes, no, on, off
    are texts, as YAML 1.2 has it.
    """
    if len(text) > MOST_YAML:
        raise ValueError(f"it has {len(text):,} characters, more than the {MOST_YAML:,} that are read")
    try:
        return _load_yaml(text)
    except RecursionError:
        raise ValueError("it is nested without end") from None
    except Exception as error:  # PyYAML's constructors raise nearly anything for values like 2001-13-45
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(said) from None


def _refuse_twice(keys: Iterable[str]) -> None:
    """Raises ValueError for a key that stands twice: PyYAML would drop what the first one holds without a word."""
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"the key {key} is given twice in one section")
        seen.add(key)


def _load_yaml(text: str) -> Any:
    import yaml

    class Bounded(yaml.SafeLoader):
        """Counts the nodes as if no two shared any, and the levels."""

        count, depth = 0, 0

        def __init__(self, text: str):
            super().__init__(text)
            self.sizes: dict[int, int] = {}

        def compose_node(self, parent: Any, index: Any) -> Any:
            before, alias = self.count, self.check_event(yaml.AliasEvent)
            self.depth += 1
            if self.depth > DEEPEST:
                raise ValueError(f"it is nested deeper than {DEEPEST} levels")
            self.count += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            if alias and id(node) not in self.sizes:
                raise ValueError("it holds a value that holds itself")
            if alias:
                self.count += self.sizes[id(node)]
            if self.count > MOST_NODES:
                raise ValueError(f"it unfolds to more than {MOST_NODES:,} values")
            self.sizes[id(node)] = self.count - before
            scalar = isinstance(node, yaml.ScalarNode) and node.tag.rpartition(":")[2] in ("int", "float")
            if node is not None and scalar and len(node.value) > MOST_DIGITS:
                raise ValueError(f"it holds a number of {len(node.value):,} digits")
            if isinstance(node, yaml.MappingNode):
                _refuse_twice(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            return node

    replaced = {"bool", "int", "float", "timestamp"}
    Bounded.yaml_implicit_resolvers = {
        first: [each for each in those if each[0].rpartition(":")[2] not in replaced]
        for first, those in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for kind, (pattern, firsts) in PLAIN.items():
        Bounded.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(pattern, re.VERBOSE), list(firsts))
    loader = Bounded(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
