"""The document of `scaling fit`: runs, and what the fit of each metric, resolution and method says of them.

Each type has one JSON form, whose keys others rely on. S draws of a fit. N params, D tokens, C FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pixseq.artifacts import manifest
from pixseq.artifacts.metrics import read_metrics
from pixseq.errors import PixseqError
from pixseq.numerics.forecast import Frontier, PowerLaw
from pixseq.numerics.laws import Law

Json = dict[str, Any]
Interval = tuple[float, float]

GROWING = ("params", "tokens", "tokens_per_param")
CONSTANTS = ("E", "A", "alpha", "B", "beta")
METRICS = ("loss", "accuracy", "frechet_distance")  # that a study measures
MEASURED_WITH = ("frechet_n", "frechet_floor", "frechet_floor_n", "frechet_extractor")  # beside a distance
RUN = ("id", "resolution", "budget", "params", "tokens", "flops", "seed", *MEASURED_WITH)


# ---- reading values of a document


def _number(value: Any) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError(f"{value!r} stands for a number")
    return value


def _finite(value: Any) -> float:
    number = _number(value)
    if number is None:
        raise ValueError("a number is missing")
    return number


def _positive(value: Any) -> float:
    if not _number(value) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} stands for a positive number")
    return value


def _whole(value: Any) -> int | None:
    if value is not None and type(value) is not int:
        raise ValueError(f"{value!r} stands for a whole number")
    return value


def _text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{value!r} stands for text")
    return value


def _named(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} stands for a name")
    return value


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(map(_named, _list(values)))


def _pair(values: Any) -> tuple[str, str]:
    first, second = _texts(values)
    return first, second


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{str(value)[:40]!r} stands for a list")
    return value


def _interval(value: Any) -> Interval | None:
    if value is None:
        return None
    low, high = map(_finite, _list(value))
    return low, high


def _each(read: Callable[[Json], Any], values: Any) -> tuple[Any, ...]:
    found = _list(values)
    if not all(isinstance(each, dict) for each in found):
        raise ValueError("a list of keys and values holds something else")
    return tuple(map(read, found))


# ---- a fit


@dataclass(frozen=True)
class Run:
    """A training run: its size, cost and what was measured, by metric; `beside` says how a distance was measured."""

    id: str | None
    resolution: int | None
    budget: float
    params: float
    tokens: float
    flops: float
    seed: int | None
    values: Mapping[str, float | None]
    beside: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> Json:
        seed = {} if self.seed is None else {"seed": self.seed}
        size = {key: getattr(self, key) for key in ("id", "resolution", "budget", "params", "tokens", "flops")}
        measured: Json = {}
        for metric, value in self.values.items():
            measured |= {metric: value, **(self.beside if metric == "frechet_distance" else {})}
        return {**size, **seed, **measured}

    @classmethod
    def from_json(cls, found: Json) -> Run:
        values = {key: _number(value) for key, value in found.items() if key not in RUN}
        beside = {key: found[key] for key in MEASURED_WITH if key in found}
        return cls(
            _text(found.get("id")),
            _whole(found.get("resolution")),
            budget=_positive(found["budget"]),
            params=_positive(found["params"]),
            tokens=_positive(found["tokens"]),
            flops=_positive(found["flops"]),
            seed=_whole(found.get("seed")),
            values=values,
            beside=beside,
        )


@dataclass(frozen=True)
class Excluded:
    """A run, or its lack of one metric, that no fit is made of, and why."""

    id: str | None
    reason: str

    def to_json(self) -> Json:
        return vars(self)

    @classmethod
    def from_json(cls, found: Json) -> Excluded:
        return cls(_text(found.get("id")), _named(found["reason"]))


@dataclass(frozen=True)
class Growth:
    """A quantity at the optimum as coefficient C^exponent; None where there is no fit."""

    exponent: float | None = None
    exponent_ci: Interval | None = None
    coefficient: float | None = None

    def log(self, log_c: float) -> float:
        assert self.coefficient is not None and self.exponent is not None  # of a fit that stands
        return math.log(self.coefficient) + self.exponent * log_c


@dataclass(frozen=True)
class Constants:
    """Of L = E + A N^-alpha + B D^-beta; None where no law was fitted."""

    E: float | None = None
    E_ci: Interval | None = None
    A: float | None = None
    alpha: float | None = None
    alpha_ci: Interval | None = None
    B: float | None = None
    beta: float | None = None
    beta_ci: Interval | None = None


@dataclass(frozen=True)
class Optimum:
    """The best size at one budget; None where it is not known. `curvature` is a parabola's."""

    flops: float
    params: float | None
    tokens: float | None
    tokens_per_param: float | None
    value: float | None
    curvature: float | None
    runs: int | None
    status: str

    NAMES = ("flops", "params_opt", "tokens_opt", "tokens_per_param", "value_opt", "curvature", "runs", "status")

    def to_json(self) -> Json:
        return dict(zip(self.NAMES, vars(self).values()))

    @classmethod
    def from_json(cls, found: Json) -> Optimum:
        params, tokens, ratio, value, curvature = (_number(found.get(name)) for name in cls.NAMES[1:6])
        runs, status = _whole(found.get("runs")), _named(found["status"])
        return cls(_positive(found["flops"]), params, tokens, ratio, value, curvature, runs, status)


@dataclass(frozen=True)
class Outlier:
    """A run far off its fit: `off` as a share of what the fit says, `deviations` of the noise."""

    id: str
    params: float
    tokens: float | None
    value: float | None
    off: float | None
    deviations: float | None

    @classmethod
    def from_json(cls, found: Json) -> Outlier:
        numbers = (_number(found.get(name)) for name in ("tokens", "value", "off", "deviations"))
        return cls(_named(found.get("id", "a run")), _positive(found["params"]), *numbers)


@dataclass(frozen=True)
class Floor:
    """What a metric is where nothing is left to gain: of real pictures against real ones, None: not known.

    `floor` is its median over `runs`, `within` how many lie at or below their own, `near` how many little above.
    """

    floor: float | None
    within: int
    near: int
    runs: int
    n: tuple[float, ...]
    floor_n: tuple[float, ...]
    extractors: tuple[str, ...]

    def to_json(self) -> Json:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}

    @classmethod
    def from_json(cls, found: Json) -> Floor:
        within, near, runs = (int(_finite(_whole(found.get(key, 0)))) for key in ("within", "near", "runs"))
        n, floor_n = (tuple(map(_finite, _list(found.get(key, [])))) for key in ("n", "floor_n"))
        extractors = _texts(found.get("extractors", []))
        return cls(_number(found.get("floor")), within, near, runs, n, floor_n, extractors)


@dataclass(frozen=True)
class Fit:
    """One metric at one resolution by one method. `refused` is the reason why there is none; numbers are then None.

    `transform` is set for a metric to be large: it was fitted as its ceiling minus it. `draws` are of resamples, their
    laws of L present where the method has one; None: there are none.
    """

    metric: str
    direction: str
    resolution: int | None
    transform: str | None
    method: str
    params: Growth = Growth()
    tokens: Growth = Growth()
    tokens_per_param: Growth = Growth()
    constants: Constants = Constants()
    residual: float | None = None
    seed_spread: float | None = None
    floor: Floor | None = None
    outliers: tuple[Outlier, ...] = ()
    optima: tuple[Optimum, ...] = ()
    draws: Frontier | None = None
    refused: str | None = None
    flags: tuple[str, ...] = ()

    @property
    def ceiling(self) -> float | None:
        """A metric to be large is fitted as its ceiling minus it: "1 - accuracy", "100 - top1"."""
        return float(self.transform.split(" - ")[0]) if self.transform else None

    @property
    def frontier(self) -> Frontier:
        """The optima as a function of compute, as of one draw. Of a fit that stands."""
        laws = [
            PowerLaw(*(np.array([x], float) for x in (g.exponent, g.coefficient))) for g in (self.params, self.tokens)
        ]
        known = [getattr(self.constants, name) for name in CONSTANTS]
        return Frontier(laws[0], laws[1], None if None in known else Law(*(np.array([x], float) for x in known)))

    def to_json(self) -> Json:
        grown = {what: vars(getattr(self, what)) for what in GROWING}
        return {
            "metric": self.metric,
            "direction": self.direction,
            "resolution": self.resolution,
            "transform": self.transform,
            "method": self.method,
            **{f"{what}_{key}": _plain(value) for what in GROWING for key, value in grown[what].items()},
            **{key: _plain(value) for key, value in vars(self.constants).items()},
            "residual": self.residual,
            "seed_spread": self.seed_spread,
            "floor": self.floor and self.floor.to_json(),
            "outliers": [vars(one) for one in self.outliers],
            "budgets": [one.to_json() for one in self.optima],
            "draws": {} if self.draws is None else {key: one.tolist() for key, one in self.draws.arrays().items()},
            "refused": self.refused,
            "flags": list(self.flags),
        }

    @classmethod
    def from_json(cls, found: Json) -> Fit:
        """Raises KeyError or ValueError."""
        fit = cls(
            metric=_named(found["metric"]),
            direction=_named(found["direction"]),
            resolution=_whole(found["resolution"]),
            transform=_text(found["transform"]),
            method=_named(found["method"]),
            params=_growth(found, "params"),
            tokens=_growth(found, "tokens"),
            tokens_per_param=_growth(found, "tokens_per_param"),
            constants=Constants(**{key: _constant(key, found.get(key)) for key in Constants.__dataclass_fields__}),
            residual=_number(found.get("residual")),
            seed_spread=_number(found.get("seed_spread")),
            floor=Floor.from_json(found["floor"]) if found.get("floor") else None,
            outliers=_each(Outlier.from_json, found.get("outliers", [])),
            optima=_each(Optimum.from_json, found["budgets"]),
            draws=_draws_from_json(found["draws"]),
            refused=_text(found["refused"]),
            flags=_texts(found["flags"]),
        )
        fit.check()
        return fit

    def check(self) -> None:
        """Raises ValueError for a fit that stands without its numbers."""
        if self.ceiling is not None and not math.isfinite(self.ceiling):
            raise ValueError(f"{self.transform!r} names no ceiling")
        if self.refused:
            return
        for growth in (self.params, self.tokens):
            _positive(growth.coefficient)
            if growth.exponent is None:
                raise ValueError(f"the fit of {self.metric} by {self.method} has no exponents")
        if self.method != "isoflop" and None in [getattr(self.constants, name) for name in CONSTANTS]:
            raise ValueError(f"the fit of {self.metric} by {self.method} lacks constants of its law")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _constant(key: str, value: Any) -> Any:
    return _interval(value) if key.endswith("_ci") else _number(value)


def _growth(found: Json, what: str) -> Growth:
    of = {key: found.get(f"{what}_{key}") for key in ("exponent", "exponent_ci", "coefficient")}
    return Growth(_number(of["exponent"]), _interval(of["exponent_ci"]), _number(of["coefficient"]))


def _draws_from_json(found: Json) -> Frontier | None:
    """Raises KeyError or ValueError."""
    if not found:
        return None
    arrays = {name: np.array([_number(value) for value in _list(values)], float) for name, values in found.items()}
    if len({len(values) for values in arrays.values()}) != 1:
        raise ValueError("the draws of a fit are of different numbers")
    laws = [PowerLaw(arrays[f"{what}_exponent"], arrays[f"{what}_coefficient"]) for what in ("params", "tokens")]
    return Frontier(laws[0], laws[1], Law(*(arrays[name] for name in CONSTANTS)) if "E" in arrays else None)


# ---- all fits of a study


def metrics_of(fits: Iterable[Fit]) -> list[str]:
    """Each once, in the order in which they come."""
    return list(dict.fromkeys(one.metric for one in fits))


def resolutions_of(fits: Iterable[Fit]) -> list[int | None]:
    """Each once, in the order in which they come."""
    return list(dict.fromkeys(one.resolution for one in fits))


@dataclass(frozen=True)
class Disagreement:
    """Methods whose numbers for one quantity their intervals do not reconcile."""

    metric: str
    resolution: int | None
    what: str
    methods: Mapping[str, float]
    pairs: tuple[tuple[str, str], ...]
    text: str

    def to_json(self) -> Json:
        return vars(self) | {"methods": dict(self.methods), "pairs": [list(pair) for pair in self.pairs]}

    @classmethod
    def from_json(cls, found: Json) -> Disagreement:
        pairs = found.get("pairs", [list(found["methods"])])  # of fits from before pairs were named
        names = (_named(found["metric"]), _whole(found["resolution"]), _named(found["what"]))
        return cls(*names, found["methods"], tuple(map(_pair, _list(pairs))), _named(found["text"]))


@dataclass(frozen=True)
class Bootstrap:
    """How draws were made: so many resamples, and the level of intervals."""

    resamples: int
    seed: int
    level: float
    of: Mapping[str, str]


@dataclass(frozen=True)
class StudyFit:
    """Everything that `scaling fit` says. `tokens_per_image` is by resolution, spelt as text; None: not known."""

    counting: str | None
    params_counted: str | None
    tokens_per_image: Mapping[str, float] | None
    runs: tuple[Run, ...]
    excluded: tuple[Excluded, ...]
    bootstrap: Bootstrap
    fits: tuple[Fit, ...]
    disagreements: tuple[Disagreement, ...]
    notes: tuple[str, ...] = ()

    @property
    def metrics(self) -> list[str]:
        return metrics_of(self.fits)

    @property
    def resolutions(self) -> list[int | None]:
        return resolutions_of(self.fits)

    def to_json(self) -> Json:
        return {
            "counting": self.counting,
            "params_counted": self.params_counted,
            "tokens_per_image": self.tokens_per_image,
            "runs": [one.to_json() for one in self.runs],
            "excluded": [one.to_json() for one in self.excluded],
            "bootstrap": asdict(self.bootstrap),
            "fits": [one.to_json() for one in self.fits],
            "disagreements": [one.to_json() for one in self.disagreements],
            **({"notes": list(self.notes)} if self.notes else {}),
        }

    @classmethod
    def from_json(cls, found: Json) -> StudyFit:
        """Raises KeyError or ValueError."""
        how, per_image = found["bootstrap"], found.get("tokens_per_image")
        level = _positive(how["level"])
        if level >= 1:
            raise ValueError(f"{level!r} stands for the level of intervals")
        whole = cls(
            _text(found["counting"]),
            _text(found["params_counted"]),
            per_image and {side: _positive(count) for side, count in per_image.items() if _positive(int(side))},
            _each(Run.from_json, found["runs"]),
            _each(Excluded.from_json, found["excluded"]),
            Bootstrap(how.get("resamples"), how.get("seed"), level, how.get("of", {})),
            _each(Fit.from_json, found["fits"]),
            _each(Disagreement.from_json, found["disagreements"]),
            _texts(found.get("notes", [])),
        )
        without = {one.resolution for one in whole.fits} - {run.resolution for run in whole.runs}
        if without:
            raise ValueError(f"it has a fit and no run at the resolution {without.pop()}")
        return whole


def read_fit(path: str | Path) -> tuple[StudyFit, dict[str, str]]:
    """The fit in a file and its reference. Raises PixseqError where it holds none, or one that is damaged."""
    record, numbers = read_metrics(path)
    if not numbers.keys() >= {"fits", "runs", "bootstrap"} or not numbers["runs"]:
        raise PixseqError(
            f"{path} holds the numbers of {record['stage']}, not of a scaling fit",
            "make one with: pixseq scaling fit PLAN-or-CSV -o fit.json",
        )
    try:
        found = StudyFit.from_json(numbers)
    except KeyError as error:
        raise PixseqError(f"{path} is no usable fit: it has no {error}", "make it again") from None
    except (ValueError, TypeError, AttributeError) as error:  # a list where keys are, and the like
        raise PixseqError(f"{path} is no usable fit: {error}", "make it again") from None
    return found, manifest.reference(path, record)
