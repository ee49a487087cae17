"""Fréchet distance and KID against the textbook, and `frechet` on features and arrays: what it says and refuses."""

import json

import numpy as np
import pytest
import zarr
from conftest import write_tokens
from scipy.linalg import sqrtm

from pixseq.artifacts import manifest
from pixseq.errors import PixseqError, UsageError
from pixseq.numerics.frechet import BLOCK, form, frechet_distance, kid
from pixseq.numerics.parts import choose_rows, two_samples
from pixseq.stages import features, frechet

D = 24


def drawn(n, seed=0, decay=1.0, shift=0.3, rank=D):
    """Correlated features [n, D] whose variances span `decay` powers of ten, in `rank` directions."""
    basis = np.linalg.qr(np.random.default_rng(9).standard_normal((D, D)))[0][:rank]
    scale = 10 ** (-decay / 2 * np.arange(rank) / rank)
    return (np.random.default_rng(seed).standard_normal((n, rank)) * scale) @ basis + shift * seed


def textbook(a, b):
    first, second = np.cov(a.T), np.cov(b.T)
    root = np.trace(sqrtm(first @ second)).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * root


def by_singular_values(a, b):
    """The same without squares: exact where the covariances are near singular and sqrtm keeps few digits."""
    first, second = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    root = np.linalg.svd(first @ second.T, compute_uv=False).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + (first**2).sum() + (second**2).sum() - 2 * root


# ---- the distance


@pytest.mark.parametrize(
    ("n", "m", "name"),
    [
        (300, 400, "eigenvalues"),
        (D + 1, 200, "eigenvalues"),
        (D, D, "cross-Gram"),
        (10, 15, "cross-Gram"),
        (10, 300, "cross-Gram"),
        (2, D + 1, "cross-Gram"),
        (BLOCK + 7, 2 * BLOCK + 1, "eigenvalues"),
    ],
)
@pytest.mark.filterwarnings("ignore:Matrix is singular")
def test_it_is_the_textbook_formula(n, m, name):
    a, b = drawn(n), 1.2 * drawn(m, seed=1)
    assert form(n, m, D) == name
    assert frechet_distance(a, b) == pytest.approx(textbook(a, b), rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-9)


@pytest.mark.parametrize(
    "change",
    [
        {"decay": 9.0},
        {"decay": 14.0},
        {"rank": D // 2},
        {"rank": 1},
    ],
)
@pytest.mark.parametrize("n", [20, 200])
def test_singular_and_nearly_singular_covariances(change, n):
    a, b = drawn(n, **change), drawn(250, seed=1, **change) * 1.1
    exact = by_singular_values(a, b)
    assert frechet_distance(a, b) == pytest.approx(exact, rel=1e-8)
    assert frechet_distance(a, drawn(250, seed=1)) == pytest.approx(by_singular_values(a, drawn(250, seed=1)), rel=1e-7)


@pytest.mark.filterwarnings("ignore:Matrix is singular")
def test_rank_deficient_features_agree_with_the_textbook():
    a, b = drawn(200, rank=D // 2), drawn(200, seed=1, rank=D // 2)
    assert frechet_distance(a, b) == pytest.approx(textbook(a, b), rel=1e-6)


def test_closed_forms():
    x = drawn(200)
    shift = np.arange(D) / 10
    for n in (200, 12):
        assert frechet_distance(x[:n], x[:n]) == pytest.approx(0, abs=1e-12)
        assert frechet_distance(x[:n], x[:n] + shift) == pytest.approx((shift**2).sum())
        # of one set scaled by 3: Tr S (1 - 3)^2
        variance = x[:n].var(axis=0, ddof=1).sum()
        centred = x[:n] - x[:n].mean(0)
        assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * variance)
    same = np.ones((50, D))
    assert frechet_distance(same, np.zeros((9, D))) == frechet_distance(same, np.zeros((50, D))) == D


def test_independent_features_need_no_root():
    """Diagonal covariances: the sum over features of the difference of deviations, squared."""
    x = np.linalg.qr(np.random.default_rng(0).standard_normal((101, D + 1)))[0]
    x = np.linalg.qr(np.column_stack([np.ones(101), x]))[0][:, 1 : D + 1]  # columns centred and orthonormal
    first, second = np.linspace(1, 3, D), np.linspace(2, 0, D)
    assert frechet_distance(10 * x * first, 10 * x * second) == pytest.approx(((first - second) ** 2).sum())


def test_half_precision_and_large_offsets_lose_nothing():
    a, b = drawn(300).astype(np.float16), drawn(300, seed=1).astype(np.float16)
    assert frechet_distance(a, b) == pytest.approx(textbook(a.astype(float), b.astype(float)), rel=1e-6)
    a, b = drawn(300), drawn(300, seed=1)
    assert frechet_distance(a + 1e4, b + 1e4) == pytest.approx(frechet_distance(a, b), rel=1e-8)


# ---- KID


def test_kid_is_the_mean_over_pairs():
    a, b = drawn(7), drawn(5, seed=1)

    def kernel(x, y):
        return (x @ y / D + 1) ** 3

    def pairs(x):
        return np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])

    def plainly(a, b):
        return pairs(a) + pairs(b) - 2 * np.mean([kernel(x, y) for x in a for y in b])

    assert kid(a, b).value == pytest.approx(plainly(a, b))
    left_out = [np.array([plainly(np.delete(a, i, 0), b) for i in range(7)])]
    left_out += [np.array([plainly(a, np.delete(b, i, 0)) for i in range(5)])]
    variance = sum((len(x) - 1) / len(x) * ((x - x.mean()) ** 2).sum() for x in left_out)
    assert kid(a, b).se == pytest.approx(variance**0.5)
    assert kid(a[:2], b).se is None


def test_kid_in_blocks():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((BLOCK + 300, 3)), rng.standard_normal((2 * BLOCK + 5, 3)) + 0.1

    def cubes(x, y):
        return (x @ y.T / 3 + 1) ** 3

    def pairs(x):
        return (cubes(x, x).sum() - np.trace(cubes(x, x))) / (len(x) * (len(x) - 1))

    assert kid(a, b).value == pytest.approx(pairs(a) + pairs(b) - 2 * cubes(a, b).mean(), rel=1e-9)


def test_kid_is_unbiased_and_its_error_is_honest():
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.4):
        found = [kid(rng.standard_normal((40, 6)), rng.standard_normal((60, 6)) + shift) for _ in range(300)]
        values, se = np.array([k.value for k in found]), np.sqrt(np.mean([k.se**2 for k in found]))
        # E k(x, x') under N(0, I) and N(s, I): with u = x.y, E u^2 and E u^3 are those of Gaussians
        s = shift**2  # |s|^2 / d, as every coordinate is shifted
        within_a = 1 + 3 / 6
        within_b = (1 + s) ** 3 + 3 * (1 + s) * (1 + 2 * s) / 6 + 6 * s / 36
        across = 1 + 3 * (1 + s) / 6
        assert abs(values.mean() - (within_a + within_b - 2 * across)) < 4 * values.std() / np.sqrt(len(values))
        assert 0.9 < se / values.std() < 1.6


# ---- the stage on arrays


@pytest.fixture
def arrays(tmp_path):
    """Paths of 100 drawn and 400 real rows."""
    np.save(tmp_path / "a.npy", drawn(100).astype(np.float32))
    np.save(tmp_path / "b.npy", drawn(400, seed=1).astype(np.float32))
    return tmp_path / "a.npy", tmp_path / "b.npy"


def test_the_numbers_of_two_arrays(arrays, tmp_path):
    numbers = frechet.run(*arrays, out=tmp_path / "m.json", seed=3)
    a, b = (np.load(path) for path in arrays)
    assert numbers["frechet_distance"] == frechet_distance(a, b)
    assert (numbers["n_a"], numbers["n_b"], numbers["dim"], numbers["form"]) == (100, 400, D, "eigenvalues")
    assert (numbers["extractor"], numbers["resize"]) == ("array", "unknown")
    assert (numbers["kid"], numbers["kid_se"]) == (kid(a, b).value, kid(a, b).se)
    assert numbers["floor"]["n"] == 100 and 0 < numbers["floor"]["frechet_distance"] < numbers["frechet_distance"]
    assert len(numbers["remarks"]) == 1 and "n = 100 is small for 24 features" in numbers["remarks"][0]

    written = json.loads((tmp_path / "m.json").read_text())
    record = written.pop("pixseq")
    assert written == numbers and record["stage"] == "frechet" and record["config"]["seed"] == 3
    np.save(tmp_path / "again.npy", a)
    again = frechet.run(tmp_path / "again.npy", arrays[1], out=tmp_path / "n.json", seed=3)
    inputs = manifest.read(tmp_path / "n.json")["inputs"]
    assert again == numbers and inputs["a"]["id"] == record["inputs"]["a"]["id"] != inputs["b"]["id"]
    with pytest.raises(PixseqError, match="already exists"):
        frechet.run(tmp_path / "missing", arrays[1], out=tmp_path / "m.json")


def test_zarr_arrays_and_groups_of_one(arrays, tmp_path):
    a = np.load(arrays[0])
    zarr.create_array(tmp_path / "a.zarr", data=a, chunks=(30, D))
    zarr.create_group(tmp_path / "g.zarr", zarr_format=2).create_array("x", data=a.astype(np.float64))
    expected = frechet.run(*arrays)["frechet_distance"]
    for name in ("a.zarr", "g.zarr", "g.zarr/x"):
        assert frechet.run(tmp_path / name, arrays[1])["frechet_distance"] == pytest.approx(expected, rel=1e-12)
    (tmp_path / "a.zarr" / "c" / "1" / "0").unlink()
    assert "1 of 4 chunks are not stored" in frechet.run(tmp_path / "a.zarr", arrays[1])["remarks"][0]
    zarr.open_group(tmp_path / "g.zarr").create_array("y", data=a)
    with pytest.raises(PixseqError, match=r"group of 2 arrays \(x, y\)"):
        frechet.run(tmp_path / "g.zarr", arrays[1])
    (tmp_path / "a.zarr" / "zarr.json").write_text("{")
    with pytest.raises(PixseqError, match=r"does not (open|tell how)"):
        frechet.run(tmp_path / "a.zarr", arrays[1])


def test_count_takes_rows_from_all_over_and_the_floor_says_its_own(arrays):
    numbers = frechet.run(*arrays, count=150)
    a, b = (each[choose_rows(len(each), 150)] for each in map(np.load, arrays))
    assert (numbers["n_a"], numbers["n_b"]) == (100, 150)
    assert numbers["frechet_distance"] == frechet_distance(a, b) and numbers["floor"]["n"] == 100
    few = frechet.run(*arrays, count=3)
    assert few["floor"]["n"] == 3 and few["form"] == "cross-Gram" and "covariance singular" in few["remarks"][0]
    back = frechet.run(*reversed(arrays), count=150)
    assert "the floor is of n = 50, the distance of n = 150" in back["remarks"][-1]
    np.save(arrays[1], b[:3])
    assert "3 rows, too few for a floor" in frechet.run(*arrays)["remarks"][-1]


def test_the_floor_is_of_rows_in_no_order(tmp_path):
    """Real rows sorted by class would make halves that differ."""
    b = np.concatenate([drawn(300), drawn(300, seed=1, shift=9)])
    np.save(tmp_path / "b.npy", b)
    floor = frechet.run(tmp_path / "b.npy", tmp_path / "b.npy")["floor"]
    assert floor["n"] == 300 and floor["frechet_distance"] < 0.1 * frechet_distance(b[:300], b[300:])


def test_kid_of_many_rows_is_of_a_random_part(arrays, monkeypatch):
    whole = frechet.run(*arrays)
    monkeypatch.setattr(frechet, "KID_ROWS", 90)
    part = frechet.run(*arrays)
    assert (part["kid_n_a"], part["kid_n_b"]) == (90, 90) and (whole["kid_n_a"], whole["kid_n_b"]) == (100, 400)
    assert abs(part["kid"] - whole["kid"]) < 4 * part["kid_se"]


def spoil(array):
    array[3, 2] = array[5, 0] = np.nan
    return array


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (drawn(1), "holds 1 row,"),
        (drawn(0), "holds 0 rows"),
        (spoil(drawn(9)), "2 of 9 rows .*not finite"),
        (drawn(9) * 1e50, r"beyond 1e\+45"),
        (drawn(9)[:, :7], r"widths differ.*7 features.*has 24"),
        (drawn(9)[:, 0], r"float64 of the shape \[9\], where .*\[n, d\]"),
        (drawn(9)[:, None], r"shape \[9, 1, 24\]"),
        (drawn(9)[:, :0], r"shape \[9, 0\]"),
        (drawn(9) + 1j, "complex128"),
        (drawn(9) > 0, "bool"),
        (np.full((9, D), "x"), "<U1"),
        (np.array([[{}] * D] * 9), "does not load as an array"),
    ],
)
def test_arrays_that_cannot_be_compared_are_refused(arrays, tmp_path, array, message):
    np.save(tmp_path / "bad.npy", array)
    with pytest.raises(PixseqError, match=message) as caught:
        frechet.run(tmp_path / "bad.npy", arrays[1])
    assert caught.value.hint


def test_files_that_are_no_arrays_are_refused(arrays, tmp_path, tokens):
    a, b = arrays
    (tmp_path / "cut.npy").write_bytes(a.read_bytes()[:-9])
    (tmp_path / "text.npy").write_text("1 2 3\n")
    (tmp_path / "empty.npy").touch()
    (tmp_path / "folder").mkdir()
    np.savez(tmp_path / "z.npz", np.load(a))
    for name, message in (
        ("cut.npy", "does not load"),
        ("text.npy", "neither features nor an .npy array"),
        ("empty.npy", "neither features"),
        ("z.npz", "neither features"),
        ("folder", "not a pixseq artifact"),
        ("missing.npy", "does not exist"),
        (tokens, "of kind tokens, where features is needed"),
    ):
        with pytest.raises(PixseqError, match=message) as caught:
            frechet.run(b, tmp_path / name)
        assert caught.value.hint
    with pytest.raises(UsageError, match="--count is 1"):
        frechet.run(a, b, count=1)
    with pytest.raises(UsageError, match=r"--layer 2 was given.*are arrays"):
        frechet.run(a, b, layer=2)


# ---- the stage on features


@pytest.fixture(scope="module")
def made(checkpoints, tokens, tmp_path_factory):
    """Features by name: of `tokens` (96 images) and of 40 others, by the tiny model and some kin."""
    folder = tmp_path_factory.mktemp("features")
    others = write_tokens(folder / "others.zarr", count=40, seed=5)

    def make(name, images, model="ar", **given):
        model = model if model == "pixels" else checkpoints[model]
        features.run(model, images, folder / name, device="cpu", **given)
        return folder / name

    return {
        "real": make("real", tokens),
        "drawn": make("drawn", others),
        "one layer": make("one", others, layers="1"),
        "positions": make("positions", others, layers="1", pool="none"),
        "random": make("random", others, random_init=4),
        "bert": make("bert", others, model="bert", masks=2),
        "bert, 1 mask": make("bert1", others, model="bert", masks=1),
        "pixels": make("pixels", others, model="pixels"),
        "real pixels": make("realpixels", tokens, model="pixels"),
        "folder": folder,
    }


def test_features_of_one_layer(made, checkpoints):
    numbers = frechet.run(made["drawn"], made["real"], layer=1)
    a, b = (zarr.open_group(made[name])["features"][1] for name in ("drawn", "real"))
    assert numbers["frechet_distance"] == frechet_distance(a, b)
    assert (numbers["n_a"], numbers["n_b"], numbers["dim"]) == (40, 96, 16)
    model = manifest.read(checkpoints["ar"])["id"]
    for words in (f"model {model}", "layer 1", "mean over positions", "weights model", "attention causal"):
        assert words in numbers["extractor"]
    assert numbers["resize"] == "none: pictures of 6x6 as encoded"
    assert frechet.run(made["one layer"], made["real"], layer=1) == numbers
    assert frechet.run(made["drawn"], made["drawn"], layer=2)["remarks"][0] == "both sides are the same features"
    pixels = frechet.run(made["pixels"], made["real pixels"])
    assert pixels["extractor"] == "pixels, 108 values" and pixels["resize"] == numbers["resize"]


def test_positions_and_masks_are_averaged(made):
    pooled, whole = (frechet.run(made[name], made["real"], layer=1) for name in ("one layer", "positions"))
    assert whole["frechet_distance"] == pytest.approx(pooled["frechet_distance"], rel=1e-4)
    assert (whole["extractor"], whole["n_a"]) == (pooled["extractor"], 40)
    masked = frechet.run(made["bert"], made["bert"], layer=1, count=30)
    assert masked["n_a"] == 30 and "mean over 2 masks" in masked["extractor"]


def test_an_array_beside_features_is_told(made, tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).standard_normal((200, 16)))
    numbers = frechet.run(tmp_path / "a.npy", made["real"], layer=1)
    assert "a.npy does not say what made it" in numbers["remarks"][0]
    assert numbers["extractor"].startswith("a: array; b: model sha256:")
    assert numbers["resize"] == "a: unknown; b: none: pictures of 6x6 as encoded"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("random", "weights differ.*random weights of seed 4.*weights model"),
        ("bert", "models differ"),
        ("pixels", "models differ.*pixels.*model sha256"),
    ],
)
def test_features_of_different_extractors_are_refused(made, other, message):
    layer = 0 if other == "pixels" else 1
    with pytest.raises(PixseqError, match=message) as caught:
        frechet.run(made[other], made["real"], layer=layer)
    assert caught.value.hint


def test_other_masks_layers_and_sizes_are_refused(made, tmp_path):
    with pytest.raises(PixseqError, match=r"masks differ: .*mean over 2 masks.*has none"):
        frechet.run(made["bert"], made["bert, 1 mask"], layer=1)
    features.run("pixels", write_tokens(tmp_path / "t.zarr", side=4), tmp_path / "small", device="cpu")
    with pytest.raises(PixseqError, match=r"values differ.*48 values.*108 values"):
        frechet.run(tmp_path / "small", made["pixels"])


def test_the_layer_must_be_named_and_there(made):
    with pytest.raises(UsageError, match=r"holds the layers \[0, 1, 2\], and one is compared"):
        frechet.run(made["drawn"], made["real"])
    with pytest.raises(UsageError, match=r"--layer 2: .*holds the layers \[1\]"):
        frechet.run(made["one layer"], made["real"], layer=2)


# ---- the floor where classes are known


@pytest.fixture(scope="module")
def by_class(tmp_path_factory):
    """Pixel features of stores sorted by class, four classes far apart, by how many images they have."""
    folder = tmp_path_factory.mktemp("sorted")

    def make(count):
        classes = np.arange(count) * 4 // count
        tokens = write_tokens(folder / f"t{count}", count=count, side=4, seed=count, labels=classes)
        features.run("pixels", tokens, folder / f"f{count}", device="cpu")
        return folder / f"f{count}"

    return {count: make(count) for count in (60, 100, 160)}


def rows_of(path, count):
    rows = zarr.open_group(path)["features"][0]
    return rows[choose_rows(len(rows), count, np.arange(len(rows)) * 4 // len(rows))]


def test_the_floor_of_other_pictures_is_of_every_class_of_both(by_class):
    for a, floor, n in ((100, 160, 100), (100, 60, 60)):
        least = frechet.run(by_class[a], by_class[160], floor=by_class[floor])["floor"]
        expected = frechet_distance(rows_of(by_class[floor], n), rows_of(by_class[160], n))
        assert least == {"frechet_distance": pytest.approx(expected, abs=1e-9), "n": n}
    part = frechet.run(by_class[160], by_class[160], count=40, floor=by_class[100])["floor"]
    same = frechet_distance(rows_of(by_class[100], 40), rows_of(by_class[160], 40))
    assert part == {"frechet_distance": pytest.approx(same), "n": 40}
    # more than there are others: the rows of the floor are among those of the distance
    fewer = frechet.run(by_class[160], by_class[160], count=90, floor=by_class[60])["floor"]
    kept = rows_of(by_class[160], 90)
    kept = kept[choose_rows(90, 60, choose_rows(160, 90, np.arange(160) // 40) // 40)]
    among = frechet_distance(rows_of(by_class[60], 60), kept)
    assert fewer == {"frechet_distance": pytest.approx(among), "n": 60}


def test_both_samples_of_the_floor_have_every_class_by_its_share(by_class, monkeypatch):
    taken = []
    whole = [row.tobytes() for row in rows_of(by_class[160], 160)]
    measure = frechet.frechet_distance
    monkeypatch.setattr(frechet, "frechet_distance", lambda a, b: taken.append((a, b)) or measure(a, b))
    for seed in (0, 0, 1):
        assert frechet.run(by_class[100], by_class[160], count=40, seed=seed)["floor"]["n"] == 40
    drawn = [[[whole.index(row.tobytes()) for row in half] for half in pair] for pair in taken[1::2]]
    for first, second in drawn:
        assert all(np.bincount(np.array(half) // 40).tolist() == [10] * 4 for half in (first, second))
    assert drawn[0] == drawn[1] != drawn[2]


def test_two_samples_are_apart_and_fair_whatever_the_classes():
    labels = np.repeat([3, 5, 9], [1, 40, 22])
    for size in (2, 15, 31):
        first, second = two_samples(63, size, labels, np.random.default_rng(size))
        assert len(first) == len(second) == size and len({*first, *second}) == 2 * size
        counts = [np.bincount(labels[half], minlength=10) for half in (first, second)]
        assert abs(counts[0] - counts[1]).max() <= 1
    order = np.random.default_rng(4).permutation(63)
    first, second = two_samples(63, 20, None, np.random.default_rng(4))
    assert first.tolist() == order[:20].tolist() and second.tolist() == order[20:40].tolist()
