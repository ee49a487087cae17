"""python tests/ids.py [FOLDER]: make one small artifact of most kinds by the command line, and print the id of each.

Run before and after a change that should move nothing, on one machine: the lines are equal, the checkpoints' and the
training logs' too. What two machines must agree on is kept by test_ids.py.
"""

import contextlib
import hashlib
import io
import json
import sys
import tempfile
from pathlib import Path

import torch

from pixseq.artifacts import manifest
from pixseq.cli import app

TINY = "--set model.n_layer=2 --set model.n_head=2 --set model.d_model=16"
TINY_AIM = f"{TINY} --set model.family=aim --set model.patch_size=2 --set model.head_depth=1 --set model.head_width=24"
FEW = "--batch-size 8 --precision fp32 --device cpu"
TIMES = ("seconds", "tokens_per_second")  # in a log
EXACT = "--precision fp32 --device cpu"

# name of what is made: the command that makes it, without its --out. These are the same on every machine: the palette
# holds as many colours as the pictures have, all else is counted in whole numbers.
STORED = {
    "palette.json": "palette fit digits --colors 17 --size 8",
    "train.zarr": "encode digits --palette palette.json --size 8 --limit 240",
    "test.zarr": "encode digits --palette palette.json --size 8 --split test --limit 120",
    "views.zarr": "encode digits --palette palette.json --size 8 --limit 20 --views 3",
    "rgb.zarr": "encode digits --scheme rgb --size 4 --limit 40",
    "gray.zarr": "encode digits --scheme gray --size 6 --limit 40 --val-fraction 0.5 --part val",
    "pixels.zarr": "encode digits --scheme pixels --size 8 --limit 120",
    "whole.zarr": "encode digits --scheme pixels --size 12 --resize whole --limit 40",
}
COMPUTED = {
    "ar": f"pretrain train.zarr {TINY} --val test.zarr --steps 8 {FEW}",
    "bert": f"pretrain train.zarr {TINY} --objective bert --val test.zarr --steps 8 {FEW}",
    "rgb": f"pretrain rgb.zarr {TINY} --order spiral-out --steps 4 {FEW}",
    "aim": f"pretrain pixels.zarr {TINY_AIM} --steps 8 {FEW}",
    "aim-whole": f"pretrain whole.zarr {TINY_AIM} --set model.image_size=8 --augment resized-crop --steps 4 {FEW}",
    "tuned": f"finetune ar train.zarr --val test.zarr --steps 4 {FEW}",
    "train.features.zarr": f"features ar train.zarr {EXACT}",
    "test.features.zarr": f"features ar test.zarr {EXACT}",
    "raw.features.zarr": "features pixels train.zarr",
    "aim.features.zarr": f"features aim-whole whole.zarr {EXACT}",
    "probe.json": "probe train.features.zarr --test test.features.zarr",
    "distance.json": "frechet train.features.zarr test.features.zarr --layer 1",
    "eval.json": f"evaluate tuned test.zarr {EXACT}",
    "halves.png": f"sample ar --prompt test.zarr --count 3 --completions 2 --tokens halves.zarr {EXACT}",
    "grid.png": "decode rgb.zarr --count 9",
    "check.json": f"check aim pixels.zarr {EXACT}",
}


def make(folder: Path, name: str, command: str) -> None:
    """Run one command in `folder`, as the command line would."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        app([*command.split(), "-o", name, "--quiet"], standalone_mode=False)


def found(folder: Path) -> dict[str, str]:
    """{name: id} of all that was made in `folder`, and of every training log a digest of what is no time."""
    ids = {path.name: manifest.read(path)["id"] for path in sorted(folder.iterdir())}
    return ids | {f"{log.parent.name}/{log.name}": _digest(log) for log in sorted(folder.glob("*/log.jsonl"))}


def _digest(log: Path) -> str:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    return f"sha256:{hashlib.sha256(json.dumps(rows).encode()).hexdigest()}"


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else scratch)
        folder.mkdir(exist_ok=True)
        for name, command in (STORED | COMPUTED).items():
            make(folder, name, command)
        for name, id in found(folder).items():
            print(f"{id}  {name}")


if __name__ == "__main__":
    main()
