"""The probes of models as a Markdown table: `table.py out/aim out/igpt`, or `table.py --matrix out/matrix`."""

import json
import sys
from pathlib import Path

METHODS = ("attentive", "probe", "knn")
NAMES = {"attentive": "attentive", "probe": "linear", "knn": "knn"}


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def by_layer(folders: list[Path]) -> str:
    """A row a layer, a column a model and method; then the best by validation, and the baselines of each."""
    found = {(f, m): json.loads((f / f"{m}.json").read_text()) for f in folders for m in METHODS}
    columns = list(found)
    lines = ["| layer | " + " | ".join(f"{f.name} {NAMES[m]}" for f, m in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    accuracy = {key: {str(row["layer"]): row["test_accuracy"] for row in data["layers"]} for key, data in found.items()}
    layers = sorted({layer for rows in accuracy.values() for layer in rows}, key=lambda x: (len(x), x))
    for layer in layers:
        lines.append(f"| {layer} | " + " | ".join(percent(accuracy[key].get(layer)) for key in columns) + " |")
    lines.append("| best by validation | " + " | ".join(percent(found[key]["test_accuracy"]) for key in columns) + " |")
    for folder in folders:
        last = json.loads((folder / "attentive6.json").read_text())
        lines.append(f"\n{folder.name}, attentive on the mean of the last six layers: {percent(last['test_accuracy'])}")
        for row in found[folder, "probe"].get("baselines", []):
            lines.append(f"\n{folder.name}, {row['name']}, linear: {percent(row['test_accuracy'])}")
    return "\n".join(lines)


def matrix(folder: Path) -> str:
    """Pretraining attention by attention of use: the best layer's linear probe."""
    lines = ["| pretrained | used causally | used bidirectionally |", "|---|---|---|"]
    for trained in ("causal", "prefix"):
        cells = [json.loads((folder / f"{trained}.{used}.json").read_text()) for used in ("causal", "bidirectional")]
        lines.append(f"| {trained} | " + " | ".join(percent(cell["test_accuracy"]) for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1] == "--matrix":
        print(matrix(Path(sys.argv[2])))
    else:
        print(by_layer([Path(arg) for arg in sys.argv[1:]]))
