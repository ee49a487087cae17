"""`probe` on features artifacts: the JSON others rely on, the best layer chosen blind, misuse refused."""

import json

import numpy as np
import pytest
from program import called, good
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from pixseq.artifacts import manifest, owning
from pixseq.artifacts.arrays import open_store
from pixseq.artifacts.specs import Spec
from pixseq.artifacts.store_writer import StoreWriter
from pixseq.engine import probing
from pixseq.engine.feature_pair import Side
from pixseq.errors import PixseqError, UsageError
from pixseq.numerics.labelled import low_data_subsets, standardize
from pixseq.stages import probe

LAYERS = [0, 1, 2]
DIGITS, CLASSES = load_digits(return_X_y=True)


def layered(rows, noises=(40, 4, 12), M=1, seed=0):
    """Digits under little noise in the middle layer and much at the ends: float32 [3, n * M, 64]."""
    rng = np.random.default_rng(seed)
    X = np.repeat(DIGITS[rows], M, axis=0)
    return np.stack([X + noise * rng.standard_normal(X.shape) for noise in noises]).astype(np.float32)


def write(path, features, labels, inputs=None, config=None, **meta):
    specs = {"features": Spec(str(features.dtype), (len(features), None, features.shape[2]))}
    arrays = {"features": features}
    if labels is not None:
        specs["labels"], arrays["labels"] = Spec("int32", (None,)), np.asarray(labels, np.int32)
    inputs = {"model": {"path": "m/tiny", "id": "sha256:model"}, **(inputs or {})}
    meta = {"layers": LAYERS[: len(features)], "masks": 1, "class_names": list("0123456789"), "pool": "mean", **meta}
    with owning.writing(path) as partial:
        writer = StoreWriter(partial, specs, {}, 256)
        writer.append(arrays, {})
        writer.finish("features", "features", config or {}, inputs, {}, meta)
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Paths of train and test features: 600 and 500 digits, three layers."""
    folder = tmp_path_factory.mktemp("features")
    train, test = slice(0, 600), slice(600, 1100)
    return (
        write(folder / "train.zarr", layered(train), CLASSES[train]),
        write(folder / "test.zarr", layered(test, seed=1), CLASSES[test]),
    )


QUICK = {"c": [1e-3, 1e-2]}


def test_the_numbers_are_scikit_learns_and_the_json_holds_what_is_promised(pair, tmp_path):
    numbers = probe.run(*pair, out=tmp_path / "p.json", plot=tmp_path / "p.png", concat=2, **QUICK)
    assert [row["layer"] for row in numbers["layers"]] == LAYERS
    for row in numbers["layers"]:
        assert {"layer", "c", "val_accuracy", "test_accuracy", "converged"} <= row.keys()
    train, test = layered(slice(0, 600))[1], layered(slice(600, 1100), seed=1)[1]
    standardize(train, test)
    direct = LogisticRegression(C=numbers["layers"][1]["c"], max_iter=1000).fit(train, CLASSES[:600])
    expected = direct.score(test, CLASSES[600:1100])
    assert numbers["best_layer"] == 1 and numbers["test_accuracy"] == pytest.approx(expected, abs=0.003)
    assert numbers["test_accuracy"] == numbers["layers"][1]["test_accuracy"] > numbers["layers"][0]["test_accuracy"]
    assert (numbers["n_train"], numbers["n_test"], numbers["n_classes"]) == (600, 500, 10)
    most = np.bincount(CLASSES[:600]).argmax()
    assert numbers["majority"] == pytest.approx((CLASSES[600:1100] == most).mean())
    assert numbers["concat"]["layers"] == [0, 1]

    written = json.loads((tmp_path / "p.json").read_text())
    record = written.pop("pixseq")
    assert written == numbers == json.loads(json.dumps(numbers))
    assert record["kind"] == "metrics" and record["inputs"]["test"]["id"] == manifest.read(pair[1])["id"]
    assert record["config"]["seed"] == 0 and record["config"]["standardize"] is True
    assert manifest.read(tmp_path / "p.png")["kind"] == "picture"


def test_the_best_layer_is_chosen_without_the_test_labels(pair, tmp_path):
    shuffled = np.random.default_rng(0).permutation(CLASSES[600:1100])
    other = write(tmp_path / "t.zarr", layered(slice(600, 1100), seed=1), shuffled)
    honest, blind = probe.run(*pair, **QUICK), probe.run(pair[0], other, **QUICK)
    for key in ("layer", "c", "val_accuracy"):
        assert [row[key] for row in honest["layers"]] == [row[key] for row in blind["layers"]]
    assert honest["best_layer"] == blind["best_layer"] == 1 and blind["test_accuracy"] < 0.2


def test_equal_layers_go_to_the_lower_one(tmp_path):
    train, test = layered(slice(0, 300)), layered(slice(300, 600))
    train[:] = train[1]
    test[:] = test[1]
    paths = write(tmp_path / "a.zarr", train, CLASSES[:300]), write(tmp_path / "b.zarr", test, CLASSES[300:600])
    assert probe.run(*paths, **QUICK)["best_layer"] == 0


@pytest.mark.parametrize("choice", ["subset", "all"])
def test_low_data_reports_mean_and_std_over_trials(pair, choice):
    numbers = probe.run(*pair, labels_per_class=4, trials=3, low_data_choice=choice, **QUICK)["low_data"]
    assert len(numbers["test_accuracies"]) == len(numbers["cs"]) == len(numbers["layers"]) == 3
    assert (numbers["choice"], numbers["layer"]) == (choice, 1 if choice == "all" else None)
    assert numbers["layers"] == [1, 1, 1]  # of little noise
    assert numbers["test_accuracy_mean"] == pytest.approx(np.mean(numbers["test_accuracies"]))
    assert numbers["test_accuracy_std"] == pytest.approx(np.std(numbers["test_accuracies"], ddof=1))


def test_few_labels_choose_layer_c_and_scaling_by_themselves(pair):
    """Against the same written out with scikit-learn: folds, losses, statistics and the last fit."""
    X, y, few, cs = layered(slice(0, 600)), CLASSES[:600], 4, [1e-3, 1e-2, 1e-1]
    numbers = probe.run(*pair, labels_per_class=few, trials=2, c=cs, seed=3)["low_data"]
    test_X, test_y = layered(slice(600, 1100), seed=1), CLASSES[600:1100]
    for trial, picked in enumerate(low_data_subsets(y, None, few, 2, seed=3)):
        assert np.bincount(y[picked]).tolist() == [few] * 10
        losses = {}
        for layer in LAYERS:
            rows = X[layer][picked]
            scaled = (rows - rows.mean(0)) / np.where(rows.std(0) > 0, rows.std(0), np.inf)
            for c in cs:
                losses[layer, c] = 0.0
                for left_out in range(few):
                    held = np.arange(10 * few) % few == left_out
                    model = LogisticRegression(C=c, max_iter=1000, tol=1e-6).fit(scaled[~held], y[picked][~held])
                    right = model.predict_proba(scaled[held])[np.arange(10), y[picked][held]]
                    losses[layer, c] -= np.log(right).sum()
        layer, c = min(losses, key=losses.get)
        assert (numbers["layers"][trial], numbers["cs"][trial]) == (layer, c)
        rows, test = X[layer][picked], test_X[layer].copy()
        standardize(rows, test)
        direct = LogisticRegression(C=c, max_iter=1000, tol=1e-6).fit(rows, y[picked])
        assert numbers["test_accuracies"][trial] == pytest.approx(direct.score(test, test_y), abs=1.1 / len(test_y))


def test_no_image_beside_the_few_has_a_say(pair, tmp_path):
    """Outside the subsets another layer is the clear one, at another scale: the whole probe goes there, they do not."""
    X, y = layered(slice(0, 600)), CLASSES[:600]
    inside = np.concatenate(low_data_subsets(y, None, 4, 2, seed=0))
    outside = np.setdiff1d(np.arange(600), inside)
    X[:, outside] = 9 * layered(slice(0, 600), noises=(4, 40, 40), seed=2)[:, outside] + 50
    other = write(tmp_path / "o.zarr", X, y)
    given = {"labels_per_class": 4, "trials": 2, **QUICK}
    plain, moved = probe.run(*pair, **given), probe.run(other, pair[1], **given)
    assert moved["low_data"] == plain["low_data"] and moved["best_layer"] == 0 != plain["best_layer"]
    both = [probe.run(path, pair[1], low_data_choice="all", **given)["low_data"] for path in (pair[0], other)]
    assert both[0] != both[1]


def test_one_label_a_class_chooses_nothing(pair):
    one = {"labels_per_class": 1, "trials": 2}
    with pytest.raises(UsageError, match="no label to choose the layer by") as fault:
        probe.run(*pair, c=[0.1], **one)
    assert "--layers 1" in fault.value.hint and "--low-data-choice all" in fault.value.hint
    alone = probe.run(*pair, c=[0.1], layers="1", **one)["low_data"]
    assert alone["layers"] == [1, 1] and alone["test_accuracy_mean"] > 0.3
    assert probe.run(*pair, c=[0.1], low_data_choice="all", **one)["low_data"]["layer"] == 1


def test_of_a_large_store_the_few_views_alone_are_read(tmp_path):
    """Unpooled, with two masks a view: the same rows as of the whole."""
    X = np.random.default_rng(0).standard_normal((2, 40, 5, 3)).astype(np.float16)
    specs = {"features": Spec("float16", (2, None, 5, 3))}
    with owning.writing(tmp_path / "f.zarr") as partial:
        writer = StoreWriter(partial, specs, {}, 6)
        writer.append({"features": X}, {})
        writer.finish("features", "features", {}, {}, {}, {"layers": [3, 7], "masks": 2, "pool": "none"})
    views = np.array([0, 2, 3, 11, 19])
    side = Side(open_store(tmp_path / "f.zarr", "features"), np.zeros(20, np.int32), None)
    rows = X[1].astype(np.float32).mean(axis=1).reshape(20, 2, 3)[views].reshape(10, 3)
    np.testing.assert_allclose(side.pooled_views(7, views), rows, atol=1e-3)


def test_the_table_names_what_chose(pair):
    line = ["probe", pair[0], "--test", pair[1], "--c", "0.01", "--labels-per-class", "4", "--trials", "2", "--quiet"]
    for more, words in (
        ([], "layer (1) and scaling chosen with them alone"),
        (["all"], "layer 1 and scaling chosen with all"),
    ):
        said = good(*line, *(["--low-data-choice", *more] if more else []))
        assert f"4 labels a class, {words}, mean of 2 (std" in said


def test_the_solver_is_recorded_with_what_it_reached(pair, tmp_path):
    given = {"layers": [1], "concat": 2, "labels_per_class": 4, "trials": 2, **QUICK}
    ours = probe.run(*pair, out=tmp_path / "p.json", device="cpu", **given)
    theirs = probe.run(*pair, solver="sklearn", **given)
    record = json.loads((tmp_path / "p.json").read_text())["pixseq"]
    assert record["config"]["solver"] == "pixseq" and (ours["solver"], theirs["solver"]) == ("pixseq", "sklearn")
    for numbers in (ours, theirs):
        for row in (*numbers["layers"], numbers["concat"], *numbers["layers"][0]["tried"]):
            assert row["converged"] and 0 < row["gradient"] < 2e-4
    assert ours["layers"][0]["objective"] <= theirs["layers"][0]["objective"] * (1 + 1e-6)
    assert ours["test_accuracy"] == pytest.approx(theirs["test_accuracy"], abs=0.0021)
    with pytest.raises(UsageError, match="--solver goes with --method logistic"):
        probe.run(*pair, method="knn", solver="sklearn")
    with pytest.raises(UsageError, match="--solver sklearn does not go with --device cuda"):
        probe.run(*pair, solver="sklearn", device="cuda")


def test_knn_fits_nothing_and_finds_the_middle_layer(pair):
    numbers = probe.run(*pair, method="knn")
    assert numbers["best_layer"] == 1 and numbers["test_accuracy"] > 0.8
    assert all(row["c"] is None and row["converged"] is None for row in numbers["layers"])


def test_baselines_stand_beside_the_features(pair, tmp_path):
    raw = [
        write(tmp_path / f"{name}.zarr", layered(rows, (0,)), CLASSES[rows], pool="none")
        for name, rows in (("a", slice(0, 600)), ("b", slice(600, 1100)))
    ]
    numbers = probe.run(*pair, layers=[1], baselines=[("raw pixels", *raw)], plot=tmp_path / "p.png", **QUICK)
    assert [row["layer"] for row in numbers["layers"]] == [1]
    (baseline,) = numbers["baselines"]
    assert (baseline["name"], baseline["best_layer"], len(baseline["layers"])) == ("raw pixels", 0, 1)
    assert baseline["test_accuracy"] > 0.8
    with pytest.raises(UsageError, match="one name"):
        probe.run(*pair, baselines=[("raw pixels", *raw)] * 2)
    with pytest.raises(PixseqError, match=r"'raw pixels'.*labels are not those"):
        probe.run(*pair, baselines=[("raw pixels", *reversed(raw))], **QUICK)


def test_masked_rows_are_one_image(tmp_path):
    train, test = slice(0, 200), slice(200, 500)
    paths = [
        write(tmp_path / f"{M}.zarr", layered(rows, M=M, seed=M), np.repeat(CLASSES[rows], M), masks=M)
        for rows, M in ((train, 2), (test, 5))
    ]
    numbers = probe.run(*paths, **QUICK)
    assert (numbers["n_train"], numbers["n_test"]) == (200, 300)
    single = write(tmp_path / "1.zarr", layered(test, seed=5), CLASSES[test])
    assert numbers["layers"][2]["test_accuracy"] > probe.run(paths[0], single, **QUICK)["layers"][2]["test_accuracy"]


def test_half_precision_features_give_the_same_choice(pair, tmp_path):
    half = [
        write(tmp_path / f"{seed}.zarr", layered(rows, seed=seed).astype(np.float16), CLASSES[rows])
        for seed, rows in enumerate((slice(0, 600), slice(600, 1100)))
    ]
    whole, rounded = probe.run(*pair, **QUICK), probe.run(*half, **QUICK)
    assert rounded["best_layer"] == whole["best_layer"]
    assert rounded["test_accuracy"] == pytest.approx(whole["test_accuracy"], abs=0.01)


def test_the_result_does_not_depend_on_how_many_layers_run_at_once(pair, monkeypatch):
    side_by_side = probe.run(*pair, **QUICK)
    monkeypatch.setattr(probing, "MEMORY_BYTES", 1)
    assert probe.run(*pair, **QUICK) == side_by_side


def test_a_class_only_in_test_is_reported(pair, tmp_path):
    known = np.flatnonzero(CLASSES[:600] != 9)
    train = write(tmp_path / "a.zarr", layered(known), CLASSES[known])
    numbers = probe.run(train, pair[1], layers=[1], **QUICK)
    assert numbers["classes_only_in_test"] == ["9"] and numbers["n_classes"] == 9


def test_an_existing_target_is_refused_before_any_work(pair, tmp_path, monkeypatch):
    (tmp_path / "p.json").write_text("{}")
    monkeypatch.setattr(probing.LayerRecipe, "probe", lambda *_: pytest.fail("worked"))
    with pytest.raises(PixseqError, match="already exists"):
        probe.run(*pair, out=tmp_path / "p.json")


def variant(tmp_path, rows=slice(600, 1100), labels="same", change=None, **given):
    features = layered(rows)
    if change is not None:
        features = change(features)
    return write(tmp_path / "v.zarr", features, CLASSES[rows] if labels == "same" else labels, **given)


def spoil(features):
    features[1, 3, 5] = np.nan
    return features


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": None}, "holds no labels"),
        ({"labels": [-1] * 500}, "500 rows have no label"),
        ({"inputs": {"model": {"path": "n", "id": "sha256:other"}}}, "models differ.*sha256:model.*sha256:other"),
        ({"config": {"random_init": 0}}, "random models differ.*None.*0"),
        ({"pool": "max"}, r"\(pool\) differ.*mean.*max"),
        ({"layers": [3, 4, 5]}, r"layers differ.*\[0, 1, 2\].*\[3, 4, 5\]"),
        ({"class_names": list("abcdefghij")}, "class names differ"),
        ({"change": lambda features: features[:, :, :9]}, "widths differ.*64.*9"),
        ({"change": spoil}, "layer 1 holds values that are not finite"),
    ],
)
def test_test_features_that_do_not_belong_are_refused_with_both_sides(pair, tmp_path, given, message):
    with pytest.raises(PixseqError, match=message) as caught:
        probe.run(pair[0], variant(tmp_path, **given), **QUICK)
    assert caught.value.hint


def test_train_as_test_is_refused(pair, tmp_path):
    with pytest.raises(PixseqError, match="features of the same images"):
        probe.run(pair[0], pair[0])
    tokens = {"tokens": {"path": "t", "id": "sha256:tokens"}}
    a = write(tmp_path / "a.zarr", layered(slice(0, 50)), CLASSES[:50], inputs=tokens)
    b = write(tmp_path / "b.zarr", layered(slice(0, 50)).astype(np.float16), CLASSES[:50], inputs=tokens)
    with pytest.raises(PixseqError, match="features of the same images"):
        probe.run(a, b)


def test_features_with_another_attention_are_refused(tmp_path):
    paths = [
        write(tmp_path / f"{use}.zarr", layered(rows), CLASSES[rows], config={"attention": use})
        for use, rows in (("causal", slice(0, 50)), ("bidirectional", slice(50, 100)))
    ]
    with pytest.raises(PixseqError, match=r"the attention differ: .*causal.*bidirectional"):
        probe.run(*paths, **QUICK)


def test_tokens_are_not_features(tokens):
    with pytest.raises(PixseqError, match="of kind tokens, where features is needed"):
        probe.run(tokens, tokens)


def test_train_features_that_cannot_be_probed_are_refused(pair, tmp_path):
    one = write(tmp_path / "one.zarr", layered(slice(0, 50)), np.full(50, 3))
    with pytest.raises(PixseqError, match="one class only"):
        probe.run(one, pair[1])
    lone = write(tmp_path / "lone.zarr", layered(slice(0, 10)), np.arange(10))
    with pytest.raises(PixseqError, match="single image"):
        probe.run(lone, pair[1])
    few = write(tmp_path / "few.zarr", layered(slice(0, 20)), CLASSES[:20])
    with pytest.raises(PixseqError, match=r"knn needs 20 neighbours.*10 rows"):
        probe.run(few, pair[1], method="knn")
    with pytest.raises(PixseqError, match=r"labels-per-class is 9.*has 2 images of 0"):
        probe.run(few, pair[1], labels_per_class=9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": "7"}, r"--layers 7: .*holds the layers \[0, 1, 2\]"),
        ({"layers": "one"}, "no list of numbers"),
        ({"c": "0.1,big"}, "no list of numbers"),
        ({"c": [0.0]}, "positive"),
        ({"c": []}, "positive"),
        ({"val_fraction": 1.0}, "val-fraction"),
        ({"trials": 0}, "trials"),
        ({"concat": -1}, "concat"),
        ({"max_iter": 0}, "max-iter"),
        ({"labels_per_class": 0}, "labels-per-class"),
        ({"labels_per_class": 1}, "no label to choose C"),
        ({"low_data_choice": "all"}, "without --labels-per-class"),
        ({"labels_per_class": 4, "method": "knn"}, "goes with --method logistic"),
    ],
)
def test_options_that_cannot_be_used_are_usage_errors(pair, given, message):
    with pytest.raises(UsageError, match=message):
        probe.run(*pair, **given)


def test_few_test_images_are_warned_of(pair, tmp_path):
    few = write(tmp_path / "few.zarr", layered(slice(600, 625), seed=1), CLASSES[600:625])
    _, _, said = called("probe", pair[0], "--test", few, "--c", "1e-3,1e-2", "--layers", "1")
    assert said.splitlines()[-1] == (
        "warning: test has 25 images: chance alone moves an accuracy on so few by 10 points"
    )
    assert "chance" not in called("probe", *pair[:1], "--test", pair[1], "--c", "1e-3", "--layers", "1").err


def test_more_iterations_are_advised_only_where_they_ran_out():
    rows = [
        {"layer": 0, "converged": True, "n_iter": 9, "gradient": 1e-5},
        {"layer": 1, "converged": False, "n_iter": 50, "gradient": 2e-3},
        {"layer": 2, "converged": False, "n_iter": 12, "gradient": 3e-4},
    ]
    cut, rounded = probe._unconverged(rows, 50)
    assert "at layer 1 " in cut and "raise --max-iter" in cut and "2.0e-03" in cut
    assert "at layer 2 " in rounded and "rounding" in rounded and "--max-iter" not in rounded
