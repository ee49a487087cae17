"""What a reader of the pipeline should take away: what was made, three numbers, the pictures, what to do next.

Usage: python summary.py OUT, the folder that the Makefile fills.
"""

import json
import sys
from pathlib import Path

PICTURES = {
    "probe.png": "accuracy layer by layer: what the model learned without a label",
    "completions.png": "the top halves of test digits, four ways to go on that the model drew, the originals",
    "samples.png": "digits that the model drew from nothing",
    "loss.png": "the loss as it learned",
}
NEXT = """\
pixseq palette fit photos/ --colors 512 --size 16 -o palette.json
pixseq encode photos/ --palette palette.json --size 16 --val-fraction 0.1 --part train -o train.zarr
pixseq encode photos/ --palette palette.json --size 16 --val-fraction 0.1 --part val -o val.zarr
pixseq pretrain train.zarr --val val.zarr --preset igpt-cifar16 --dry-run
pixseq pretrain train.zarr --val val.zarr --preset igpt-cifar16 -o model
pixseq sample model --prompt val.zarr --keep 0.5 --count 8 --completions 4 -o halves.png"""


def numbers_of(path: Path) -> dict:
    return json.loads(path.read_text())


def summary(out: Path) -> str:
    probe, tuned = numbers_of(out / "probe.json"), numbers_of(out / "evaluation.json")
    raw = next(row for row in probe["baselines"] if row["name"] == "raw pixels")
    accuracies = [
        (raw["test_accuracy"], "raw pixels", "a linear classifier of the pixels themselves"),
        (probe["test_accuracy"], f"layer {probe['best_layer']}", "the same, of what the model makes of the pixels"),
        (tuned["accuracy"], "fine-tuned", "the model itself, trained on with the labels"),
    ]
    table = "\n".join(f"  {100 * share:5.1f} %  {name:<11} {what}" for share, name, what in accuracies)
    pictures = "\n".join(f"  {(out / name).resolve()}\n      {what}" for name, what in PICTURES.items())
    commands = "\n".join(f"  {line}" for line in NEXT.splitlines())
    images = probe["n_train"]
    return f"""
Made: a model that learned to predict the next pixel, from {images:,} handwritten digits at random places and no label.
Its accuracy on {probe["n_test"]} digits by other hands; guessing gives {100 * probe["majority"]:.0f} %:

{table}

From the first number to the second is what predicting pixels taught it: the claim of Image GPT.

Pictures:
{pictures}

Next, your own pictures, photos/ (class folders in it are labels; more in the README):
  export PATH={Path(sys.executable).parent}:$PATH
{commands}
"""


if __name__ == "__main__":
    print(summary(Path(sys.argv[1])), end="")
