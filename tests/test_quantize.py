import numpy as np
import pytest
from PIL import Image
from threadpoolctl import threadpool_limits

from pixseq.numerics import kmeans
from pixseq.numerics.kmeans import Cells, fit_palette
from pixseq.numerics.quantize import (
    GRAYS,
    add_to_histogram,
    dequantize,
    empty_histogram,
    nearest_table,
    psnr_db,
    quantize,
    squared_error,
    to_images,
    to_tokens,
    token_counts,
    unigram_entropy,
    unpack,
)


def brute_force(rgb: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """The definition: float64 argmin over squared distances summed in channel order."""
    return np.concatenate(
        [
            ((part[:, None, :] / 127.5 - 1.0 - palette) ** 2).sum(axis=2).argmin(axis=1)
            for part in np.array_split(rgb, 64)
        ]
    )


def picture_histogram(seed: int = 0, pixels: int = 20_000) -> np.ndarray:
    """Colours around a few dozen hues, as pictures have them."""
    rng = np.random.default_rng(seed)
    hues = rng.uniform(0, 255, (40, 3))
    images = np.clip(rng.normal(hues[rng.integers(0, 40, pixels)], 12), 0, 255).astype(np.uint8)
    histogram = empty_histogram()
    add_to_histogram(histogram, images.reshape(-1, 100, 3))
    return histogram


rng = np.random.default_rng(1)
PALETTES = {
    "one": np.array([[0.2, -0.3, 0.9]]),
    "two": np.array([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]]),
    "512 floats": rng.uniform(-1, 1, (512, 3)),
    "4096 floats": rng.uniform(-1, 1, (4096, 3)),
    "whole numbers, with many ties": rng.integers(0, 256, (512, 3)) / 127.5 - 1,
    "a shuffled lattice, all ties": rng.permutation(np.mgrid[16:256:32, 16:256:32, 16:256:32].reshape(3, -1).T) / 127.5
    - 1,
    "repeated colours": (rng.integers(0, 32, (60, 3)) * 8 / 127.5 - 1)[rng.integers(0, 60, 300)],
    "greys": np.repeat(np.linspace(-1, 1, 16)[::-1, None], 3, axis=1),
    "packed into one byte step": rng.uniform(0.1, 0.1 + 1 / 127.5, (300, 3)),
}


@pytest.mark.parametrize("name", PALETTES)
def test_table_is_the_nearest_colour_lowest_index_on_ties(name):
    palette = PALETTES[name]
    table = nearest_table(palette)
    assert table.dtype == np.uint16 and table.shape == (1 << 24,)
    codes = np.random.default_rng(2).integers(0, 1 << 24, 4_000_000 // len(palette) // 4 + 500)
    if "ties" in name:  # multiples of 8 and neighbours of lattice planes, where ties live
        codes = np.concatenate([codes, codes & 0xF8F8F8, codes & 0xE0E0E0])
    np.testing.assert_array_equal(table[codes], brute_force(unpack(codes), palette))


def test_table_is_exact_on_all_16777216_colours():
    palette = np.array([[2, 2, 2], [0, 0, 0], [4, 4, 4], [254, 1, 128], [254, 1, 126], [90, 90, 200]]) / 127.5 - 1
    levels = np.arange(256) / 127.5 - 1
    r, g, b = ((levels[:, None] - column) ** 2 for column in palette.T)
    slow = np.empty((256, 256, 256), np.uint16)
    for red in range(256):
        slow[red] = ((r[red] + g)[:, None, :] + b).argmin(axis=2)
    np.testing.assert_array_equal(nearest_table(palette), slow.reshape(-1))


def test_quantize_and_dequantize_are_per_pixel_look_ups():
    images = np.random.default_rng(3).integers(0, 256, (5, 7, 9, 3), dtype=np.uint8)
    palette = PALETTES["512 floats"]
    tokens = quantize(images, nearest_table(palette))
    assert tokens.dtype == np.uint16 and tokens.shape == (5, 7, 9)
    np.testing.assert_array_equal(tokens.reshape(-1), brute_force(images.reshape(-1, 3), palette))
    np.testing.assert_array_equal(dequantize(tokens, palette), np.rint(127.5 * (palette + 1))[tokens])
    strided = images[:, ::2, :, :]
    np.testing.assert_array_equal(quantize(strided, nearest_table(palette)), tokens[:, ::2])


def test_counts_are_of_all_blocks_and_reach_as_far_as_the_tokens(monkeypatch):
    monkeypatch.setattr("pixseq.numerics.quantize.PIXELS_AT_ONCE", 7)
    tokens = np.random.default_rng(0).integers(0, 30, (5, 8), np.uint16)
    for n_vocab in (0, 30, 40):
        assert token_counts(tokens, n_vocab).tolist() == np.bincount(tokens.reshape(-1), minlength=n_vocab).tolist()


def test_histograms_of_parts_add_up():
    images = np.random.default_rng(4).integers(0, 4, (10, 8, 8, 3), dtype=np.uint8)
    whole, parts = empty_histogram(), empty_histogram()
    add_to_histogram(whole, images)
    for image in images:
        add_to_histogram(parts, image)
    np.testing.assert_array_equal(whole, parts)
    r, g, b = images.reshape(-1, 3).astype(int).T
    np.testing.assert_array_equal(whole[:0x040404], np.bincount(r << 16 | g << 8 | b, minlength=0x040404)[:0x040404])


@pytest.mark.parametrize("cores", [1, 3])
def test_assignment_of_a_histogram_equals_brute_force(monkeypatch, cores):
    monkeypatch.setattr(kmeans, "usable_cores", lambda: cores)
    histogram = picture_histogram()
    codes = np.flatnonzero(histogram)
    rgb, weight = unpack(codes).astype(float), histogram[codes]
    centres = np.random.default_rng(5).uniform(0, 255, (37, 3))
    owner = brute_force(rgb, centres / 127.5 - 1)
    cells = Cells(histogram)
    count, sums = cells.assign(centres)
    np.testing.assert_array_equal(count, np.bincount(owner, weight, minlength=37))
    for axis in range(3):
        np.testing.assert_array_equal(sums[:, axis], np.bincount(owner, weight * rgb[:, axis], minlength=37))
    slow = (weight * ((rgb - centres[owner]) ** 2).sum(axis=1)).sum() / weight.sum()
    assert cells.mse(centres, count, sums) == pytest.approx(slow, rel=1e-12)


def test_fit_reports_the_true_error_and_is_as_good_as_scikit_learn_on_every_pixel():
    from sklearn.cluster import KMeans

    histogram = picture_histogram()
    fit = fit_palette(histogram, 24, seed=0)
    codes = np.flatnonzero(histogram)
    rgb, weight = unpack(codes), histogram[codes]
    table = nearest_table(fit.colors)
    pixels = np.repeat(rgb, weight, axis=0)
    true = squared_error(pixels, quantize(pixels, table), fit.colors) / len(pixels)
    assert fit.mse == pytest.approx(true, rel=1e-5)
    assert fit.psnr_db == pytest.approx(10 * np.log10(255**2 / (true / 3)), rel=1e-6)
    assert (fit.pixels, fit.distinct) == (20_000, len(codes))
    with threadpool_limits(1):
        full = KMeans(24, n_init=1, random_state=0).fit(rgb.astype(float), sample_weight=weight)
    assert fit.mse < 1.02 * full.inertia_ / len(pixels)
    assert fit.mse < fit_palette(histogram, 24, seed=0, refine_steps=0).mse


def test_palette_is_ordered_from_dark_to_light_and_survives_float32():
    colors = fit_palette(picture_histogram(), 32).colors
    luma = colors @ [0.299, 0.587, 0.114]
    assert (np.diff(luma) >= 0).all()
    np.testing.assert_array_equal(colors, colors.astype(np.float32).astype(np.float64))
    assert np.abs(colors).max() <= 1


def test_fewer_distinct_colours_than_asked_for_are_the_palette_themselves():
    histogram = empty_histogram()
    colours = np.array([[0, 0, 0], [255, 255, 255], [10, 200, 30], [10, 30, 200]], dtype=np.uint8)
    add_to_histogram(histogram, colours.repeat(5, axis=0))
    fit = fit_palette(histogram, 16)
    assert (len(fit.colors), fit.mse, fit.psnr_db) == (4, 0.0, None)
    np.testing.assert_array_equal(dequantize(quantize(colours, nearest_table(fit.colors)), fit.colors), colours)


@pytest.mark.parametrize("spread, few", [(1, True), (2, False), (200, False)])
def test_start_has_distinct_centres_whether_colours_are_few_packed_or_many(monkeypatch, spread, few):
    monkeypatch.setattr(kmeans, "START_POINTS", 64)
    rng = np.random.default_rng(6)
    histogram = empty_histogram()
    size = 4 if few else 40_000
    add_to_histogram(histogram, np.uint8(100 + rng.integers(0, 4 * spread, (size * 30, 3)).clip(0, 155)))
    cells = Cells(histogram)
    centres = kmeans._start(cells, int(np.count_nonzero(histogram)), 8, seed=0)
    assert len(np.unique(centres, axis=0)) == 8


def test_empty_clusters_start_again_where_the_error_is():
    cells = Cells(picture_histogram())
    centres = np.full((12, 3), 128.0)
    centres[:2] = [[0, 0, 0], [255, 255, 255]]  # the other ten coincide: nine of them get nothing
    refined = kmeans._refine(cells, centres, 20)
    count, _ = cells.assign(refined)
    assert (count > 0).all()


def test_same_seed_gives_the_same_bytes_with_one_thread_or_two():
    histogram = picture_histogram()
    with threadpool_limits(1):
        one = fit_palette(histogram, 64, seed=7, refine_steps=4).colors.tobytes()
    with threadpool_limits(2):
        two = fit_palette(histogram, 64, seed=7, refine_steps=4).colors.tobytes()
        other_seed = fit_palette(histogram, 64, seed=8, refine_steps=4).colors.tobytes()
    assert one == two != other_seed


def test_rgb_tokens_hold_the_picture_itself():
    images = np.random.default_rng(8).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    tokens = to_tokens(images, "rgb")
    assert tokens.dtype == np.uint16 and tokens.shape == (3, 60)
    np.testing.assert_array_equal(tokens[0, :6], images[0, 0, :2].reshape(-1))
    np.testing.assert_array_equal(to_images(tokens, 4, 5, None), images)


def test_gray_tokens_are_luma_as_pillow_computes_it():
    images = np.random.default_rng(9).integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)
    tokens = to_tokens(images, "gray")
    np.testing.assert_array_equal(tokens[1].reshape(6, 6), np.asarray(Image.fromarray(images[1]).convert("L")))
    greys = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1).reshape(1, 16, 16, 3)
    np.testing.assert_array_equal(to_images(to_tokens(greys, "gray"), 16, 16, GRAYS), greys)


def test_units_of_entropy_and_psnr():
    assert unigram_entropy(np.array([4, 4, 0, 8])) == pytest.approx(1.5 * np.log(2))
    assert psnr_db(3 * 255.0**2) == pytest.approx(0.0) and psnr_db(0.0) is None
