"""The order of images and their augmentation depend on seed and step alone."""

import numpy as np

from pixseq.engine.batches import augment, batch_indices
from pixseq.numerics.parts import hold_out, split_validation
from pixseq.streams import Stream


def test_an_epoch_visits_every_image_once_even_across_batches():
    rows = np.concatenate([batch_indices(3, step, 7, 20) for step in range(20)])
    for epoch in range(7):
        assert sorted(rows[epoch * 20 : (epoch + 1) * 20]) == list(range(20))
    assert not np.array_equal(rows[:20], rows[20:40])


def test_order_is_a_function_of_seed_and_step():
    assert np.array_equal(batch_indices(1, 5, 8, 100), batch_indices(1, 5, 8, 100))
    assert not np.array_equal(batch_indices(1, 5, 8, 100), batch_indices(2, 5, 8, 100))
    assert len(batch_indices(0, 3, 50, 20)) == 50  # a batch larger than the data


def test_flip_mirrors_rows_of_pixels_and_keeps_channels_together():
    tokens = np.arange(6 * 4 * 5 * 3, dtype=np.uint16).reshape(6, -1)
    moved = augment(tokens, (4, 5, 3), "flip", 0, 0).reshape(6, 4, 5, 3)
    plain = tokens.reshape(6, 4, 5, 3)
    mirrored = [np.array_equal(m, p[:, ::-1]) for m, p in zip(moved, plain)]
    kept = [np.array_equal(m, p) for m, p in zip(moved, plain)]
    assert all(a or b for a, b in zip(mirrored, kept)) and any(mirrored) and any(kept)


def test_crop_flip_crops_the_reflected_padding():
    side = 8
    tokens = np.arange(200 * side * side, dtype=np.uint16).reshape(200, -1)
    moved = augment(tokens, (side, side, 1), "crop-flip", 0, 0).reshape(200, side, side)
    seen = set()
    for before, after in zip(tokens.reshape(200, side, side), moved):
        padded = np.pad(before, 4, mode="reflect")
        found = [
            (dy, dx, flip)
            for dy in range(9)
            for dx in range(9)
            for flip in (1, -1)
            if np.array_equal(padded[dy : dy + side, dx : dx + side][:, ::flip], after)
        ]
        assert found
        seen.add(found[0])
    assert len(seen) > 60


def test_no_augmentation_is_the_identity_and_steps_differ():
    tokens = np.arange(8 * 16, dtype=np.uint16).reshape(8, 16)
    assert augment(tokens, (4, 4, 1), "none", 0, 0) is tokens
    assert not np.array_equal(augment(tokens, (4, 4, 1), "flip", 0, 0), augment(tokens, (4, 4, 1), "flip", 0, 1))


def test_validation_split_is_a_partition():
    train, val = split_validation(50, 0.1, 4)
    assert len(val) == 5 and sorted([*train, *val]) == list(range(50))
    assert [len(part) for part in split_validation(2, 0.01, 0)] == [1, 1]


def test_validation_has_its_share_of_every_class_and_whole_images():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    train, val = split_validation(100, 0.1, 4, None, labels)
    assert list(np.bincount(labels[val])) == [6, 3, 1] and sorted([*train, *val]) == list(range(100))
    np.testing.assert_array_equal(val, hold_out(100, 0.1, labels, 4))  # as encode draws it
    views = np.repeat(np.arange(100), 3)
    _, some = split_validation(300, 0.1, 4, views, labels.repeat(3))
    np.testing.assert_array_equal(some, np.flatnonzero(np.isin(views, val)))
    assert not np.array_equal(val, split_validation(100, 0.1, 5, None, labels)[1])


def test_validation_without_labels_is_drawn_as_it_always_was():
    drawn = np.random.default_rng([4, 0, Stream.VALIDATION_SPLIT]).permutation(50)
    np.testing.assert_array_equal(split_validation(50, 0.1, 4)[1], np.sort(drawn[:5]))
