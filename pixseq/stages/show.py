"""show: the manifest of any artifact, and whether its content is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pixseq.artifacts import manifest
from pixseq.artifacts.lineage import lineage as lineage
from pixseq.artifacts.owning import owns
from pixseq.errors import PixseqError


@owns("show", "plot")
def run(
    path: str | Path, verify: bool = False, plot: str | Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """The manifest. With `plot`, the loss curve of a checkpoint is drawn there.

    With `verify`, everything is read and hashed first; raises PixseqError naming what is damaged.
    """
    if plot is not None:
        from pixseq.artifacts.picture import check_png

        check_png(plot)
    record = manifest.read(path)
    if verify:
        faults = _faults(Path(path), record)
        if faults:
            more = f" and {len(faults) - 1} more faults" if len(faults) > 1 else ""
            raise PixseqError(f"{path}: {faults[0]}{more}", "copy it again from where it is whole, or make it again")
    if plot is not None:
        _plot_log(Path(path), record, plot, overwrite)
    return record


def classes(path: str | Path) -> dict[str, int] | None:
    """The classes of a store's rows, by name, with how many rows each has; None where there are no labels."""
    import numpy as np

    from pixseq.artifacts.arrays import open_store

    store = open_store(path, "tokens", "pixels", "features")
    labels = store.labels()
    if labels is None:
        return None
    names = store.meta.get("class_names") or []
    numbers, counts = np.unique(labels, return_counts=True)
    named = (names[n] if 0 <= n < len(names) else str(n) if n >= 0 else "without a label" for n in numbers.tolist())
    return dict(zip(named, counts.tolist()))


def _plot_log(path: Path, record: manifest.Manifest, plot: str | Path, overwrite: bool) -> None:
    from pixseq.artifacts.metrics import read_log
    from pixseq.artifacts.picture import save_png
    from pixseq.drawing.charts import Series, line_chart

    if record["kind"] != "checkpoint" or not (path / "log.jsonl").is_file():
        raise PixseqError(f"{path} of kind {record['kind']} has no training log", "--plot draws checkpoints we trained")
    rows = read_log(path / "log.jsonl")
    series: list[Series] = []
    for key, name in (("loss", "train"), ("val_loss", "validation"), ("ema_val_loss", "validation, averaged weights")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            series.append((name, [step for step, _ in points], [loss for _, loss in points]))
    image = line_chart(series, f"{path.name}: {record['stage']}", "step", "loss")
    save_png(plot, image, "show", {"plot": "log"}, {"model": manifest.reference(path, record)}, overwrite=overwrite)


def _faults(path: Path, record: manifest.Manifest) -> list[str]:
    kind = record["kind"]
    if kind in ("tokens", "pixels", "features"):
        from pixseq.artifacts.arrays import verify

        return verify(path)
    if kind == "checkpoint":
        from pixseq.artifacts.checkpoint import verify_checkpoint

        return verify_checkpoint(path)
    if kind == "palette":
        from pixseq.artifacts.palette import load_palette

        found = load_palette(path).id
    elif kind == "picture":
        from pixseq.artifacts.picture import picture_id

        found = picture_id(path)
    elif kind == "plan":
        from pixseq.artifacts.plan import plan_id

        found = plan_id(path)
    else:
        from pixseq.artifacts.metrics import metrics_id

        found = metrics_id(path)
    return [] if found == record["id"] else [f"the content does not match its id {record['id']}"]
