"""Artifacts, unfinished ones and configurations, for fuzz.py: a sound example of each, and what reads it."""

import contextlib

import numpy as np
import yaml
from bombs import model
from conftest import write_tokens

from pixseq.errors import Interrupted, PixseqError

TINY = "model: {n_layer: 1, n_head: 1, d_model: 4}\ntrain: {batch_size: 4, steps: 2}\n"
FINE = "finetune: {batch_size: 4, steps: 2}\n"


def beside(kept):
    """Whole inputs for command lines: a store, a model of it and configurations."""
    write_tokens(kept / "t.zarr", count=12, chunk_rows=4)
    write_tokens(kept / "v.zarr", count=8, seed=1, chunk_rows=4)
    model(kept / "m")
    (kept / "tiny.yaml").write_text(TINY)
    (kept / "fine.yaml").write_text(FINE)


def store(folder, kept):
    from pixseq.engine.image_store import open_images, read_all
    from pixseq.stages import show

    beside(kept)
    write_tokens(folder / "t.zarr", count=8, chunk_rows=4)

    def read(folder):
        show.run(folder / "t.zarr", verify=True)
        found = open_images(folder / "t.zarr", "tokens", "pixels")
        read_all(found), found.labels()

    return (
        read,
        "show HERE/t.zarr --verify --json",
        "show HERE/t.zarr --verify",
        "show HERE/t.zarr --lineage --json",
        "decode HERE/t.zarr -o OUT",
        "pretrain HERE/t.zarr --config KEPT/tiny.yaml --val KEPT/t.zarr -o OUT",
        "pretrain KEPT/t.zarr --config KEPT/tiny.yaml --val HERE/t.zarr -o OUT",
        "features KEPT/m HERE/t.zarr -o OUT",
        "evaluate KEPT/m HERE/t.zarr -o OUT --json",
        "sample KEPT/m --prompt HERE/t.zarr --count 2 -o OUT",
        "check KEPT/m HERE/t.zarr",
    )


def whole_pictures(folder, kept):
    from pixseq.artifacts import owning
    from pixseq.artifacts.specs import PICTURE_SHAPES, Spec
    from pixseq.artifacts.store_writer import StoreWriter
    from pixseq.engine.image_store import open_images, read_all

    codec = {"scheme": "pixels", "height": None, "width": None, "n_vocab": None, "palette": None, "palette_id": None}
    codec |= {"class_names": None, "shorter_side": 4}
    shapes = np.array([[4, 5], [6, 4]], np.int32)
    with owning.writing(folder / "t.zarr") as partial:
        specs = {"pixels": Spec("uint8", (None, 3), True), PICTURE_SHAPES: Spec("int32", (None, 2))}
        writer = StoreWriter(partial, specs, {}, 8)
        writer.append({"pixels": np.zeros((44, 3), np.uint8), PICTURE_SHAPES: shapes}, {})
        writer.finish("pixels", "encode", {}, {}, {}, codec)

    def read(folder):
        found = open_images(folder / "t.zarr", "pixels")
        read_all(found), found.whole_pictures(slice(0, 2))

    aim = "--set model.family=aim --set model.patch_size=2 --set model.image_size=4 --set model.head_depth=1"
    aim += " --set model.n_layer=1 --set model.n_head=1 --set model.d_model=4 --set model.head_width=4"
    return (
        read,
        "show HERE/t.zarr --verify",
        "decode HERE/t.zarr -o OUT",
        f"pretrain HERE/t.zarr --steps 2 --batch-size 2 {aim} -o OUT",
    )


def features(folder, kept):
    from pixseq.artifacts import owning
    from pixseq.artifacts.specs import Spec
    from pixseq.artifacts.store_writer import StoreWriter
    from pixseq.engine.feature_pair import open_pair

    for name, seed in (("a", 0), ("b", 1)):
        with owning.writing(folder / name) as partial:
            specs = {"features": Spec("float32", (2, None, 4)), "labels": Spec("int32", (None,))}
            writer = StoreWriter(partial, specs, {}, 16)
            values = np.random.default_rng(seed).normal(size=(2, 40, 4)).astype(np.float32)
            writer.append({"features": values, "labels": np.arange(40, dtype=np.int32) % 2}, {})
            writer.finish("features", "features", {}, {}, {}, {"layers": [0, 1], "class_names": ["a", "b"]})

    def read(folder):
        open_pair(folder / "a", folder / "b")

    return (
        read,
        "probe HERE/a --test HERE/b --c 1 -o OUT",
        "probe HERE/a --test HERE/b --method knn --layers 0 -o OUT",
        "frechet HERE/a HERE/b --layer 0 -o OUT",
    )


def checkpoint(folder, kept):
    from pixseq.engine.opening import open_model
    from pixseq.runtime import machine
    from pixseq.stages import show

    beside(kept)
    model(folder / "m")
    (folder / "m" / "log.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.0, "val_loss": 2.1}\n')

    def read(folder):
        from pixseq.artifacts.metrics import read_log

        read_log(folder / "m" / "log.jsonl")
        show.run(folder / "m", verify=True)
        with machine("cpu", "fp32") as where:
            open_model(folder / "m", where)

    return (
        read,
        "show HERE/m --verify --json",
        "show HERE/m --lineage",
        "show HERE/m --plot OUT",
        "check HERE/m KEPT/t.zarr --json",
        "sample HERE/m --count 2 -o OUT",
        "evaluate HERE/m KEPT/t.zarr -o OUT",
        "features HERE/m KEPT/t.zarr -o OUT",
        "finetune HERE/m KEPT/t.zarr --config KEPT/fine.yaml -o OUT",
        "export hf HERE/m -o OUT",
    )


def palette(folder, kept):
    from pixseq.artifacts.palette import load_palette, save_palette
    from pixseq.stages import show

    beside(kept)
    save_palette(folder / "p.json", np.random.default_rng(0).uniform(-1, 1, (8, 3)), "palette fit", {}, {}, {})
    np.save(folder / "p.npy", np.random.default_rng(0).uniform(-1, 1, (8, 3)))

    def read(folder):
        load_palette(folder / "p.npy")
        load_palette(folder / "p.json")
        show.run(folder / "p.json", verify=True)

    return (
        read,
        "palette show HERE/p.json -o OUT",
        "palette show HERE/p.npy -o OUT",
        "encode digits --palette HERE/p.json --size 2 --limit 4 -o OUT",
        "show HERE/p.json --verify --json",
    )


def metrics(folder, kept):
    from pixseq.artifacts.metrics import write_metrics
    from pixseq.stages import show

    write_metrics(folder / "x.json", "evaluate", {"a": 1}, {"model": {"path": "m", "id": "i"}}, {"nats": [1.5, 2]})
    return lambda folder: show.run(folder / "x.json", verify=True), "show HERE/x.json", "show HERE/x.json --lineage"


def picture(folder, kept):
    from pixseq.artifacts.picture import save_png
    from pixseq.stages import show

    save_png(folder / "x.png", np.zeros((8, 8, 3), np.uint8), "decode", {}, {})
    return lambda folder: show.run(folder / "x.png", verify=True), "show HERE/x.png --verify"


def config(folder, kept):
    from pixseq.config import FinetuneFile, GridFile, PretrainFile, as_dict, effective, read_preset

    beside(kept)
    (folder / "c.yaml").write_text(yaml.safe_dump({**as_dict(PretrainFile()), **as_dict(FinetuneFile())}))
    (folder / "p.yaml").write_text(yaml.safe_dump(read_preset("igpt-s")))
    text = "data: {train: KEPT/t.zarr, val: KEPT/v.zarr}\nbudgets: [1.0e+9, 1.0e+10]\nprobe: {layers: '0,1'}\n"
    (folder / "g.yaml").write_text(text.replace("KEPT", str(kept)))

    def read(folder):
        effective(PretrainFile, file=folder / "c.yaml")
        effective(FinetuneFile, file=folder / "c.yaml")
        effective(GridFile, file=folder / "g.yaml")
        effective(PretrainFile, file=folder / "p.yaml")

    tiny = "--set model.n_layer=1 --set model.n_head=1 --set model.d_model=4 --steps 1 --batch-size 2"
    return (
        read,
        f"pretrain KEPT/t.zarr --config HERE/c.yaml {tiny} -o OUT",
        "finetune KEPT/m KEPT/t.zarr --config HERE/c.yaml --steps 1 --batch-size 2 -o OUT",
        "scaling plan HERE/g.yaml --no-calibrate -o OUT",
    )


def grid(folder, kept):
    """What a study is planned from, on stores that are there."""
    beside(kept)
    text = f"data: {{train: {kept}/t.zarr, val: {kept}/v.zarr}}\nbudgets: {{from: 1.0e+9, to: 4.0e+9}}\n"
    text += "sizes_per_budget: 2\nrates: {sweep: [0.5, 1.0, 2.0]}\nprobe: {layers: '0,1', c: '1'}\n"
    text += "completions: {count: 4, keep: 0.5, seed: 1}\nbatch: {steps: 9, smallest: 4, largest: 16}\n"
    text += "shapes: {family: igpt, min_layers: 1, aspect_ratio: 24.0}\n"
    text += "train: {lr: 0.01, warmup_fraction: 0.1, warmup_epochs: null}\n"
    (folder / "g.yaml").write_text(text)

    def read(folder):
        from pixseq.studies import plan

        plan.run(folder / "g.yaml", folder / "plan", timed=False)

    return read, "scaling plan HERE/g.yaml --no-calibrate -o OUT"


def partial(folder, kept):
    """What an interrupted encode left, gone on with; and the records of a training run."""
    from pixseq.artifacts import owning
    from pixseq.artifacts.specs import Spec
    from pixseq.artifacts.store_writer import StoreWriter
    from pixseq.artifacts.unfinished import run_folder

    specs, recipe = {"tokens": Spec("uint16", (None, 4)), "labels": Spec("int32", (None,))}, {"a": 1, "b": {"c": 2}}
    rows = {"tokens": np.ones((4, 4), np.uint16), "labels": np.ones(4, np.int32)}

    def begin(folder):
        with owning.resuming(folder / "t", command="encode") as partial:
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
        with owning.resuming(folder / "t", command="encode") as partial:
            StoreWriter(partial, specs, recipe, 4, True).append(rows, {"stop": 8})
            raise PixseqError("as far as this goes")

    return read


def interrupted(folder, kept):
    """A training that its time limit stopped, gone on with by the stage itself."""
    from pixseq.config import PretrainFile, effective
    from pixseq.engine.training import Limits
    from pixseq.stages import pretrain, show

    beside(kept)
    sets = ["train.ema=0.9", "train.val_every=1", "train.optimizer=muon"]
    recipe = effective(PretrainFile, file=kept / "tiny.yaml", sets=sets)
    options = {"val": kept / "v.zarr", "device": "cpu"}
    with contextlib.suppress(Interrupted):
        pretrain.run(kept / "t.zarr", folder / "m", recipe, limits=Limits(time_limit_minutes=0), **options)

    def read(folder):
        pretrain.run(kept / "t.zarr", folder / "m", recipe, resume=True, **options)
        show.run(folder / "m", verify=True)

    return read


KINDS = (
    store, whole_pictures, features, checkpoint, palette, metrics, picture, config, grid, partial, interrupted,
)  # fmt: skip
