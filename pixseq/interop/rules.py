"""One table of rules says how tensors of another program become ours, and which of theirs ours become again.

A reader writes its table as {our name: Rule}; what is missing, unknown or of another shape is told here, in its words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pixseq.errors import PixseqError
from pixseq.interop.foreign import NOT_OURS, as_weight
from pixseq.progress import track
from pixseq.text import few

ONE_MODEL = "the files are not of one model: get all of them again"

Shapes = Mapping[str, Sequence[int]]  # by their names


@dataclass(frozen=True)
class Layout:
    """How a tensor of theirs is laid out here, and back; no way back where such files are only read."""

    ours: Callable[[Tensor], Tensor]
    theirs: Callable[[Tensor], Tensor] | None = None


AS_IS = Layout(lambda x: x, lambda x: x)
TRANSPOSED = Layout(lambda x: x.T, lambda x: x.T)  # [in, out] there, [out, in] here
NEW_AXIS = Layout(lambda x: x[None], lambda x: x[0])
ALL_BUT_LAST_ROW = Layout(lambda x: x[:-1], lambda x: x)
LAST_ROW = Layout(lambda x: x[-1], lambda x: x[None])


@dataclass(frozen=True)
class Rule:
    """One tensor of ours: theirs, whose laid-out rows make it in turn, the shape that each has there, the layout."""

    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    layout: Layout = AS_IS


@dataclass(frozen=True)
class Words:
    """What a reader says, and its hint, of files whose tensors are not those of its rules.

    The fields in braces: `file`, and `names` of tensors, or the `name` of one with the shapes `found` and `wanted`.
    """

    missing: tuple[str, str]
    unknown: tuple[str, str]
    shape: tuple[str, str] = (
        "{name} in {file} has shape {found}, and {wanted} fits the other tensors",
        ONE_MODEL,
    )


def check_tensors(file: Path, found: Shapes, rules: Mapping[str, Rule], zeros: Shapes, words: Words) -> None:
    """From shapes alone, before gigabytes are read: what `rules` ask for and `zeros`, and nothing else.

    `zeros` are tensors that ours have not, which `take` leaves out. Raises PixseqError.
    """
    wanted = {name: rule.shape for rule in rules.values() for name in rule.theirs} | dict(zeros)
    if missing := [name for name in wanted if name not in found]:
        _refuse(words.missing, {"file": file, "names": few(missing)})
    if unknown := sorted(name for name in found if name not in wanted):
        _refuse(words.unknown, {"file": file, "names": few(unknown)})
    for name, shape in wanted.items():
        if tuple(found[name]) != tuple(shape):
            both = {"found": list(found[name]), "wanted": list(shape)}
            _refuse(words.shape, {"file": file, "name": name, **both})


def _refuse(words: tuple[str, str], facts: Mapping[str, object]) -> None:
    said, hint = words
    raise PixseqError(said.format_map(facts), hint)


def take(read: Callable[[str], Tensor], rules: Mapping[str, Rule]) -> dict[str, Tensor]:
    """Our tensors by name, contiguous, none sharing memory with another; `read` gives one of theirs as float32."""
    weights = {}
    with track("import", sum(len(rule.theirs) for rule in rules.values()), "tensors") as bar:
        for ours, rule in rules.items():
            weights[ours] = torch.cat([rule.layout.ours(read(name)) for name in rule.theirs]).contiguous()
            bar.advance(len(rule.theirs))
    return weights


def give(weights: Mapping[str, Tensor], rules: Mapping[str, Rule], zeros: Shapes) -> dict[str, Tensor]:
    """Their tensors by name: what `take` turns back into `weights` bit for bit, with zeros where ours have none.

    Rules that read the same tensor give its rows in their order. Each rule names one tensor and has a way back.
    """
    rows: dict[str, list[Tensor]] = {}
    for ours, rule in rules.items():
        (name,) = rule.theirs
        assert rule.layout.theirs is not None
        rows.setdefault(name, []).append(rule.layout.theirs(weights[ours]))
    given = {name: (torch.cat(each) if len(each) > 1 else each[0]).contiguous() for name, each in rows.items()}
    return given | {name: torch.zeros(tuple(shape)) for name, shape in zeros.items()}


def refuse_bias(file: Path, name: str, bias: Tensor, family: str) -> None:
    """A bias of zeros may be left out. Raises PixseqError for another."""
    if as_weight(file, name, bias).any():
        raise PixseqError(
            f"{name} in {file} is not zero (up to {bias.abs().max():.3g}), and {family} has no bias there", NOT_OURS
        )
