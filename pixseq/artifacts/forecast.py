"""The document of `scaling forecast`: the compute that targets need. Its JSON keys are the names of the fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Other:
    """What the other law says of the same target; `flops` None: it is out of reach."""

    method: str
    flops: float | None


@dataclass(frozen=True)
class Forecast:
    """What a target takes at a resolution; numbers are None where there is no forecast, which `status` says.

    `beyond` is `flops` over the largest budget studied. An upper end of an interval is None where the target is out of
    reach in too many resamples.
    """

    metric: str
    resolution: int
    target: float | None
    flops: float | None = None
    flops_ci: Sequence[float | None] | None = None
    params: float | None = None
    tokens: float | None = None
    images: float | None = None
    years: float | None = None
    years_ci: Sequence[float | None] | None = None
    beyond: float | None = None
    status: str = "ok"
    other: Other | None = None


@dataclass(frozen=True)
class StudyForecast:
    """All forecasts of a study, and what they rest on."""

    method: str
    growth_per_year: float
    start_flops: float
    studied_flops: Sequence[float]
    counting: str | None
    level: float
    rows: Sequence[Forecast]
    assumptions: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
