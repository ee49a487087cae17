"""Text of another hand (names of files, classes and tensors, what foreign programs say), made safe for where it goes.

Nothing that steers a terminal (controls, escapes, the direction of text) leaves here, whatever a file holds.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection

LISTED = 5  # names that a message lists
PUNCTUATION = str.maketrans({c: f"\\{c}" for c in "\\`[]<>&|#"})  # what Markdown or HTML would take for more than text


def printable(text: str) -> str:
    """For a terminal: "?" stands for what would steer it; lines stay lines."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def one_line(text: str, instead: str = "?") -> str:
    """For a cell of a table, or a label in a picture: `instead` stands for ends of lines too."""
    return "".join(c if c.isprintable() else instead for c in text)


def shown(name: object) -> str:
    """For messages, notes and what artifacts keep of names: spelt as \\x1b, undecodable bytes too, so that it tells."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


def few(names: Collection[object], most: int = LISTED) -> str:
    """The first `most` names as `shown`, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown(name) for name in names[:most]) + more


def word(name: object) -> str:
    """One word of a shell, in hints that are commands to paste: quoted where it has blanks or the like."""
    return shlex.quote(str(name))


def json_line(document: str) -> str:
    """For JSON that is read on a terminal too: spelt as \\u...., which a parser reads as the same text."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in document)


def markdown(text: object) -> str:
    """Text as text, whatever Markdown or HTML would make of it."""
    return shown(text).translate(PUNCTUATION)


def code_span(text: object) -> str:
    """A code span of Markdown that no backtick in the text ends."""
    text = shown(text)
    if "`" not in text:
        return f"`{text}`"
    ticks = "`" * (_longest_ticks(text) + 1)
    return f"{ticks} {text} {ticks}"


def code_block(text: str, language: str) -> str:
    """A code block of Markdown that no line of the text ends."""
    ticks = "`" * max(_longest_ticks(text) + 1, 3)
    return "\n".join([ticks + language, *map(shown, text.strip().split("\n")), ticks])


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
