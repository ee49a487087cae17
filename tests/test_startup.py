"""What commands import: torch and scikit-learn take seconds, and most commands need neither."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

HEAVY = {"torch", "sklearn", "scipy", "matplotlib", "pandas", "pyarrow"}
PROGRAM = """
import json, sys
from pixseq.cli import app
found = []
for words in json.loads(sys.argv[1]):
    try:
        code = app(words, standalone_mode=False) or 0
    except Exception as fault:
        code = fault.code
    found.append((code, sorted(set(json.loads(sys.argv[2])) & set(sys.modules))))
print(json.dumps(found))
"""


def run(folder, *commands):
    """The exit code of each command, run one after the other in one process, and what of HEAVY it has imported."""
    words = json.dumps([command.split() for command in commands]), json.dumps(sorted(HEAVY))
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of few colours in one folder and of many in another, and palette ids."""
    folder, rng = tmp_path_factory.mktemp("startup"), np.random.default_rng(0)
    for name, levels in (("few", 2), ("many", 256)):
        for i in range(6):
            path = folder / name / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((rng.integers(0, levels, (9, 9, 3)) * (255 // (levels - 1))).astype(np.uint8)).save(path)
    np.save(folder / "cifar10_trX.npy", rng.integers(0, 8, (4, 1024)))
    return folder


def test_pictures_and_palettes_need_neither_torch_nor_scikit_learn(folder):
    commands = (
        "palette fit few --size 8 -o p.json",
        "palette show p.json -o swatch.png",
        "palette fit many --size 8 --colors 4 -o q.json",
        "encode few --palette p.json --size 8 -o t.zarr",
        "encode digits --scheme gray --size 8 -o d.zarr",
        "encode few --scheme pixels --size 8 -o x.zarr",
        "encode cifar10_trX.npy -o ids.zarr",
        "decode t.zarr -o grid.png",
        "decode x.zarr -o grid2.png",
        "show t.zarr --verify",
        "show p.json",
        "show grid.png --lineage",
    )
    assert dict(zip(commands, run(folder, *commands))) == {each: [0, []] for each in commands}


def test_what_does_not_exist_is_told_before_torch_is_imported(folder):
    commands = (
        "pretrain nothing.zarr -o m",
        "finetune nothing nothing.zarr -o m",
        "pretrain few --from nothing -o m",
        "pretrain few --val nothing -o m",
        "features few nothing.zarr -o f.zarr",
        "features nothing few -o f.zarr",
        "features nothing.pt2 few -o f.zarr",
        "evaluate nothing nothing.zarr",
        "sample nothing -o grid.png",
        "sample few --prompt nothing -o grid.png",
        "check nothing",
        "check few nothing",
        "export hf nothing -o m",
        "export hf few --metrics nothing -o m",
        "import hf nothing -o m",
        "import aim nothing -o m",
        "import aim cifar10_trX.npy --head nothing -o m",
        "import openai nothing -o m",
        "scaling run nothing",
        "decode nothing.zarr -o grid.png",
        "encode nothing -o z.zarr",
        "palette fit nothing -o z.json",
        "show nothing",
    )
    assert dict(zip(commands, run(folder, *commands))) == {each: [1, []] for each in commands}
    assert run(folder, "scaling plan nothing -o p") == [[2, []]]
