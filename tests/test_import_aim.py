"""AIM's published files: the features of an independent forward, the probe's answers, and refusals by name."""

import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_pixels
from safetensors.torch import save_file

from pixseq.artifacts.arrays import open_store
from pixseq.artifacts.checkpoint import open_checkpoint
from pixseq.errors import PixseqError, UsageError
from pixseq.models.aim import MEAN, STD, AimShape
from pixseq.runtime import machine
from pixseq.stages import check, evaluate, features, importing
from pixseq.stages.opening import open_model

WIDTH, BLOCKS, PATCH, HEADS, SIDE, CLASSES = 48, 3, 2, 4, 8, 5


def backbone(width=WIDTH, blocks=BLOCKS, patch=PATCH, seed=0):
    """Random tensors by the published names."""
    g = torch.Generator().manual_seed(seed)

    def matrix(*shape):
        return torch.randn(shape, generator=g) * math.prod(shape[1:]) ** -0.5

    def norm(name):
        return {
            f"{name}.weight": 1 + 0.1 * torch.randn(width, generator=g),
            f"{name}.bias": 0.1 * torch.randn(width, generator=g),
        }

    w = {"preprocessor.patchifier.proj.weight": matrix(width, 3, patch, patch)}
    w["preprocessor.patchifier.proj.bias"] = 0.1 * torch.randn(width, generator=g)
    w |= norm("preprocessor.patchifier.norm")
    for i in range(blocks):
        name = f"trunk.blocks.{i}"
        w |= norm(f"{name}.norm_1") | norm(f"{name}.norm_2")
        w[f"{name}.attn.qkv.weight"], w[f"{name}.attn.proj.weight"] = matrix(3 * width, width), matrix(width, width)
        w[f"{name}.mlp.fc1.weight"], w[f"{name}.mlp.fc2.weight"] = matrix(4 * width, width), matrix(width, 4 * width)
    return w | norm("trunk.post_trunk_norm")


def probe_head(width=WIDTH, classes=CLASSES):
    g = torch.Generator().manual_seed(9)
    return {
        "cls_token": torch.randn(1, 1, width, generator=g),
        "k.weight": torch.randn(width, width, generator=g) * width**-0.5,
        "v.weight": torch.randn(width, width, generator=g) * width**-0.5,
        "linear.weight": torch.randn(classes, width, generator=g),
        "bn.running_mean": torch.randn(width, generator=g),
        "bn.running_var": torch.rand(width, generator=g) + 0.5,
        "bn.num_batches_tracked": torch.tensor(7),
    }


def by_definition(w, images, head=None, blocks=(0, 1, 2)):
    """Streams after every block [B, K, D], and the class logits, from the published names alone."""
    x = (images.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    h = F.conv2d(x.permute(0, 3, 1, 2), w["preprocessor.patchifier.proj.weight"], None, PATCH)
    h = h.flatten(2).mT + w["preprocessor.patchifier.proj.bias"]

    def norm(h, name):
        return F.layer_norm(h, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    rows = SIDE // PATCH
    omega = 10000 ** -(torch.arange(WIDTH // 4) / (WIDTH / 4))
    column, row = torch.meshgrid(torch.arange(rows), torch.arange(rows), indexing="xy")
    angles = [axis.reshape(-1, 1) * omega for axis in (column, row)]
    h = norm(h, "preprocessor.patchifier.norm") + torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1)
    streams = [h]
    for i in range(BLOCKS):
        name = f"trunk.blocks.{i}"
        q, k, v = (norm(h, f"{name}.norm_1") @ w[f"{name}.attn.qkv.weight"].T).chunk(3, -1)
        split = [t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v)]
        scores = (split[0] @ split[1].mT / math.sqrt(WIDTH / HEADS)).softmax(-1)
        h = h + (scores @ split[2]).transpose(1, 2).flatten(2) @ w[f"{name}.attn.proj.weight"].T
        h = h + F.gelu(norm(h, f"{name}.norm_2") @ w[f"{name}.mlp.fc1.weight"].T) @ w[f"{name}.mlp.fc2.weight"].T
        streams.append(h)
    if head is None:
        return streams, None
    x = torch.stack([streams[b + 1] for b in blocks]).mean(0)
    x = (x - head["bn.running_mean"]) / (head["bn.running_var"] + 1e-6).sqrt()
    k, v = (x @ head[f"{n}.weight"].T for n in "kv")
    q = head["cls_token"].expand(len(x), 1, -1)
    split = [t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v)]
    pooled = (split[0] @ split[1].mT / math.sqrt(WIDTH / HEADS)).softmax(-1) @ split[2]
    return streams, pooled.transpose(1, 2).flatten(2)[:, 0] @ head["linear.weight"].T


@pytest.fixture
def files(tmp_path):
    torch.save(backbone(), tmp_path / "b.pth")
    save_file(probe_head(), tmp_path / "h.safetensors")
    return tmp_path


@torch.no_grad()
def test_features_and_answers_equal_an_independent_forward(files):
    importing.run_aim(files / "b.pth", files / "m", files / "h.safetensors", "1,2", HEADS, SIDE)
    data = write_pixels(files / "x.zarr", class_names=None)
    images = torch.from_numpy(open_store(data, "pixels").read("pixels"))
    streams, logits = by_definition(backbone(), images, probe_head(), (1, 2))
    features.run(files / "m", data, files / "f.zarr", device="cpu")
    found = open_store(files / "f.zarr", "features").read("features")
    for mine, stream in zip(found, streams, strict=True):
        assert np.abs(mine - stream.mean(1).numpy()).max() < 1e-5 * stream.abs().max()
    with machine("cpu", "fp32") as where:
        net, _ = open_model(files / "m", where)
    assert (net(images).class_logits - logits).abs().max() < 1e-4
    hits = logits.argmax(1).numpy() == open_store(data, "pixels").labels()
    numbers = evaluate.run(files / "m", data, device="cpu")
    assert numbers["accuracy"] == hits.mean() and "normalized_mse" not in numbers
    assert check.run(files / "m", data, device="cpu")["ok"]


def test_a_backbone_alone_gives_features_and_says_so(files):
    save_file(backbone(), files / "b.safetensors")
    record = importing.run_aim(files / "b.safetensors", files / "m", n_heads=HEADS, size=SIDE)
    assert (
        "no prediction head" in record["summary"]["notes"][0] and open_checkpoint(files / "m").codec["height"] == SIDE
    )
    with pytest.raises(PixseqError, match="no prediction head"):
        evaluate.run(files / "m", write_pixels(files / "x.zarr"), device="cpu")


def test_the_names_of_a_published_size_are_those_of_its_trunk():
    shape = AimShape(24, 12, 1536, 14, 224, 224)
    with torch.device("meta"):
        count = 3 * 14 * 14 * 1536 + 3 * 1536 + 24 * (12 * 1536**2 + 4 * 1536) + 2 * 1536
    assert shape.trunk_count() == count


class Code:
    def __reduce__(self):
        return (exec, ("open('ran', 'w')",))


def edited(**changes):
    return {name: x for name, x in {**backbone(), **changes}.items() if x is not None}


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        (edited(**{"trunk.blocks.1.attn.qkv.weight": None}), "lacks trunk.blocks.1.attn.qkv.weight"),
        (edited(**{"trunk.blocks.1.attn.qkv.bias": torch.ones(144)}), "qkv.bias .* is not zero"),
        (edited(**{"trunk.blocks.0.gamma": torch.ones(48)}), "AIM has not: trunk.blocks.0.gamma"),
        (edited(**{"trunk.blocks.0.mlp.fc1.weight": torch.ones(48, 48)}), "mlp.fc1.weight"),
        (edited(**{"trunk.post_trunk_norm.bias": torch.full((48,), torch.nan)}), "post_trunk_norm.bias"),
        (edited(**{"trunk.blocks.0.mlp.fc3.weight": torch.ones(4, 4)}), "is AIMv2"),
        ({"transformer.wte.weight": torch.ones(3, 3)}, "is no AIM backbone"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, tensors, named):
    torch.save(tensors, tmp_path / "b.pth")
    with pytest.raises(PixseqError, match=named):
        importing.run_aim(tmp_path / "b.pth", tmp_path / "m", n_heads=HEADS, size=SIDE)
    assert [p.name for p in tmp_path.iterdir()] == ["b.pth"]


def test_options_and_files_that_do_not_fit(files, monkeypatch):
    def refused(kind, named, *args, **options):
        with pytest.raises(kind, match=named):
            importing.run_aim(*args, **options)

    b, m = files / "b.pth", files / "m"
    refused(UsageError, "no multiple of 128", b, m, size=SIDE)
    refused(UsageError, "--heads 5 does not divide", b, m, n_heads=5, size=SIDE)
    refused(UsageError, "--size 7", b, m, n_heads=HEADS, size=7)
    refused(UsageError, "there is no head to read them", b, m, probe_layers="last", n_heads=HEADS, size=SIDE)
    head = {"head": files / "h.safetensors", "n_heads": HEADS, "size": SIDE}
    refused(UsageError, "best is known of the published models", b, m, probe_layers="best", **head)
    refused(UsageError, "outside 0..2", b, m, probe_layers="2,3", **head)
    save_file(probe_head(width=32), files / "narrow.safetensors")
    refused(PixseqError, "width 32", b, m, **{**head, "head": files / "narrow.safetensors"})
    (files / "cut.pth").write_bytes(b.read_bytes()[:9000])
    refused(PixseqError, "damaged|cut short", files / "cut.pth", m, n_heads=HEADS, size=SIDE)
    monkeypatch.chdir(files)
    (files / "evil.pth").write_bytes(pickle.dumps({"trunk.x": Code()}))
    refused(PixseqError, "could run code|damaged", files / "evil.pth", m, n_heads=HEADS, size=SIDE)
    assert not (files / "ran").exists() and not m.exists()
