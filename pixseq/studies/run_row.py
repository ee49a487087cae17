"""A run as a plan or a table tells of it, before anything of it is checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pixseq.studies.columns import ROLES


@dataclass(frozen=True)
class RunRow:
    """What is not told is None. `others` are its metrics and settings, by the names of their columns."""

    id: str | None = None
    status: str | None = None
    reason: str | None = None
    params: float | None = None
    tokens: float | None = None
    flops: float | None = None
    resolution: float | None = None
    budget: float | None = None
    seed: float | None = None
    others: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, cells: Mapping[str, Any]) -> RunRow:
        """Of a row's cells by their columns: those that play a role have its name."""
        known = {key: value for key, value in cells.items() if key in ROLES}
        return cls(**known, others={key: value for key, value in cells.items() if key not in ROLES})

    @property
    def name(self) -> str:
        """What people call it."""
        if self.id is None:
            return "a run"
        return self.id if self.id.startswith("line ") else f"the run {self.id}"
