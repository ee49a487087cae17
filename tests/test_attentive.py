"""The attentive probe: its module against a written-out twin, its training against AdamW, its stage on small stores."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_pixels
from program import good
from torch import nn

from pixseq import progress
from pixseq.artifacts import manifest, owning
from pixseq.artifacts.arrays import open_store
from pixseq.artifacts.specs import Spec
from pixseq.artifacts.store_writer import StoreWriter
from pixseq.engine import attentive
from pixseq.errors import PixseqError, UsageError
from pixseq.models.attentive import AttentiveProbe, SideBySideAdamW
from pixseq.numerics.labelled import standardize
from pixseq.stages import features, probe

D, H, C = 12, 3, 4


class Twin(nn.Module):
    """The same probe written out: every key and value projected, one attention head after the other."""

    def __init__(self, copies: AttentiveProbe, r: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(D, affine=False, eps=1e-6)
        self.query = nn.Parameter(copies.query[r].detach().clone())
        self.k, self.v = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.linear = nn.Linear(D, C, bias=False)
        for name in ("k", "v", "linear"):
            getattr(self, name).weight.data = getattr(copies, name)[r].detach().clone()

    def forward(self, x):
        x = self.norm(x.reshape(-1, D)).reshape(x.shape)
        keys, values, size = self.k(x), self.v(x), D // H
        pooled = []
        for h in range(H):
            part = slice(h * size, (h + 1) * size)
            scores = torch.stack([keys[:, t, part] @ self.query[part] for t in range(x.shape[1])], dim=1)
            weights = (scores / math.sqrt(size)).softmax(dim=1)
            pooled.append((weights[:, :, None] * values[:, :, part]).sum(dim=1))
        return self.linear(torch.cat(pooled, dim=1))


def copies(n_rates=1, equal=True):
    made = AttentiveProbe(D, H, C, n_rates).init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.query.mul_(50)  # so that attention is far from uniform
        if not equal:
            made.k.mul_(torch.arange(1.0, n_rates + 1)[:, None, None])
    return made


def batch(seed, B=7, T=5):
    rng = torch.Generator().manual_seed(seed)
    scale = torch.rand(D, generator=rng) * 10
    return torch.randn(B, T, D, generator=rng) * scale + 3 * scale, torch.randint(C, (B,), generator=rng)


# ---- the module


def test_copies_equal_the_written_out_module_in_training_and_in_use():
    ours = copies(2, equal=False)
    twins = [Twin(ours, r) for r in range(2)]
    for seed in range(3):
        x, _ = batch(seed)
        expected = torch.stack([twin(x) for twin in twins])
        torch.testing.assert_close(ours(x), expected)
    assert expected[0].sub(expected[1]).abs().max() > 0.01
    for twin in twins:
        torch.testing.assert_close(ours.mean, twin.norm.running_mean)
        torch.testing.assert_close(ours.var, twin.norm.running_var)
    ours.eval()
    x, _ = batch(9)
    torch.testing.assert_close(ours(x), torch.stack([twin.eval()(x) for twin in twins]))
    torch.testing.assert_close(ours(x[:1]), ours(x)[:, :1])  # in use an image does not depend on its neighbours


def test_gradients_and_the_parameter_count_are_those_of_the_written_out_module():
    ours = copies()
    twin, (x, y) = Twin(ours, 0), batch(0)
    F.cross_entropy(ours(x)[0], y).backward()
    F.cross_entropy(twin(x), y).backward()
    for name, gradient in (("query", twin.query.grad), *((n, getattr(twin, n).weight.grad) for n in ("k", "v"))):
        torch.testing.assert_close(getattr(ours, name).grad[0], gradient)
        assert gradient.abs().max() > 1e-4
    assert sum(p.numel() for p in ours.parameters()) == 2 * D**2 + D + D * C


def test_a_fresh_probe_follows_its_law_and_all_copies_start_equal():
    fresh = AttentiveProbe(256, 4, 10, 2).init_weights(torch.Generator().manual_seed(0))
    for tensor in fresh.parameters():
        assert torch.equal(tensor[0], tensor[1])
    assert fresh.query.std().item() == pytest.approx(0.02, rel=0.15)
    assert fresh.k.abs().max() <= 1 / 16 and fresh.v.std().item() == pytest.approx(1 / 16 / math.sqrt(3), rel=0.02)
    with pytest.raises(ValueError, match="5 heads do not divide a width of 12"):
        AttentiveProbe(12, 5, 2)


def test_heads_side_by_side_train_as_each_would_alone_under_adamw():
    rates, decay, steps = [1e-3, 1e-2, 3e-2], 0.5, 8
    ours = copies(3)
    twins = [Twin(ours, r) for r in range(3)]
    optimizer = SideBySideAdamW(ours, rates, decay)
    theirs = [
        torch.optim.AdamW([{"params": matrices(twin)}, {"params": [twin.query], "weight_decay": 0.0}], lr, (0.9, 0.999))
        for twin, lr in zip(twins, rates)
    ]
    for each in theirs:
        each.param_groups[0]["weight_decay"] = decay
    for step in range(steps):
        x, y = batch(step)
        F.cross_entropy(ours(x).flatten(0, 1), y.repeat(3), reduction="sum").div(len(y)).backward()
        optimizer.step(1 - step / steps)
        for twin, each, lr in zip(twins, theirs, rates):
            for group in each.param_groups:
                group["lr"] = lr * (1 - step / steps)
            each.zero_grad()
            F.cross_entropy(twin(x), y).backward()
            each.step()
    start = copies()
    for r, twin in enumerate(twins):
        torch.testing.assert_close(ours.query[r], twin.query, rtol=1e-4, atol=1e-5)
        for name in ("k", "v", "linear"):
            torch.testing.assert_close(getattr(ours, name)[r], getattr(twin, name).weight, rtol=1e-4, atol=1e-5)
            assert (getattr(ours, name)[r] - getattr(start, name)[0]).abs().max() > rates[r]


def matrices(twin):
    return [twin.k.weight, twin.v.weight, twin.linear.weight]


# ---- the stage


LAYERS, T, K, WIDTH = [0, 1, 2, 3], 6, 4, 16
QUICK = {"method": "attentive", "lr": [3e-3, 3e-2], "epochs": 30, "batch_size": 32, "heads": 2, "device": "cpu"}


def marked(n, noises=(9, 3, 0.3, 0.3), seed=0):
    """Every position shows the sign of a class; that of the image's own class is at the one position with a mark.

    float32 [layers, n, T, WIDTH] and labels [n]. The mean over positions tells next to nothing.
    """
    rng = np.random.default_rng(seed)
    signs = 2 * np.eye(K, WIDTH)
    shown = rng.integers(K, size=(n, T))
    where = rng.integers(T, size=n)
    clean = signs[shown]
    clean[np.arange(n), where, WIDTH - 1] = 3
    labels = shown[np.arange(n), where]
    return np.stack([clean + noise * rng.standard_normal(clean.shape) for noise in noises]).astype(np.float32), labels


def write(path, features, labels, chunk=64, **meta):
    specs = {"features": Spec(str(features.dtype), (len(features), None, *features.shape[2:]))}
    specs["labels"] = Spec("int32", (None,))
    inputs = {"model": {"path": "m/tiny", "id": "sha256:model"}}
    pool = "none" if features.ndim == 4 else "mean"
    meta = {"layers": LAYERS[: len(features)], "masks": 1, "class_names": list("abcd"), "pool": pool, **meta}
    with owning.writing(path) as partial:
        writer = StoreWriter(partial, specs, {}, chunk)
        writer.append({"features": features, "labels": np.asarray(labels, np.int32)}, {})
        writer.finish("features", "features", {}, inputs, {}, meta)
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Paths of train and test features: 400 and 300 images, four layers, the last two clear."""
    folder = tmp_path_factory.mktemp("unpooled")
    return write(folder / "train.zarr", *marked(400)), write(folder / "test.zarr", *marked(300, seed=1))


@pytest.fixture(scope="module")
def found(pair):
    return probe.run(*pair, layers="2,3", **QUICK)


def test_it_solves_what_mean_pooling_cannot(pair, found):
    assert found["test_accuracy"] > 0.9 and found["val_accuracy"] > 0.8
    pooled = probe.run(*pair, layers="2,3", c=[1e-2, 1.0])
    assert pooled["test_accuracy"] < 0.6


def test_the_json_holds_what_is_promised(pair, found, tmp_path):
    numbers = probe.run(*pair, out=tmp_path / "p.json", plot=tmp_path / "p.png", layers="2,3", **QUICK)
    assert numbers == found
    (row,) = numbers["layers"]
    assert {"layer", "c", "val_accuracy", "test_accuracy", "converged", "window", "lr", "heads"} <= row.keys()
    assert (numbers["best_layer"], numbers["window"], numbers["heads"]) == (3, [2, 3], 2)
    assert numbers["lr"] in QUICK["lr"] and [tried["lr"] for tried in row["tried"]] == QUICK["lr"]
    assert (numbers["n_train"], numbers["n_test"], numbers["n_classes"]) == (400, 300, 4)
    written = json.loads((tmp_path / "p.json").read_text())
    record = written.pop("pixseq")
    assert written == numbers and manifest.read(tmp_path / "p.png")["kind"] == "picture"
    assert record["config"]["epochs"] == 30 and "device" not in record["config"] and "c" not in record["config"]


def test_seeds_repeat_and_matter(pair):
    short = {**QUICK, "epochs": 3}
    one, again, other = (probe.run(*pair, layers="2,3", seed=seed, **short) for seed in (0, 0, 1))
    assert one == again and one["layers"] != other["layers"]


def test_the_choice_knows_nothing_of_the_test_labels(pair, tmp_path):
    features, labels = marked(300, seed=1)
    other = write(tmp_path / "t.zarr", features, np.random.default_rng(0).permutation(labels))
    honest, blind = (probe.run(pair[0], test, window=2, layers="0,2,3", **QUICK) for test in (pair[1], other))
    for key in ("window", "lr", "val_accuracy", "tried"):
        assert [row[key] for row in honest["layers"]] == [row[key] for row in blind["layers"]]
    assert honest["best_layer"] == blind["best_layer"] and blind["test_accuracy"] < 0.5 < honest["test_accuracy"]


def test_windows_slide_and_the_best_is_chosen_on_held_out_images(pair):
    numbers = probe.run(*pair, window=2, **QUICK)
    assert [row["window"] for row in numbers["layers"]] == [[0, 1], [1, 2], [2, 3]]
    assert [row["layer"] for row in numbers["layers"]] == [1, 2, 3]
    assert numbers["window"] == [2, 3] and numbers["val_accuracy"] == max(r["val_accuracy"] for r in numbers["layers"])
    single = probe.run(*pair, window=1, layers="0,3", **QUICK)
    assert [row["window"] for row in single["layers"]] == [[0], [3]] and single["best_layer"] == 3


def test_which_layers_are_averaged():
    assert attentive.windows(range(9), True, None) == [[3, 4, 5, 6, 7, 8]]
    assert attentive.windows(range(4), True, None) == [[1, 2, 3]] and attentive.windows([0], True, None) == [[0]]
    assert attentive.windows([0, 2, 5], False, None) == [[0, 2, 5]]
    assert attentive.windows([0, 2, 5], False, 9) == [[0, 2, 5]]
    assert attentive.windows([0, 2, 5], True, 2) == [[0, 2], [2, 5]]


def test_features_larger_than_memory_are_streamed_to_the_same_numbers(pair, monkeypatch):
    few = {**QUICK, "epochs": 5}
    for buffer in (attentive.BUFFER_BYTES, 3 * 64 * T * WIDTH * 4):  # all seven chunks, three chunks
        monkeypatch.setattr(attentive, "BUFFER_BYTES", buffer)
        held = probe.run(*pair, layers="2,3", **few)
        with monkeypatch.context() as small:
            small.setattr(attentive, "host_memory_bytes", lambda: 0)
            assert probe.run(*pair, layers="2,3", **few) == held


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("hold", [True, False])
def test_every_row_comes_once_an_epoch_with_the_mean_of_its_layers(tmp_path, monkeypatch, dtype, hold):
    features = marked(150)[0].astype(dtype)
    store = open_store(write(tmp_path / "f.zarr", features, np.zeros(150), chunk=16), "features")
    monkeypatch.setattr(attentive, "BUFFER_BYTES", 4 * 16 * T * WIDTH * features.itemsize)
    data = attentive.Averaged(store, [1, 3], hold)
    assert (data.held is not None) == hold
    rows = np.setdiff1d(np.arange(150), [0, 1, 17, *range(48, 64)])
    mean = features[[1, 3]].astype(np.float32).mean(axis=0)
    for rng in (np.random.default_rng(0), None):
        numbers, values = zip(*data.batches(rows, 10, rng))
        assert max(map(len, numbers)) <= 10 and {v.dtype for v in values} == {np.dtype(dtype)}
        together = np.concatenate(numbers)
        assert sorted(together) == rows.tolist() and (together == rows).all() == (rng is None)
        np.testing.assert_allclose(np.concatenate(values), mean[together], rtol=1e-3, atol=2e-3)
    first = next(data.batches(rows, 10, np.random.default_rng(0)))[0]
    assert len(set(first // 16)) > 1  # chunks are mixed
    assert (next(data.batches(rows, 10, np.random.default_rng(0)))[0] == first).all()


def test_a_ruinous_rate_spoils_no_other(pair, found):
    numbers = probe.run(*pair, layers="2,3", **{**QUICK, "lr": [*QUICK["lr"], 1e30]})
    assert numbers["layers"][0]["tried"][:2] == found["layers"][0]["tried"]
    assert numbers["test_accuracy"] == found["test_accuracy"]


def test_masked_rows_are_one_image_and_votes_are_counted(tmp_path):
    paths = []
    for seed, n in ((0, 200), (1, 100)):
        features, labels = marked(n, noises=(1.0,), seed=seed)
        noise = np.random.default_rng(seed).standard_normal((1, 3 * n, T, WIDTH)).astype(np.float32)
        several = np.repeat(features, 3, axis=1) + 0.5 * noise
        paths.append(write(tmp_path / f"{seed}.zarr", several, np.repeat(labels, 3), masks=3))
    numbers = probe.run(*paths, **QUICK)
    assert (numbers["n_train"], numbers["n_test"]) == (200, 100) and numbers["test_accuracy"] > 0.5


def test_classes_need_not_be_numbered_without_gaps(pair, tmp_path):
    paths = []
    for seed, n in ((0, 400), (1, 300)):
        features, labels = marked(n, seed=seed)
        paths.append(write(tmp_path / f"{seed}.zarr", features[2:], np.array([0, 3, 7, 40])[labels], class_names=None))
    assert probe.run(*paths, layers="0,1", **QUICK)["test_accuracy"] > 0.9


def test_other_methods_read_the_mean_over_positions(pair, tmp_path):
    """The same numbers as from features that were pooled before."""
    pooled = [
        write(tmp_path / f"{seed}.zarr", features.mean(axis=2), labels)
        for seed, (features, labels) in enumerate((marked(400), marked(300, seed=1)))
    ]
    for given in ({"c": [1e-2, 1.0], "concat": 2}, {"method": "knn"}):
        ours, theirs = probe.run(*pair, **given), probe.run(*pooled, **given)
        for key in ("best_layer", "c", "val_accuracy"):
            assert ours[key] == theirs[key]
        assert ours["test_accuracy"] == pytest.approx(theirs["test_accuracy"], abs=0.01)
    train, test = (marked(n, seed=seed)[0].mean(axis=2)[1] for n, seed in ((400, 0), (300, 1)))
    standardize(train, test)
    read = probe.open_pair(*pair).read([1], scaled=True)
    np.testing.assert_allclose(read[0].X, train, atol=1e-5)
    np.testing.assert_allclose(read[1].X, test, atol=1e-5)


def test_baselines_are_probed_the_same_way(pair, tmp_path):
    random = [
        write(tmp_path / f"{seed}.zarr", marked(n, (5, 5), seed)[0], marked(n, seed=seed)[1])
        for seed, n in ((0, 400), (1, 300))
    ]
    numbers = probe.run(*pair, layers="1,2,3", window=2, baselines=[("random", *random)], plot=tmp_path / "p", **QUICK)
    (baseline,) = numbers["baselines"]
    assert (baseline["window"], baseline["best_layer"], len(baseline["layers"])) == ([1], 1, 1)
    assert baseline["test_accuracy"] < numbers["test_accuracy"]


def test_features_that_do_not_fit_are_refused(pair, tmp_path):
    pooled = [
        write(tmp_path / f"{seed}.zarr", features.mean(axis=2), labels)
        for seed, (features, labels) in enumerate((marked(400), marked(300, seed=1)))
    ]
    with pytest.raises(PixseqError, match="holds pooled features") as caught:
        probe.run(*pooled, **QUICK)
    assert "--pool none" in caught.value.hint
    with pytest.raises(PixseqError, match="holds pooled features"):
        probe.run(*pair, baselines=[("raw", *pooled)], **QUICK)
    with pytest.raises(PixseqError, match=r"differ: .*none.*mean"):
        probe.run(pair[0], pooled[1], **QUICK)
    features, labels = marked(300, seed=1)
    fewer = write(tmp_path / "fewer.zarr", features[:, :, :5], labels)
    with pytest.raises(PixseqError, match=r"positions differ: .*6.*5"):
        probe.run(pair[0], fewer, **QUICK)
    for dtype in (np.float32, np.float16):
        spoilt = features.astype(dtype)
        spoilt[2, 70, 3, 5] = np.inf
        path = write(tmp_path / f"{np.dtype(dtype)}.zarr", spoilt, labels)
        with pytest.raises(PixseqError, match="layer 2 holds values that are not finite"):
            probe.run(path, pair[1], layers="2,3", **QUICK)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"heads": 5}, r"--heads 5 does not divide the width .*16"),
        ({"heads": 0}, "--heads is 0"),
        ({"window": 0}, "--window is 0"),
        ({"epochs": 0}, "--epochs is 0"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"weight_decay": -1.0}, "--weight-decay is -1"),
        ({"lr": "1e-3,fast"}, "--lr .* is no list of numbers"),
        ({"lr": [0.0]}, "--lr .* must hold positive numbers"),
        ({"device": "abacus"}, "no device 'abacus'"),
        ({"concat": 3}, "--concat does not go with --method attentive"),
        ({"standardize": True}, "--standardize does not go with"),
        ({"labels_per_class": 4}, "goes with --method logistic"),
        ({"method": "logistic"}, "goes with --method attentive, not with logistic"),
    ],
)
def test_options_that_cannot_be_used_are_usage_errors(pair, given, message):
    with pytest.raises(UsageError, match=message):
        probe.run(*pair, **{**QUICK, **given})


def test_the_heads_are_the_models_own_unless_told_otherwise(aim, pixels, tmp_path):
    """Two of a width of 16, which no rule about the width would give."""
    more = write_pixels(tmp_path / "more.zarr", count=60, seed=1)
    paths = [tmp_path / "a.zarr", tmp_path / "b.zarr"]
    for store, path in zip((pixels, more), paths):
        features.run(aim["prefix"], store, path, pool="none", device="cpu")
    quick = {"method": "attentive", "lr": [3e-3], "epochs": 1, "layers": "2", "device": "cpu"}
    assert probe.run(*paths, **quick)["heads"] == 2
    assert probe.run(*paths, heads=4, **quick)["heads"] == 4


def test_features_that_do_not_tell_the_heads_get_one_for_64_features_and_it_is_said(pair, capsys):
    assert [attentive.usual_heads(width) for width in (48, 192, 200, 1536)] == [1, 3, 2, 24]
    progress.enable()
    try:
        numbers = probe.run(*pair, layers="3", **{**QUICK, "heads": None, "epochs": 1})
    finally:
        progress.enable(False)
    assert numbers["heads"] == 1
    assert "does not tell how many attention heads its model has: the probe gets 1" in capsys.readouterr().err


def test_the_heads_are_told_beside_the_content(checkpoints, tokens, tmp_path):
    """The id is of the numbers, so that features made before still equal those made now."""
    record = features.run(checkpoints["ar"], tokens, tmp_path / "f.zarr", device="cpu")
    store = open_store(tmp_path / "f.zarr", "features")
    assert record["summary"]["n_head"] == 2 and "n_head" not in store.meta
    assert "n_head" not in features.run("pixels", tokens, tmp_path / "p.zarr", device="cpu")["summary"]


def test_what_is_left_open_depends_on_the_features():
    recipe = attentive.AttentiveRecipe(0.1, 0, [1e-3])
    assert recipe.n_epochs(50_000) == 10 and recipe.n_epochs(1_437) == math.ceil(300 / 6)


def test_the_command_prints_a_table_or_one_json_line(pair):
    line = ["probe", pair[0], "--test", pair[1], "--method", "attentive", "--window", 2, "--lr", "0.003,0.03"]
    line += ["--epochs", 4, "--batch-size", 32, "--heads", 2, "--weight-decay", 0.1, "--device", "cpu", "--quiet"]
    table = good(*line).splitlines()
    assert table[0].split() == ["layer", "window", "lr", "val_accuracy", "test_accuracy"]
    assert table[1].startswith("    1  [0, 1] ") and any(row.startswith("best layer") for row in table)
    assert json.loads(good(*line, "--json"))["method"] == "attentive"
