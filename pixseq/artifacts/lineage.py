"""Where an artifact comes from: its parents, theirs, and so on down to the sources, as far as they are still there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixseq.artifacts import manifest
from pixseq.errors import PixseqError

MOST_TOLD = 500  # artifacts: a stranger's folder may hold a chain without end


@dataclass(frozen=True)
class Ancestor:
    """One artifact or source of a lineage, as `role` of what was made of it.

    `command` is what made it; where it is not at hand, `lacking` says why, and nothing is known of its own parents.
    What several were made of is told once: elsewhere it is `again`.
    """

    role: str
    path: str
    id: str
    kind: str | None = None
    command: str | None = None
    lacking: str | None = None
    again: bool = False
    parents: list[Ancestor] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        said = {"role": self.role, "path": self.path, "id": self.id, "kind": self.kind, "command": self.command}
        return {
            **said,
            "lacking": self.lacking,
            "again": self.again,
            "parents": [parent.to_json() for parent in self.parents],
        }


def lineage(path: str | Path) -> Ancestor:
    """The artifact at `path` with all that it was made of."""
    return _of("artifact", str(path), Path(path), manifest.read(path), set())


def _of(role: str, named: str, path: Path, record: manifest.Manifest, told: set[str]) -> Ancestor:
    """`told` holds the ids of what was met before, so that a manifest that names itself ends, too."""
    id, kind = record["id"], record["kind"]
    if id in told:
        return Ancestor(role, named, id, kind, again=True)
    told.add(id)
    parents = [_parent(parent_role, reference, path, told) for parent_role, reference in record["inputs"].items()]
    command = " ".join(["pixseq", *map(str, record["argv"][1:])])
    return Ancestor(role, named, id, kind, command, parents=parents)


def _parent(role: str, reference: Mapping[str, Any], child: Path, told: set[str]) -> Ancestor:
    """A parent is known by its id, wherever it is now: where it was, or beside what was made of it."""
    named, id = str(reference.get("path")), reference.get("id")
    if id is None:
        return Ancestor(role, named, "-", lacking="its id is not told")
    if not id.startswith("sha256:"):
        return Ancestor(role, named, id, "source")
    lacking = "not found" if len(told) < MOST_TOLD else f"not followed beyond {MOST_TOLD} artifacts"
    for path in (Path(named), child.absolute().parent / Path(named).name) if len(told) < MOST_TOLD else ():
        try:
            record = manifest.read(path)
        except (PixseqError, OSError, ValueError):
            continue
        if record["id"] == id:
            return _of(role, named, path, record, told)
        lacking = f"another one is there now, {record['id'][:19]}"
    return Ancestor(role, named, id, lacking=lacking)
