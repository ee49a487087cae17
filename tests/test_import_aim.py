"""AIM's published files: the features of an independent forward, the probe's answers, and refusals by name."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_pixels
from program import called
from safetensors.torch import load_file, save_file

from pixseq.artifacts.arrays import open_store
from pixseq.artifacts.checkpoint import open_checkpoint
from pixseq.config import FinetuneFile, effective
from pixseq.engine.opening import open_model
from pixseq.engine.training import Limits
from pixseq.errors import PixseqError, UsageError
from pixseq.interop.aim import probed_blocks, rules
from pixseq.models.aim import MEAN, STD, AimShape
from pixseq.runtime import machine
from pixseq.stages import check, evaluate, features, finetune, importing

WIDTH, BLOCKS, PATCH, HEADS, SIDE, CLASSES = 48, 3, 2, 4, 8, 5
ROWS = SIDE // PATCH
SMALL = {"n_heads": HEADS, "size": SIDE}


def backbone(width=WIDTH, blocks=BLOCKS, patch=PATCH, make=torch.randn):
    """Random tensors by the published names; `make` gives one of a shape. Patches come out small: their norm shows its
    epsilon.
    """
    torch.manual_seed(0)

    def matrix(*shape):
        return make(shape) * (2 * math.prod(shape[1:]) ** -0.5)

    def norm(name):
        return {f"{name}.weight": 1 + 0.1 * make(width), f"{name}.bias": 0.1 * make(width)}

    w = {"preprocessor.patchifier.proj.weight": 0.01 * matrix(width, 3, patch, patch)}
    w |= {"preprocessor.patchifier.proj.bias": 0.01 * make(width)} | norm("preprocessor.patchifier.norm")
    for i in range(blocks):
        name = f"trunk.blocks.{i}"
        w |= norm(f"{name}.norm_1") | norm(f"{name}.norm_2")
        w[f"{name}.attn.qkv.weight"], w[f"{name}.attn.proj.weight"] = matrix(3 * width, width), matrix(width, width)
        w[f"{name}.mlp.fc1.weight"], w[f"{name}.mlp.fc2.weight"] = matrix(4 * width, width), matrix(width, 4 * width)
    return w | norm("trunk.post_trunk_norm")


def probe_head(width=WIDTH, classes=CLASSES):
    torch.manual_seed(9)
    return {
        "cls_token": torch.randn(1, 1, width),
        "k.weight": torch.randn(width, width) * width**-0.5,
        "v.weight": torch.randn(width, width) * width**-0.5,
        "linear.weight": torch.randn(classes, width),
        "bn.running_mean": torch.randn(width),
        "bn.running_var": torch.rand(width) + 0.05,
        "bn.num_batches_tracked": torch.tensor(7),
    }


def prefixed(head):
    return {f"head.{name}": x for name, x in head.items()}


def positions():
    """[1, K, D] as published: half of the channels for the column, half for the row, each sines then cosines."""
    omega = 10000 ** -(torch.arange(WIDTH // 4, dtype=torch.float64) / (WIDTH / 4))
    column, row = torch.meshgrid(torch.arange(ROWS), torch.arange(ROWS), indexing="xy")
    angles = [axis.reshape(-1, 1) * omega for axis in (column, row)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1)[None]


def by_definition(w, images, head=None, blocks=()):
    """In float64 from the published names alone: L + 1 streams [B, K, D], and the class logits [B, C]."""
    w = {name: x.double() for name, x in w.items()}
    x = (images.double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    kernel, bias = (w[f"preprocessor.patchifier.proj.{part}"] for part in ("weight", "bias"))
    h = F.conv2d(x.permute(0, 3, 1, 2), kernel, bias, stride=PATCH).flatten(2).mT

    def norm(h, name):
        return F.layer_norm(h, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def attend(q, k, v):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        return ((q @ k.mT / math.sqrt(WIDTH / HEADS)).softmax(-1) @ v).transpose(1, 2).flatten(2)

    h = norm(h, "preprocessor.patchifier.norm") + positions()
    streams = [h]
    for i in range(BLOCKS):
        name = f"trunk.blocks.{i}"
        qkv = norm(h, f"{name}.norm_1") @ w[f"{name}.attn.qkv.weight"].T
        h = h + attend(*qkv.chunk(3, -1)) @ w[f"{name}.attn.proj.weight"].T
        h = h + F.gelu(norm(h, f"{name}.norm_2") @ w[f"{name}.mlp.fc1.weight"].T) @ w[f"{name}.mlp.fc2.weight"].T
        streams.append(h)
    if head is None:
        return streams, None
    head = {name: x.double() for name, x in head.items()}
    x = torch.stack([streams[block + 1] for block in blocks]).mean(0)
    x = (x - head["bn.running_mean"]) / (head["bn.running_var"] + 1e-6).sqrt()
    pooled = attend(head["cls_token"].expand(len(x), 1, -1), *(x @ head[f"{n}.weight"].T for n in "kv"))
    return streams, pooled[:, 0] @ head["linear.weight"].T


def written(path, tensors):
    (save_file if path.suffix == ".safetensors" else lambda x, p: torch.save(x, p))(tensors, path)
    return path


@pytest.fixture
def files(tmp_path):
    """A folder with a backbone, a head and pixels."""
    written(tmp_path / "b.pth", backbone())
    written(tmp_path / "h.safetensors", probe_head())
    write_pixels(tmp_path / "x.zarr", class_names=None)
    return tmp_path


def images_of(folder):
    return torch.from_numpy(open_store(folder / "x.zarr", "pixels").read("pixels"))


def ours(path):
    with machine("cpu", "fp32") as where:
        return open_model(path, where)[0]


# --- parity


@torch.no_grad()
@pytest.mark.parametrize("layers, blocks", [("last", (0, 1, 2)), ("0,2", (0, 2)), ("1", (1,))])
def test_features_and_answers_equal_an_independent_forward(files, layers, blocks):
    importing.run_aim(files / "b.pth", files / "m", files / "h.safetensors", layers, **SMALL)
    streams, logits = by_definition(backbone(), images_of(files), probe_head(), blocks)
    net = ours(files / "m")
    out = net(images_of(files), logits=False, unpooled=True)
    for mine, stream in zip(out.features, streams, strict=True):
        assert (mine - stream).abs().max() < 1e-5 * stream.abs().max()
    assert (out.class_logits - logits).abs().max() < 1e-5 * logits.abs().max()
    labels = logits.argmax(1).numpy()
    assert len(set(labels)) > 1  # so that an accuracy says something
    numbers = evaluate.run(files / "m", files / "x.zarr", device="cpu")
    assert numbers["accuracy"] == (labels == open_store(files / "x.zarr", "pixels").labels()).mean()
    assert "normalized_mse" not in numbers
    features.run(files / "m", files / "x.zarr", files / "f.zarr", device="cpu")
    for mine, stream in zip(open_store(files / "f.zarr", "features").read("features"), streams, strict=True):
        assert np.abs(mine - stream.mean(1).numpy()).max() < 1e-5 * stream.abs().max()
    assert check.run(files / "m", files / "x.zarr", device="cpu")["ok"]


def test_every_form_of_the_files_gives_the_same_checkpoint(files):
    def id_of(path, name, head=None):
        return importing.run_aim(path, files / name, head, **SMALL)["id"]

    both = backbone() | prefixed(probe_head())
    one = id_of(files / "b.pth", "m1", files / "h.safetensors")
    assert id_of(written(files / "b.safetensors", backbone()), "m2", written(files / "h.pth", probe_head())) == one
    assert id_of(files / "b.pth", "m3", written(files / "p.pth", prefixed(probe_head()))) == one
    assert id_of(written(files / "both.pth", both), "m4") == one
    spare = {"head.linear.bias": torch.zeros(CLASSES), "preprocessor.pos_embed": positions().float()}
    assert id_of(written(files / "spare.safetensors", both | spare), "m5") == one
    (files / "other").mkdir()
    assert id_of(files / "b.pth", "m6", written(files / "other" / "b.pth", probe_head())) == one
    assert len(open_checkpoint(files / "m6").manifest["inputs"]) == 2  # two files of one name

    half = {name: x.half() for name, x in backbone().items()} | {"preprocessor.pos_embed": positions().half()[0]}
    notes = importing.run_aim(written(files / "half.pth", half), files / "m7", **SMALL)["summary"]["notes"]
    assert any("float16" in note for note in notes) and any("pos_embed" in note for note in notes)
    found = open_checkpoint(files / "m7").weights()["blocks.1.mlp.fc.weight"]
    assert torch.equal(found, half["trunk.blocks.1.mlp.fc1.weight"].float())


def test_a_published_size_has_the_names_and_the_count_of_its_trunk():
    for width, blocks in ((1536, 24), (2048, 24), (3072, 24), (4096, 32)):
        published = backbone(width, blocks, 14, make=lambda size: torch.empty(size, device="meta"))
        shape = AimShape(blocks, width // 128, width, 14, 224, 224, head=False)
        wanted = rules({"d_model": width, "n_layer": blocks, "patch_size": 14})
        assert {name: rule.shape for rule in wanted.values() for name in rule.theirs} == {
            n: tuple(x.shape) for n, x in published.items()
        }
        assert sum(x.numel() for x in published.values()) == shape.trunk_count() == shape.parameter_count()
        best = 14 if width in (1536, 4096) else 12
        assert probed_blocks("best", blocks, width) == list(range(best, best + 6))
        assert probed_blocks("last", blocks, width) == list(range(blocks - 6, blocks))


# --- through the stages


def test_a_backbone_alone_gives_features_and_a_classifier_but_no_loss(files):
    record = importing.run_aim(files / "b.pth", files / "m", **SMALL)
    assert "no prediction head" in record["summary"]["notes"][0]
    with pytest.raises(PixseqError, match="no prediction head"):
        evaluate.run(files / "m", files / "x.zarr", device="cpu")
    config = effective(FinetuneFile, sets=["finetune.steps=60", "finetune.batch_size=16", "finetune.lr=0.003"])
    finetune.run(files / "m", files / "x.zarr", files / "tuned", config, device="cpu")
    assert evaluate.run(files / "tuned", files / "x.zarr", device="cpu")["accuracy"] > 0.9
    assert "gen_loss" not in (files / "tuned" / "log.jsonl").read_text()


def test_a_model_with_a_probe_is_fine_tuned_with_a_fresh_one(files):
    importing.run_aim(files / "b.pth", files / "m", files / "h.safetensors", **SMALL)
    config = effective(FinetuneFile, sets=["finetune.steps=60", "finetune.batch_size=16", "finetune.lr=0.003"])
    record = finetune.run(files / "m", files / "x.zarr", files / "tuned", config, device="cpu")
    assert record["summary"]["shape"]["n_classes"] == 4
    assert evaluate.run(files / "tuned", files / "x.zarr", device="cpu")["accuracy"] > 0.9


def test_a_loss_that_cannot_be_is_not_laid_to_the_labels(files):
    importing.run_aim(files / "b.pth", files / "m", files / "h.safetensors", **SMALL)
    with pytest.raises(UsageError, match=r"no loss to measure$"):
        evaluate.run(files / "m", files / "x.zarr", device="cpu", by_position=files / "p.json")


def test_an_attentive_head_trains_alike_in_any_micro_batches(files):
    """It normalises by the statistics of the parent's head, whatever the machine puts into a micro-batch."""
    importing.run_aim(files / "b.pth", files / "m", files / "h.safetensors", **SMALL)
    sets = ["finetune.steps=3", "finetune.batch_size=8", "finetune.lr=0.01", "finetune.val_every=1"]
    made = {}
    for micro, seed in ((8, 0), (3, 0), (8, 1)):
        config = effective(FinetuneFile, sets=[*sets, f"finetune.seed={seed}"])
        out, limits = files / f"{micro}-{seed}", Limits(micro_batch=micro)
        options = {"val_fraction": 0.2, "device": "cpu", "limits": limits}
        finetune.run(files / "m", files / "x.zarr", out, config, **options)
        made[micro, seed] = open_checkpoint(out).weights("last")
    for name, x in made[8, 0].items():
        torch.testing.assert_close(x, made[3, 0][name], atol=1e-4, rtol=1e-3)
    head = open_checkpoint(files / "m").weights()
    for name in ("classifier.mean", "classifier.var"):
        assert torch.equal(made[8, 0][name], head[name])
    assert not torch.allclose(made[8, 0]["classifier.k"], made[8, 1]["classifier.k"], atol=0.01)


def test_from_import_to_accuracy_on_the_command_line(files, monkeypatch):
    monkeypatch.chdir(files)

    def pixseq(line, code=0):
        ended = called(*line.split())
        assert ended.code == code, ended.err
        return ended.out, ended.err

    out, err = pixseq(f"import aim b.pth --head h.safetensors --probe-layers 1,2 --heads {HEADS} --size {SIDE} -o m")
    assert out == "m\n" and "no prediction head" in err and "mean of blocks 1, 2 of 0 to 2" in err
    shown = json.loads(pixseq("show m --verify --json")[0])
    assert shown["stage"] == "import aim" and set(shown["inputs"]) == {"b.pth", "h.safetensors"}
    assert json.loads(pixseq("evaluate m x.zarr --device cpu --json")[0])["images"] == 96
    assert json.loads(pixseq("check m x.zarr --device cpu --json")[0])["ok"]
    write_pixels("y.zarr", seed=1, class_names=None)
    for name in "xy":
        pixseq(f"features m {name}.zarr --device cpu -o {name}.features.zarr --quiet")
    assert "best layer" in pixseq("probe x.features.zarr --test y.features.zarr --c 1")[0]
    recipe = "--config m/config.yaml --val-fraction 0.1 --device cpu --dry-run --json"
    planned = json.loads(pixseq(f"pretrain x.zarr {recipe}")[0])["model"]
    assert planned["d_model"] == WIDTH and planned["head_width"] == 2048 and planned["attention"] == "prefix"
    _, err = pixseq("import aim b.pth --size 8 -o n", code=2)
    assert "no multiple of 128" in err and "hint: " in err and "--heads" in err
    assert "already exists" in pixseq(f"import aim b.pth --heads {HEADS} --size {SIDE} -o m", code=1)[1]


# --- refusals


def of_the_second_version():
    return {name: x for name, x in backbone().items() if "norm" not in name or not name.endswith("bias")}


@pytest.mark.parametrize(
    "changes, named",
    {
        "missing": ({"trunk.blocks.1.attn.qkv.weight": None}, "lacks trunk.blocks.1.attn.qkv.weight"),
        "gap": ({f"trunk.blocks.5.{n}": torch.ones(48) for n in ("norm_1.weight",)}, "lacks trunk.blocks.3.norm_1"),
        "no patches": ({"preprocessor.patchifier.proj.weight": None}, "no AIM backbone"),
        "no bias": ({"preprocessor.patchifier.proj.bias": None}, "lacks preprocessor.patchifier.proj.bias"),
        "bias": ({"trunk.blocks.1.attn.qkv.bias": torch.ones(144)}, "blocks.1.attn.qkv.bias in .* is not zero"),
        "unknown": ({"trunk.blocks.0.gamma": torch.ones(48)}, "AIM has not: trunk.blocks.0.gamma"),
        "shape": ({"trunk.blocks.0.mlp.fc1.weight": torch.ones(96, 48)}, r"fc1.weight .* \[96, 48\], and \[192, 48\]"),
        "oblong": ({"preprocessor.patchifier.proj.weight": torch.ones(48, 3, 2, 4)}, r"\[48, 3, 2, 4\], not \[width"),
        "gray": ({"preprocessor.patchifier.proj.weight": torch.ones(48, 1, 2, 2)}, r"\[48, 1, 2, 2\], not \[width"),
        "nan": ({"trunk.post_trunk_norm.bias": torch.full((48,), torch.nan)}, "post_trunk_norm.bias .* non-finite"),
        "integers": ({"trunk.post_trunk_norm.bias": torch.ones(48).to(torch.int8)}, "holds int8, not weights"),
        "gates": ({"trunk.blocks.0.mlp.fc3.weight": torch.ones(192, 48)}, "is AIMv2, .*fc3.*SwiGLU"),
        "learned places": ({"preprocessor.pos_embed": torch.ones(1, 16, 48)}, "pos_embed .* sine and cosine"),
        "places of another size": ({"preprocessor.pos_embed": torch.ones(1, 64, 48)}, "pictures of 8x8 have 16"),
    }.values(),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_backbone_that_does_not_fit_is_refused_by_name(tmp_path, changes, named):
    tensors = {name: x for name, x in (backbone() | changes).items() if x is not None}
    with pytest.raises(PixseqError, match=named):
        importing.run_aim(written(tmp_path / "b.pth", tensors), tmp_path / "m", **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["b.pth"]


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"v.weight": None}, "lacks v.weight"),
        ({"linear.weight": None}, "lacks linear.weight"),
        ({"linear.bias": torch.ones(CLASSES)}, "linear.bias in .* is not zero"),
        ({"q.weight": torch.ones(48, 48)}, "AIM has not: q.weight"),
        ({"cls_token": torch.ones(1, 2, 48)}, r"cls_token .* \[1, 2, 48\]"),
        ({"linear.weight": torch.ones(0, 48)}, "no classes"),
        ({"bn.running_mean": torch.full((48,), torch.inf)}, "running_mean .* non-finite"),
        ({"bn.running_var": torch.full((48,), -1.0)}, "running_var .* negative"),
        (probe_head(width=32), "head of width 32, the backbone's is 48"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_head_that_does_not_fit_is_refused_by_name(files, changes, named):
    tensors = {name: x for name, x in (probe_head() | changes).items() if x is not None}
    with pytest.raises(PixseqError, match=named):
        importing.run_aim(files / "b.pth", files / "m", written(files / "h.pth", tensors), **SMALL)
    assert not list(files.glob("m*"))


def test_options_and_files_that_do_not_fit(files):
    def refused(kind, named, path=files / "b.pth", **options):
        with pytest.raises(kind, match=named):
            importing.run_aim(path, files / "m", **{**SMALL, **options})

    head = files / "h.safetensors"
    refused(UsageError, "no multiple of 128", n_heads=None)
    refused(UsageError, "--heads 5 does not divide", n_heads=5)
    refused(UsageError, "--heads 0 does not divide", n_heads=0)
    refused(UsageError, "--size 7", size=7)
    refused(UsageError, "--size 2 ", size=2)
    refused(UsageError, "there is no head to read them", probe_layers="last")
    refused(UsageError, "best is known of the published models", head=head, probe_layers="best")
    for text in ("2,3", "-1", "1,1"):
        refused(UsageError, "twice or outside 0..2", head=head, probe_layers=text)
    refused(UsageError, "--probe-layers is 'middle'", head=head, probe_layers="middle")
    both = written(files / "both.pth", backbone() | prefixed(probe_head()))
    refused(UsageError, "holds a head already", both, head=head)
    refused(PixseqError, "is no AIM backbone", head)
    refused(PixseqError, "is AIMv2, .*RMSNorm", written(files / "2.pth", of_the_second_version()))
    refused(PixseqError, "lacks cls_token", head=files / "b.pth")
    refused(PixseqError, "is not there", files / "nowhere.pth")
    refused(PixseqError, "is no file", files)
    for whole in (files / "b.pth", head, written(files / "b.safetensors", backbone())):
        cut = files / f"cut{whole.suffix}"
        cut.write_bytes(whole.read_bytes()[:9000])
        refused(PixseqError, "damaged or cut short", cut)
    assert len(load_file(head)) == 7 and not (files / "m").exists()


class Code:
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return (exec, (f"open({str(self.flag)!r}, 'w')",))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_in_it_does_not_run(files, zipped):
    tensors = {"trunk.x": Code(files / "ran")}
    torch.save(tensors, files / "evil.pth", _use_new_zipfile_serialization=zipped)
    for paths in ((files / "evil.pth", None), (files / "b.pth", files / "evil.pth")):
        with pytest.raises(PixseqError, match="could run code"):
            importing.run_aim(paths[0], files / "m", paths[1], **SMALL)
    assert not (files / "ran").exists()
