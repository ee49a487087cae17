"""Which column of a table of runs is what, by the names that people, Weights & Biases and Epoch AI give them.

A role is one of the names that a fit reads by: params, tokens, flops ... A column that plays none is a metric if it
holds numbers and is not plainly a setting of the run.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pixseq.artifacts.fit import MEASURED_WITH, METRICS
from pixseq.errors import PixseqError, UsageError

REQUIRED = ("params", "tokens", "flops")
# Whole names, as `plain` makes them.
ROLES = {
    "params": r"model size|[nm]params|((n|num|number of|total|model|trainable|non ?emb(edding)?) )*param(eter)?s?"
    r"( (count|total|non ?emb(edding)?))?",
    "tokens": r"ntokens|((n|num|number of|total|seen|train(ed|ing)?) )*tokens?( (seen|total|trained|processed))?"
    r"|(training |train )?data(set)? size( tokens)?",
    "flops": r"((total|train|training|model) )*(compute|flops?)( (total|flops?))?",
    "resolution": r"(image |img )?resolution|(image|img) size",
    "budget": r"(flops? |compute |isoflops? )?budget",
    "seed": r"((random|train|training) )?seed",
    "id": r"id|name|run|(run|model|display) name|run id",
    "status": r"((run|job) )?(status|state)",
    "reason": r"reason",
}
LETTERS = {"N": "params", "D": "tokens", "C": "flops"}
# What else a row may say of its run: neither measured nor fitted.
SETTING = (
    r"(n |num |(trainer )?global )?(layers?|heads?|gpus?|epochs?|steps?)|depth|width"
    r"|d model|n embd|hidden size|d ff|n vocab|vocab size"
    r"|n ctx|tokens per (image|pixel)|seq(uence)? len(gth)?|context length"
    r"|patch size|((global|micro) )?batch( size)?|iterations?|iters?|max steps"
    r"|((max|min|learning|peak) )*(lr|rate)|weight decay|dropout|warmup( steps)?|beta ?[12]|momentum|grad clip|images"
    r"|seconds|runtime|relative time.*|timestamp|(wall )?time|created|world size|sweep|index"
    r"|(gpu|tpu|chip|device)s? ?(hours?|days?)"
    r"|(total |training )?(pf|[pez]flops?|(peta|exa|zetta)flops?)( s)? ?days?"
    r"|(cost|price)( usd)?|mfu|throughput|(tokens|images|samples)( per)? (seconds?|sec|s)|(peak )?memory( gi?b)?"
    r"|frechet (floor )?n|frechet floor"
)
DONE = ("done", "finished", "completed", "complete", "success", "succeeded")
PLACE = re.compile(r"^(config|summary(_metrics)?)[/.]")  # as Weights & Biases exports
UNIT = re.compile(r"\s*[(\[](flops?|tokens|total|count|datapoints|gradients|[NDC])[)\]]\s*$", re.IGNORECASE)


def plain(name: str) -> str:
    """A name for comparing: without case, place, punctuation and a unit that scales nothing.

    "config.n_params", "N Params" and "nParams" are one; so are "Training compute (FLOP)" and "training_compute".
    """
    name = PLACE.sub("", UNIT.sub("", name.strip()))
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return re.sub(r"[^a-z0-9]+", " ", name.lower()).strip()


def role(name: str) -> str | None:
    if name.strip() in LETTERS:
        return LETTERS[name.strip()]
    return next((role for role, pattern in ROLES.items() if re.fullmatch(pattern, plain(name))), None)


def is_setting(name: str) -> bool:
    """Of the run, by its name: no metric."""
    return name.startswith(("config/", "config.", "_")) or bool(re.fullmatch(SETTING, plain(name)))


def assigned(path: Path, header: Sequence[str], cells: Mapping[str, Sequence[str]], chosen: Sequence[str]) -> dict:
    """Role: column. `chosen` are texts ROLE=COLUMN that go before any guess; `cells` [column][line] tell columns apart.

    A column of a role's very name goes before others. Raises PixseqError where several may play a role and differ.
    """
    found = _chosen(path, header, chosen)
    for part in ROLES:
        candidates = [name for name in header if role(name) == part and name not in found.values()]
        if part in found or not candidates:
            continue
        exact = [name for name in candidates if name == part]
        different = {tuple(cells[name]) for name in candidates}
        if len(different) > 1 and not exact and part in (*REQUIRED, "resolution", "budget"):
            shown = ", ".join(candidates)
            raise PixseqError(
                f"{path}: {len(candidates)} columns may be {part}: {shown}",
                f"choose one, as --column '{part}={candidates[0]}'",
            )
        found[part] = (exact or candidates)[0]
    return found


def _chosen(path: Path, header: Sequence[str], chosen: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in chosen:
        part, equals, name = (piece.strip() for piece in text.partition("="))
        if not equals or part not in ROLES:
            raise UsageError(
                f"--column {text!r} is not of the form ROLE=COLUMN", f"a role is one of: {', '.join(ROLES)}"
            )
        match = [each for each in header if each == name] or [each for each in header if plain(each) == plain(name)]
        if len(match) != 1:
            close = difflib.get_close_matches(name, header, 1)
            hint = f"did you mean {close[0]}?" if close else f"it has: {', '.join(filter(None, header))}"
            raise UsageError(f"--column {text}: {path} has no column {name!r}", hint)
        found[part] = match[0]
    return found


def renamed(header: Sequence[str], roles: Mapping[str, str]) -> dict[str, str]:
    """Column: the key of rows that it becomes. Roles and known measures by their own names, others as they are called.

    Columns without a name, and others that speak of a role that is taken, become none.
    """
    keys = {name: part for part, name in roles.items()}
    for name in header:
        if not name or name in keys or role(name) is not None:
            continue
        short = PLACE.sub("", name)
        if short.lower() in (*METRICS, *MEASURED_WITH):
            short = short.lower()
        taken = short in keys.values() or sum(PLACE.sub("", other) == short for other in header) > 1
        keys[name] = name if taken or is_setting(name) else short
    return keys
