"""Test loss against linear-probe accuracy of every kept checkpoint: `correlation.py OUT picture.png numbers.json`."""

import json
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from pixseq.drawing.charts import line_chart

NAME = re.compile(r"(igpt|aim)-(\w+)-step(\d+)\.loss\.json")
LOSSES = {"igpt": "nats_per_token", "aim": "normalized_mse"}


def points(folder: Path) -> list[dict]:
    found = []
    for path in folder.glob("*.loss.json"):
        family, size, step = NAME.fullmatch(path.name).groups()
        probe = json.loads(path.with_name(path.name.replace(".loss.", ".probe.")).read_text())
        loss = json.loads(path.read_text())[LOSSES[family]]
        found.append({"family": family, "size": size, "step": int(step), "loss": loss})
        found[-1] |= {"test_accuracy": probe["test_accuracy"], "best_layer": probe["best_layer"]}
    return sorted(found, key=lambda p: (p["family"], p["size"], p["step"]))


def main(folder: Path, picture: Path, numbers: Path) -> None:
    found = points(folder)
    charts, correlation = [], {}
    for family, unit in LOSSES.items():
        mine = [p for p in found if p["family"] == family]
        series = []
        for size in sorted({p["size"] for p in mine}):
            run = sorted((p["loss"], 100 * p["test_accuracy"]) for p in mine if p["size"] == size)
            series.append((size, *zip(*run)))
        charts.append(line_chart(series, f"{family}: a point a checkpoint", unit, "linear probe, % of test"))
        correlation[family] = float(np.corrcoef([p["loss"] for p in mine], [p["test_accuracy"] for p in mine])[0, 1])
    Image.fromarray(np.concatenate(charts, axis=1)).save(picture)
    numbers.write_text(json.dumps({"points": found, "correlation": correlation}, indent=1) + "\n")
    print(json.dumps(correlation))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
