"""frechet: how far the features of drawn pictures lie from those of real ones, with what is needed to read the number.

A distance means nothing without its extractor, its resize and its n (clean-fid, Parmar et al. 2022, shows by how much
each moves it), so these stand beside it, and with them the distance between two samples of the real side: the floor.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pixseq import progress
from pixseq.artifacts.arrays import Store, open_store
from pixseq.artifacts.foreign import open_foreign
from pixseq.artifacts.manifest import content_id, reference, whole
from pixseq.artifacts.metrics import write_metrics
from pixseq.artifacts.owning import owns
from pixseq.bounded.files import check_holes, open_regular
from pixseq.bounded.numpy_files import read_header
from pixseq.engine.extraction import EXPORTED, PIXELS
from pixseq.engine.feature_pair import chunk_slices, layer_rows, masks
from pixseq.engine.parts import part_of
from pixseq.errors import PixseqError, UsageError
from pixseq.numerics.frechet import form, frechet_distance, kid
from pixseq.numerics.parts import two_samples
from pixseq.streams import Stream

ENOUGH = 10  # rows a feature: the bias is then at most d / (2 n), 5 % of the variance (see numerics/frechet.py)
KID_ROWS = 5000  # of a set, drawn at random: its time grows with n squared, its error falls with the root of n
LARGEST = 1e45  # the kernel cubes squares of it
TAKEN = "give features of `pixseq features`, or an [n, d] array as .npy or zarr"


@owns("frechet", "out")
def run(
    a: str | Path,
    b: str | Path,
    out: str | Path | None = None,
    layer: int | None = None,
    count: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    floor: str | Path | None = None,
) -> dict[str, Any]:
    """The numbers as a mapping, written to `out` as metrics where that is given. `b` is the real side.

    Each side is a features artifact, of which one `layer` is taken (it may be left out where there is one only), or
    an [n, d] array as .npy or zarr. `count`: so many rows of each, or fewer where there are fewer, from all over it
    (see engine/parts.py; where there are labels, of every class its share). An image is one row: features of every
    position are averaged over positions, of several masks over masks.

    `floor` in the numbers is {"frechet_distance", "n"}: the distance between two samples of all of `b` without a row in
    common, of n_a rows each, or of half of `b` where it is too small for that; None under four rows. Where there are
    labels, every class has its share of either sample. Where the option `floor` names features of other real pictures,
    it is their distance from `b`, of as many rows of each, chosen as for `count`. `kid` is of at most KID_ROWS random
    rows a side. `seed` draws both. `remarks` are sentences. Raises PixseqError where the sides cannot be compared.
    """
    if count is not None and count < 2:
        raise UsageError(f"--count is {count}, it must be at least 2", "a covariance needs two rows")
    sides = _open(Path(a), layer, count), _open(Path(b), layer, None)
    if layer is not None and not any(side.facts for side in sides):
        raise UsageError(f"--layer {layer} was given, but {a} and {b} are arrays", "leave --layer out")
    _check_belong(*sides)
    others = None if floor is None else _open(Path(floor), layer, None)
    if others is not None:
        _check_belong(others, sides[1])
    labels = sides[1].labels
    chosen, part = _part(len(sides[1].rows), count, labels)
    compared = replace(sides[1], rows=sides[1].rows[chosen], labels=None if labels is None else labels[chosen])
    numbers = _measured(sides, compared, others, seed)
    for remark in numbers["remarks"]:
        progress.warn(remark)
    if out is not None:
        config = {"layer": layer, "count": count, "seed": seed, "part_a": sides[0].part, "part_b": part}
        inputs = {"a": sides[0].reference, "b": sides[1].reference}
        if others is not None:
            inputs["floor"] = others.reference
        write_metrics(out, "frechet", config, inputs, numbers, overwrite)
    return numbers


def _measured(
    sides: tuple[FeatureSet, FeatureSet], compared: FeatureSet, others: FeatureSet | None, seed: int
) -> dict[str, Any]:
    """The numbers; `compared` holds the rows of the real side that the distance is of."""
    drawn, real = sides[0].rows, compared.rows
    (n_a, dim), n_b = drawn.shape, len(real)
    with progress.track("frechet", 3, "parts") as bar:
        distance = frechet_distance(drawn, real)
        bar.note(f"distance {distance:.6g}")
        bar.advance()
        least = _floor(sides[1], n_a, seed) if others is None else _floor_of(others, compared, n_a)
        bar.advance()
        parts = [_some(rows, KID_ROWS, seed, i) for i, rows in enumerate((drawn, real))]
        companion = kid(*parts)
        bar.advance()

    return {
        "frechet_distance": distance,
        "n_a": n_a,
        "n_b": n_b,
        "dim": dim,
        "form": form(n_a, n_b, dim),
        "extractor": _both(*(side.extractor for side in sides)),
        "resize": _both(*(side.resize for side in sides)),
        "precision": _both(*(side.precision for side in sides)),
        "floor": least,
        "kid": companion.value,
        "kid_se": companion.se,
        "kid_n_a": len(parts[0]),
        "kid_n_b": len(parts[1]),
        "remarks": _remarks(sides, n_b, least),
    }


# ---- what is compared


@dataclass(frozen=True)
class FeatureSet:
    """Feature rows [n, d] of any real type, finite. `facts` say how they were made, in words; empty for an array."""

    path: Path
    rows: np.ndarray
    reference: dict[str, str]
    facts: dict[str, str] = field(default_factory=dict)
    pictures: str | None = None  # their size, as 32x32
    precision: str = "unknown"  # of the extractor
    labels: np.ndarray | None = None  # of all its images
    part: dict[str, Any] | None = None  # how the rows were chosen; None: they are all
    remarks: tuple[str, ...] = ()

    @property
    def extractor(self) -> str:
        return ", ".join(filter(None, self.facts.values())) or "array"

    @property
    def resize(self) -> str:
        return f"none: pictures of {self.pictures} as encoded" if self.pictures else "unknown"


def _open(path: Path, layer: int | None, count: int | None) -> FeatureSet:
    if path.is_file():
        side = _from_array(path, _npy(path), count)
    elif (array := open_foreign(path)) is not None:
        side = _from_array(path, array, count)
        if (missing := array.nchunks - array.nchunks_initialized) > 0:
            remark = f"{path}: {missing} of {array.nchunks} chunks are not stored, and read as {array.fill_value}"
            side = replace(side, remarks=(remark,))
    else:
        side = _from_features(open_store(path, "features"), layer, count)
    return side


def _check_enough(path: Path, rows: int) -> None:
    if rows < 2:
        raise PixseqError(
            f"{path} holds {rows} row{'s' * (rows != 1)}, two are the least a covariance needs",
            "give more pictures, thousands for a number worth quoting",
        )


def _npy(path: Path) -> np.ndarray:
    """The array, mapped."""
    with open_regular(path) as file:
        if file.read(6) != b"\x93NUMPY":
            raise PixseqError(f"{path} is neither features nor an .npy array", TAKEN)
        file.seek(0)
        try:
            check_holes(file)
            read_header(file, os.fstat(file.fileno()).st_size)
        except ValueError as error:
            raise PixseqError(f"{path} does not load as an array: {error}", "save it again, whole") from None
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header comes as many types
        raise PixseqError(
            f"{path} does not load as an array: {error}", "save it again, as plain numbers: np.save(path, array)"
        ) from None


def _from_array(path: Path, array: Any, count: int | None) -> FeatureSet:
    """`array` is NumPy's or zarr's."""
    if array.ndim != 2 or 0 in array.shape[1:] or array.dtype.kind not in "fiu":
        raise PixseqError(
            f"{path} holds {array.dtype} of the shape {list(array.shape)}, where real numbers [n, d] are needed",
            "one row an image: average or flatten other axes first",
        )
    _check_enough(path, array.shape[0])
    chosen, part = _part(array.shape[0], count, None)
    try:
        rows = np.asarray(array[chosen, :])
    except Exception as error:  # zarr and its codecs raise many types
        raise PixseqError(f"{path} is damaged: {error}", "make it again") from error
    bad = int((~np.isfinite(rows)).any(axis=1).sum())
    if bad:
        raise PixseqError(f"{path}: {bad} of {len(rows)} rows hold values that are not finite", "mend the extractor")
    if max(float(rows.max()), -float(rows.min())) > LARGEST:
        raise PixseqError(f"{path} holds values beyond {LARGEST:g}", "these are no features: mend the extractor")
    return FeatureSet(path, rows, {"path": str(path), "id": content_id("array", {"rows": whole(rows)}, {})}, part=part)


def _from_features(store: Store, layer: int | None, count: int | None) -> FeatureSet:
    layers = store.meta["layers"]
    if layer is None and len(layers) > 1:
        raise UsageError(f"{store.path} holds the layers {layers}, and one is compared", "name it: --layer N")
    layer = layers[0] if layer is None else layer
    if layer not in layers:
        raise UsageError(
            f"--layer {layer}: {store.path} holds the layers {layers}",
            "choose among those, or make features of more layers",
        )
    _check_enough(store.path, len(store) // masks(store))
    height, width = store.meta.get("height"), store.meta.get("width")
    labels = store.labels()
    labels = None if labels is None else labels[:: masks(store)]
    chosen, part = _part(len(store) // masks(store), count, labels)
    return FeatureSet(
        store.path,
        _rows(store, layer, chosen),
        reference(store.path, store.manifest),
        _facts(store, layer),
        f"{height}x{width}" if height and width else None,
        store.manifest["config"].get("precision") or "none",
        labels,
        part,
    )


def _part(n: int, count: int | None, labels: np.ndarray | None) -> tuple[np.ndarray | slice, dict[str, Any] | None]:
    """The numbers of `count` of `n` images that stand for all, and how they were chosen."""
    rows, record = part_of(n, n if count is None else count, labels)
    return slice(None) if rows is None else rows, record


def _rows(store: Store, layer: int, images: np.ndarray | slice) -> np.ndarray:
    """[images, D]: the mean over positions, a chunk in memory at a time, and over the masks of an image."""
    wanted = np.arange(len(store)).reshape(-1, masks(store))[images].ravel()
    parts = []
    for rows in chunk_slices(store):
        here = wanted[slice(*np.searchsorted(wanted, [rows.start, rows.stop]))] - rows.start
        if len(here):
            values = layer_rows(store, layer, rows)[here].astype(np.float32, copy=False)
            parts.append(values.mean(axis=1) if values.ndim == 3 else values)
    every = np.concatenate(parts)
    return every if masks(store) == 1 else every.reshape(-1, masks(store), every.shape[1]).mean(axis=1)


def _facts(store: Store, layer: int) -> dict[str, str]:
    """What two features must agree in to be comparable, by name."""
    config, meta = store.manifest["config"], store.meta
    tap, pool = meta.get("tap"), meta.get("pool")
    if tap == PIXELS:
        return {"models": "pixels", "values": f"{store.shape('features')[-1]} values"}
    model = store.manifest["inputs"].get("model", {}).get("id", "unknown")
    if tap == EXPORTED:
        return {"models": f"exported model {model}", "values": f"{store.shape('features')[-1]} values"}
    seed, weights, attention = (config.get(key) for key in ("random_init", "weights", "attention"))
    averaged = pool == "mean" or len(store.shape("features")) == 4
    return {
        "models": f"model {model}",
        "weights": f"random weights of seed {seed}" if seed is not None else f"weights {weights or 'unknown'}",
        "attentions": f"attention {attention or 'unknown'}",
        "taps": f"tap {tap or 'unknown'}",
        "layers": f"layer {layer}",
        "pools": _positions_meant(meta.get("below")) if averaged else f"pool {pool or 'unknown'}",
        "masks": f"mean over {masks(store)} masks" if masks(store) > 1 else "",
    }


def _positions_meant(below: float | None) -> str:
    return "mean over positions" if below is None else f"mean over positions below {below:g} of the rows"


def _check_belong(a: FeatureSet, b: FeatureSet) -> None:
    """Raises PixseqError where the two were not made alike, naming both."""
    for what in {**a.facts, **b.facts} if a.facts and b.facts else ():
        ours, theirs = a.facts.get(what), b.facts.get(what)
        if ours != theirs:
            raise PixseqError(
                f"the {what} differ: {a.path} has {ours or 'none'}, {b.path} has {theirs or 'none'}",
                "distances are between features of one extractor: make both with the same model and options",
            )
    if a.rows.shape[1] != b.rows.shape[1]:
        raise PixseqError(
            f"the widths differ: {a.path} has {a.rows.shape[1]} features, {b.path} has {b.rows.shape[1]}",
            "make both with the same extractor",
        )
    if a.pictures and b.pictures and a.pictures != b.pictures:
        raise PixseqError(
            f"the pictures differ: those of {a.path} are {a.pictures}, of {b.path} {b.pictures}",
            "encode both at one size",
        )


def _both(ours: str, theirs: str) -> str:
    return ours if ours == theirs else f"a: {ours}; b: {theirs}"


# ---- what stands beside the distance


def _some(rows: np.ndarray, most: int, seed: int, side: int) -> np.ndarray:
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.random.default_rng([seed, Stream.FRECHET_KID, side]).choice(len(rows), most, replace=False))]


def _floor(real: FeatureSet, n_a: int, seed: int) -> dict[str, Any] | None:
    n = min(n_a, len(real.rows) // 2)
    if n < 2:
        return None
    halves = two_samples(len(real.rows), n, real.labels, np.random.default_rng([seed, Stream.FRECHET_FLOOR]))
    return {"frechet_distance": frechet_distance(*(real.rows[half] for half in halves)), "n": n}


def _floor_of(others: FeatureSet, real: FeatureSet, n_a: int) -> dict[str, Any]:
    """Of as many rows of either side, which stand for all of it; `real` holds the rows that the distance is of."""
    n = min(n_a, len(others.rows), len(real.rows))
    parts = [side.rows[_part(len(side.rows), n, side.labels)[0]] for side in (others, real)]
    return {"frechet_distance": frechet_distance(*parts), "n": n}


def _remarks(sides: tuple[FeatureSet, FeatureSet], n_b: int, floor: dict[str, Any] | None) -> list[str]:
    """What a reader of the number should know."""
    a, b = sides
    n_a, dim = a.rows.shape
    remarks = [*a.remarks, *b.remarks]
    if a.reference["id"] == b.reference["id"]:
        remarks.append("both sides are the same features")
    if bool(a.facts) != bool(b.facts):
        array, features = (b, a) if a.facts else (a, b)
        remarks.append(f"{array.path} does not say what made it: whether {features.path} compares with it is unknown")
    least = min(n_a, n_b)
    if least < ENOUGH * dim:
        singular = ", and its covariance singular" if least <= dim else ""
        remarks.append(
            f"n = {least} is small for {dim} features{singular}: two samples of one distribution already differ by up "
            f"to d / (2 n) of its variance, under 5 % only from n = {ENOUGH * dim} on; compare the distance with the "
            "floor and with others of the same n, or go by KID"
        )
    if a.facts and b.facts and a.precision != b.precision:
        remarks.append(f"the features of {a.path} were computed in {a.precision}, those of {b.path} in {b.precision}")
    if floor is None:
        remarks.append(f"{b.path} has {len(b.rows)} rows, too few for a floor")
    elif floor["n"] != n_a:
        remarks.append(
            f"the floor is of n = {floor['n']}, the distance of n = {n_a}: a smaller n raises it; {2 * n_a} real rows "
            "would give one of the same n"
        )
    return remarks
