"""The curve of a probe: test accuracy by layer, beside its baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pixseq.drawing.charts import line_chart


def curve(numbers: Mapping[str, Any], name: str) -> np.ndarray:
    """Test accuracy by layer as a chart, uint8 [H, W, 3]; baselines of one layer are dashed levels."""

    def line(name: str, rows: Sequence[Mapping[str, Any]]) -> tuple:
        return name, [row["layer"] for row in rows], [100 * row["test_accuracy"] for row in rows]

    series = [line(name, numbers["layers"])]
    levels = []
    for baseline in numbers["baselines"]:
        if len(baseline["layers"]) > 1:
            series.append(line(baseline["name"], baseline["layers"]))
        else:
            levels.append((baseline["name"], 100 * baseline["test_accuracy"]))
    if numbers["concat"]:
        layers = numbers["concat"]["layers"]
        levels.append((f"layers {layers[0]} to {layers[-1]} together", 100 * numbers["concat"]["test_accuracy"]))
    levels.append(("most frequent class", 100 * numbers["majority"]))
    names = {"logistic": "Linear probe", "knn": "k-nearest-neighbour probe", "attentive": "Attentive probe"}
    title, axis = f"{names[numbers['method']]} by layer", "layer"
    if len(numbers.get("window", [])) > 1:
        title, axis = f"{names[numbers['method']]} of {len(numbers['window'])} layers together", "last layer"
    title += f": {100 * numbers['test_accuracy']:.1f} % at layer {numbers['best_layer']}"
    return line_chart(series, title, axis, "test accuracy, %", levels)
