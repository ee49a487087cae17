"""Whole batches are augmented as Pillow and a loop over pixels would one by one, and the same way every time."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image

from pixseq.engine.augment import LUMA, augment_pixels, crop, crop_boxes, jitter_factors, move_colours

JITTER = (0.4, 0.4, 0.2, 0.1)


def pictures(count=6, height=32, width=32, seed=0):
    """Noise of full contrast: what filters and roundings differ on most."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def test_a_batch_is_a_function_of_seed_and_step():
    x = pictures()
    before = x.clone()
    first = augment_pixels(x, 0.4, True, JITTER, 3, 7)
    augment_pixels(x, 0.4, True, JITTER, 3, 8)
    np.random.default_rng(0).random(10)
    torch.manual_seed(1)
    assert torch.equal(first, augment_pixels(x, 0.4, True, JITTER, 3, 7)) and torch.equal(x, before)
    assert first.dtype == torch.uint8 and first.shape == x.shape and first.is_contiguous()
    for seed, step in ((3, 8), (4, 7)):
        assert not torch.equal(first, augment_pixels(x, 0.4, True, JITTER, seed, step))


def test_nothing_asked_for_changes_nothing():
    x = pictures()
    assert torch.equal(augment_pixels(x, 1.0, False, None, 0, 0), x)
    assert torch.equal(augment_pixels(x, 1.0, False, (0.0, 0.0, 0.0, 0.0), 0, 0), x)


def test_half_of_the_images_are_mirrored_whatever_else_is_done():
    x = pictures(4000, 4, 4)
    mirrored = (augment_pixels(x, 1.0, True, None, 0, 5) == x.flip(2)).flatten(1).all(1)
    assert torch.equal(augment_pixels(x, 1.0, True, None, 0, 5)[~mirrored], x[~mirrored])
    assert 0.47 < mirrored.float().mean() < 0.53
    cropped = augment_pixels(x, 0.4, False, None, 0, 5)
    both = torch.where(mirrored[:, None, None, None], cropped.flip(2), cropped)
    assert torch.equal(augment_pixels(x, 0.4, True, None, 0, 5), both)


@pytest.mark.parametrize("height, width", [(32, 32), (16, 24), (7, 5)])
def test_crops_are_pillows(height, width):
    x = pictures(200, height, width)
    boxes = crop_boxes(np.random.default_rng(0), 200, height, width, 0.08)
    boxes[:, 0] = (0, 0, width, height)
    ours = crop(x, boxes).numpy().astype(int)
    for picture, (left, top, w, h), mine in zip(x.numpy(), boxes.T.tolist(), ours):
        box = (left, top, left + w, top + h)
        theirs = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC, box), int)
        assert abs(mine - theirs).max() <= 1
    assert np.array_equal(ours[0], x[0])


def test_a_crop_of_one_colour_has_that_colour():
    for side in (1, 2, 4):
        x = torch.full((300, side, side, 3), 77, dtype=torch.uint8)
        assert torch.equal(augment_pixels(x, 0.05, True, None, 0, 0), x)
        assert augment_pixels(pictures(50, side, side), 0.05, True, JITTER, 0, 0).shape == (50, side, side, 3)


@pytest.mark.parametrize("height, width, least", [(64, 64, 0.4), (32, 20, 0.9), (64, 8, 0.5), (8, 64, 0.5)])
def test_boxes_are_drawn_as_by_a_loop(height, width, least):
    boxes = crop_boxes(np.random.default_rng(1), 500, height, width, least)
    rng = np.random.default_rng(1)
    areas, log_ratios = rng.uniform(least, 1, (10, 500)), rng.uniform(np.log(3 / 4), np.log(4 / 3), (10, 500))
    places = rng.random((2, 500))
    for i, (left, top, w, h) in enumerate(boxes.T.tolist()):
        for area, ratio in zip(areas[:, i] * height * width, np.exp(log_ratios[:, i])):
            across, down = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if 0 < across <= width and 0 < down <= height:
                corner = (int(places[0, i] * (width - across + 1)), int(places[1, i] * (height - down + 1)))
                break
        else:
            across, down = min(width, round(height * 4 / 3)), min(height, round(width / (3 / 4)))
            corner = ((width - across) // 2, (height - down) // 2)
        assert (left, top, w, h) == (*corner, across, down)


def test_crops_lie_anywhere_and_have_the_areas_and_ratios_asked_for():
    left, top, w, h = crop_boxes(np.random.default_rng(1), 4000, 64, 64, 0.4)
    assert (left + w).max() == (top + h).max() == 64 and left.min() == top.min() == 0
    area, ratio = w * h / 64**2, w / h
    assert area.min() > 0.38 and area.max() == 1
    assert area[area < 0.7].mean() == pytest.approx(0.55, abs=0.01)  # larger ones fit in some of the ratios only
    assert 0.7 < ratio.min() < 0.8 < 1.25 < ratio.max() < 1.42


def test_four_fifths_of_the_images_have_other_colours():
    factors = jitter_factors(np.random.default_rng(0), 4000, (0.4, 1.5, 0.2, 0.1))
    kept = (np.stack(factors) == [[1], [1], [1], [0]]).all(axis=0)
    assert 0.18 < kept.mean() < 0.22
    for factor, (low, high) in zip(factors, ((0.6, 1.4), (0.0, 2.5), (0.8, 1.2), (-0.1, 0.1))):
        spread = high - low
        assert low <= factor.min() < low + 0.01 * spread and high - 0.01 * spread < factor.max() <= high
        assert not (factor[~kept] == np.median(factor[kept])).any()


def slowly(picture, brightness, contrast, saturation, turn):
    """move_colours of one picture, float64 in [0, 1], pixel by pixel."""
    x = np.clip(picture * brightness, 0, 1)
    x = np.clip(contrast * x + (1 - contrast) * (x @ LUMA).mean(), 0, 1)
    x = np.clip(saturation * x + (1 - saturation) * (x @ LUMA)[..., None], 0, 1)
    for pixel in x.reshape(-1, 3):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        pixel[:] = colorsys.hsv_to_rgb((h + turn) % 1, s, v)
    return x


def test_colours_move_as_pixel_by_pixel():
    x = pictures(40, 8, 6)
    x[0] = 0
    x[1] = 255
    x[2] = x[2, :, :, :1]  # grey
    for jitter in (JITTER, (1.0, 1.0, 1.0, 0.5), (0.5, 0.5, 2.0, 0.0)):
        factors = jitter_factors(np.random.default_rng(2), 40, jitter)
        ours = move_colours(x, factors).numpy()
        for before, after, *factor in zip(x.numpy(), ours, *factors):
            assert abs(after - 255 * slowly(before / 255, *factor)).max() <= 0.51
            if factor == [1, 1, 1, 0]:
                assert np.array_equal(after, before)


def test_all_is_computed_where_the_images_are():
    x = torch.empty(5, 8, 8, 3, dtype=torch.uint8, device="meta")
    out = augment_pixels(x, 0.4, True, JITTER, 0, 0)
    assert out.device == x.device and out.shape == x.shape and out.dtype == torch.uint8
