"""A seeded mutator of every kind of artifact and source: nothing but errors for users comes out of what reads them.

    python tests/fuzz.py 100000 [SEED]      so many mutations of each kind, by hand
    python tests/fuzz.py 2000 1 store npz   of these kinds

`KINDS` maps a name to a function that makes a sound example in a folder and returns what reads it.
"""

import contextlib
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import yaml
from bombs import model
from pictures import drawn, pngs, write_parquet, write_tar

from pixseq.errors import PixseqError

KINDS = {}
ODD = (
    None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e300, 10**30, 2**31, 2**63, "", "x", "\0", "../x", "9" * 30, "\u202e",
    [], {}, [[]], [None], {"": 0}, [1, 2], ["a"], {"a": {}}, [0] * 40,
)  # fmt: skip


def kind(make):
    KINDS[make.__name__] = make
    return make


# ---- what is mutated, and what reads it


@kind
def store(folder):
    from conftest import write_tokens

    from pixseq.engine.opening import open_images, read_all
    from pixseq.stages import show

    write_tokens(folder / "t.zarr", count=8, chunk_rows=4)

    def read(folder):
        show.run(folder / "t.zarr", verify=True)
        found = open_images(folder / "t.zarr", "tokens", "pixels")
        read_all(found), found.labels()

    return read


@kind
def whole_pictures(folder):
    from pixseq.artifacts import atomic
    from pixseq.artifacts.arrays import SHAPES, Spec, StoreWriter
    from pixseq.engine.opening import open_images, read_all

    codec = {"scheme": "pixels", "height": None, "width": None, "n_vocab": None, "palette": None, "palette_id": None}
    codec |= {"class_names": None, "shorter_side": 4}
    shapes = np.array([[4, 5], [6, 4]], np.int32)
    with atomic.writing(folder / "t.zarr") as partial:
        specs = {"pixels": Spec("uint8", (None, 3), True), SHAPES: Spec("int32", (None, 2))}
        writer = StoreWriter(partial, specs, {}, 8)
        writer.append({"pixels": np.zeros((44, 3), np.uint8), SHAPES: shapes}, {})
        writer.finish("pixels", "encode", {}, {}, {}, codec)

    def read(folder):
        found = open_images(folder / "t.zarr", "pixels")
        read_all(found), found.whole_pictures(slice(0, 2))

    return read


@kind
def features(folder):
    from pixseq.artifacts import atomic
    from pixseq.artifacts.arrays import Spec, StoreWriter
    from pixseq.engine.feature_pair import open_pair

    for name, seed in (("a", 0), ("b", 1)):
        with atomic.writing(folder / name) as partial:
            specs = {"features": Spec("float32", (2, None, 4)), "labels": Spec("int32", (None,))}
            writer = StoreWriter(partial, specs, {}, 4)
            values = np.random.default_rng(seed).normal(size=(2, 6, 4)).astype(np.float32)
            writer.append({"features": values, "labels": np.arange(6, dtype=np.int32) % 2}, {})
            writer.finish("features", "features", {}, {}, {}, {"layers": [0, 1], "class_names": ["a", "b"]})

    def read(folder):
        open_pair(folder / "a", folder / "b")

    return read


@kind
def checkpoint(folder):
    from pixseq.engine.opening import open_model
    from pixseq.runtime import machine
    from pixseq.stages import show

    model(folder / "m")
    (folder / "m" / "log.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.0, "val_loss": 2.1}\n')

    def read(folder):
        from pixseq.artifacts.metrics import read_log

        read_log(folder / "m" / "log.jsonl")
        show.run(folder / "m", verify=True)
        with machine("cpu", "fp32") as where:
            open_model(folder / "m", where)

    return read


@kind
def palette(folder):
    from pixseq.artifacts.palette import load_palette, save_palette
    from pixseq.stages import show

    save_palette(folder / "p.json", np.random.default_rng(0).uniform(-1, 1, (8, 3)), "palette fit", {}, {}, {})
    np.save(folder / "p.npy", np.random.default_rng(0).uniform(-1, 1, (8, 3)))

    def read(folder):
        load_palette(folder / "p.npy")
        load_palette(folder / "p.json")
        show.run(folder / "p.json", verify=True)

    return read


@kind
def metrics(folder):
    from pixseq.artifacts.metrics import write_metrics
    from pixseq.stages import show

    write_metrics(folder / "x.json", "evaluate", {"a": 1}, {"model": {"path": "m", "id": "i"}}, {"nats": [1.5, 2]})
    return lambda folder: show.run(folder / "x.json", verify=True)


@kind
def picture(folder):
    from pixseq.artifacts.picture import save_png
    from pixseq.stages import show

    save_png(folder / "x.png", np.zeros((8, 8, 3), np.uint8), "decode", {}, {})
    return lambda folder: show.run(folder / "x.png", verify=True)


@kind
def config(folder):

    from pixseq.config import FinetuneFile, GridFile, PretrainFile, as_dict, effective

    (folder / "c.yaml").write_text(yaml.safe_dump({**as_dict(PretrainFile()), **as_dict(FinetuneFile())}))
    (folder / "g.yaml").write_text("data: {train: a, val: b}\nbudgets: [1.0e+9, 1.0e+10]\nprobe: {layers: '0,1'}\n")

    def read(folder):
        effective(PretrainFile, file=folder / "c.yaml")
        effective(FinetuneFile, file=folder / "c.yaml")
        effective(GridFile, file=folder / "g.yaml")

    return read


@kind
def partial(folder):
    """What an interrupted encode left, gone on with; and the records of a training run."""
    from pixseq.artifacts import atomic
    from pixseq.artifacts.arrays import Spec, StoreWriter
    from pixseq.artifacts.checkpoint import run_folder

    specs, recipe = {"tokens": Spec("uint16", (None, 4)), "labels": Spec("int32", (None,))}, {"a": 1, "b": {"c": 2}}
    rows = {"tokens": np.ones((4, 4), np.uint16), "labels": np.ones(4, np.int32)}

    def begin(folder):
        with atomic.resuming(folder / "t", command="encode") as partial:
            StoreWriter(partial, specs, recipe, 4).append(rows, {"stop": 4})
            raise InterruptedError

    def train(folder):
        with run_folder(folder / "m", "pretrain", recipe, False, False) as (partial, _, _):
            (partial / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
            raise InterruptedError

    for each in (begin, train):
        with contextlib.suppress(InterruptedError):
            each(folder)

    def read(folder):
        from pixseq.artifacts.metrics import read_log

        try:
            with run_folder(folder / "m", "pretrain", recipe, True, False) as (partial, _, _):
                read_log(partial / "log.jsonl")
                raise InterruptedError
        except (InterruptedError, PixseqError):
            pass
        with atomic.resuming(folder / "t", command="encode") as partial:
            StoreWriter(partial, specs, recipe, 4, True).append(rows, {"stop": 8})
            raise PixseqError("as far as this goes")

    return read


def source(make):
    """A kind of source: `make` writes it and returns its path within the folder."""

    def example(folder):
        from pixseq.data.images import Preparation, Reader
        from pixseq.data.sources import TokenSource, open_any

        path = make(folder)

        def read(folder):
            found = open_any(str(folder / path))
            if not isinstance(found, TokenSource):
                for _ in Reader(found, Preparation(size=2), limit=20):
                    pass

        return read

    KINDS[make.__name__] = example
    return make


@source
def npy(folder):
    np.save(folder / "x.npy", drawn(4))
    np.save(folder / "y.npy", np.arange(4))
    return "x.npy"


@source
def npz(folder):
    np.savez_compressed(folder / "a.npz", x_train=drawn(4), y_train=np.array(["a", "b", "a", "c"]))
    return "a.npz"


@source
def idx(folder):
    for name, values in (("train-images-idx3-ubyte", drawn(3)[..., 0]), ("train-labels-idx1-ubyte", np.arange(3))):
        sizes = b"".join(n.to_bytes(4, "big") for n in values.shape)
        (folder / name).write_bytes(bytes((0, 0, 8, values.ndim)) + sizes + values.astype(np.uint8).tobytes())
    return "."


@source
def webdataset(folder):
    members = [(f"{i}.{end}", data) for i, png in enumerate(pngs(3)) for end, data in (("png", png), ("cls", b"1"))]
    write_tar(folder / "a.tar", [*members, ("3.json", b'{"label": 2, "x": [1]}'), ("3.png", pngs(1)[0])])
    return "a.tar"


@source
def webdataset_gz(folder):
    write_tar(folder / "a.tar.gz", [(f"{i}.png", png) for i, png in enumerate(pngs(3))], "w:gz")
    return "a.tar.gz"


@source
def parquet(folder):
    write_parquet(folder / "a.parquet", {"image": pngs(3), "label": ["a", "b", "a"]})
    return "a.parquet"


@source
def zipped(folder):
    import zipfile

    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i, png in enumerate(pngs(3)):
            archive.writestr(f"{'ab'[i % 2]}/{i}.png", png)
    return "a.zip"


@source
def cifar(folder):
    import pickle

    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2], "filenames": ["a", "b"]}
        (folder / name).write_bytes(pickle.dumps(batch, 2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"c{i}" for i in range(10)]}, 2))
    return "."


@kind
def huggingface(folder):
    import torch

    from pixseq.interop.huggingface import read_hf

    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 4, "n_positions": 4, "vocab_size": 5}
    names = {"id2label": {"0": "a", "1": "b"}, "pixseq": {"shifted": True, "class_names": ["a", "b"]}}
    (folder / "config.json").write_text(json.dumps({"model_type": "imagegpt", **sizes, **names}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 2, "width": 2}, "clusters": [[0]]}))
    d = 4
    shapes = {"wte.weight": (5, d), "wpe.weight": (4, d), "ln_f.weight": (d,), "h.0.ln_1.weight": (d,)}
    shapes |= {"h.0.attn.c_attn.weight": (d, 3 * d), "h.0.attn.c_attn.bias": (3 * d,), "h.0.ln_2.weight": (d,)}
    shapes |= {"h.0.attn.c_proj.weight": (d, d), "h.0.attn.c_proj.bias": (d,), "h.0.mlp.c_fc.weight": (d, 4 * d)}
    shapes |= {"h.0.mlp.c_fc.bias": (4 * d,), "h.0.mlp.c_proj.weight": (4 * d, d), "h.0.mlp.c_proj.bias": (d,)}
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "pytorch_model.bin")
    read_hf(folder)
    return read_hf


# ---- how it is mutated


def mutate(folder, rng):
    """Change something in one file of the folder; returns what was done, in words."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        return "nothing is left"
    path = rng.choice(files)
    data = path.read_bytes()
    where = path.relative_to(folder)
    if rng.random() < 0.6 and path.suffix in (".json", ".jsonl", ".yaml"):
        with contextlib.suppress(ValueError, IndexError, yaml.YAMLError):  # it was damaged before, or holds nothing
            return f"{where}: {_restructure(path, data, rng)}"
    if rng.random() < 0.02:
        path.unlink()
        return f"{where}: removed"
    done, changed = _scramble(bytearray(data), rng)
    path.write_bytes(changed)
    return f"{where}: {done}"


def _restructure(path, data, rng):
    lines = data.decode().splitlines() if path.suffix == ".jsonl" else None
    found = json.loads(lines[-1]) if lines else yaml.safe_load(data) if path.suffix == ".yaml" else json.loads(data)
    places = []

    def walk(value):
        for key in value if isinstance(value, dict) else range(min(len(value), 50)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    if isinstance(found, dict | list):
        walk(found)
    holder, key = rng.choice(places)
    how = rng.random()
    if how < 0.15:
        del holder[key]
    elif how < 0.25 and isinstance(holder, dict):
        holder[rng.choice(("x", "", "class_names", "shape"))] = rng.choice(ODD)
    else:
        holder[key] = rng.choice(ODD)
    text = yaml.safe_dump(found) if path.suffix == ".yaml" else json.dumps(found)
    path.write_text("\n".join([*(lines or [])[:-1], text]) + "\n")
    return f"{key} of {str(holder)[:80]}"


def _scramble(data, rng):
    how, at = rng.choice(("flip", "cut", "byte", "bytes", "insert", "double", "number")), rng.randrange(len(data) or 1)
    if not data or how == "insert":
        data[at:at] = rng.randbytes(rng.randint(1, 20))
    elif how == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "byte":
        data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, ord("9"), ord("["), ord("-")))
    elif how == "bytes":
        data[at : at + 8] = rng.randbytes(8)
    elif how == "double":
        data[at:at] = data[max(at - 64, 0) : at]
    else:
        data[at : at + 4] = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**24)).to_bytes(4, rng.choice(("little", "big")))
    return f"{how} at {at}", bytes(data)


def fuzz(name, count, seed=0, say=None):
    """`count` mutations of one kind: (what was done, the traceback) of each that was met by anything but an error."""
    found = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        sound, trial = Path(scratch, "sound"), Path(scratch, "trial")
        sound.mkdir()
        read = KINDS[name](sound)
        for number in range(count):
            rng = random.Random(f"{name} {seed} {number}")
            shutil.copytree(sound, trial)
            done = [mutate(trial, rng) for _ in range(rng.choice((1, 1, 1, 2)))]
            try:
                read(trial)
            except (PixseqError, OSError):  # both are a line for the user
                pass
            except Exception:
                found.append((f"{name} {seed} {number}: {'; '.join(done)}", traceback.format_exc()))
                if say:
                    say(found[-1])
            shutil.rmtree(trial)
    return found


def main(count, seed, names):
    import warnings

    warnings.simplefilter("ignore")
    total = 0
    for name in names or KINDS:
        began = time.monotonic()
        found = fuzz(name, count, seed, lambda each: print(*each, sep="\n", flush=True))
        total += len(found)
        print(f"{name}: {count} mutations, {len(found)} faults, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{count * len(names or KINDS)} mutations, {total} faults")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, sys.argv[3:])
