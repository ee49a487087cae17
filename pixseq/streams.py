"""Every random stream of the house: one number a purpose, so that one seed never gives two purposes the same numbers.

A generator is seeded by the run's seed, a Stream, and what tells its draws apart (a step, an image, a trial).
`numpy.random.default_rng` takes them as a list, `runtime.generator` as arguments.

Where the stream stands after another number, none ever meets another. The streams from 21 to 42 of numpy stand right
after the seed, where BATCH_ORDER has its epoch (a trailing 0 adds nothing), and stay there, so that published probes
repeat: what they draw is of other things than the order of an epoch of that number. New streams go last.
"""

from __future__ import annotations

from enum import IntEnum, unique


@unique
class Stream(IntEnum):
    """A number is never given again, or what was drawn from it would no longer repeat."""

    # training
    BATCH_ORDER = 0
    TOKEN_AUGMENTATION = 1
    VALIDATION_SPLIT = 2
    CROP = 3
    FLIP = 4
    JITTER = 5
    SEQUENCE_ORDER = 6  # of the order "random"
    PATCH_CODES = 7
    MODEL_INIT = 10
    TRAINING_MASK = 11
    VALIDATION_MASK = 12
    CLASS_HEAD = 24
    LOW_RANK = 25
    # encode and decode
    HELD_OUT = 61
    VIEWS = 8
    SHOWN_ROWS = 9
    DIGIT_PLACES = 62  # of the source digits-placed
    # features, evaluate, sample, check
    FEATURES_MASK = 13
    RANDOM_MODEL = 14
    EVALUATION_MASK = 15
    EVALUATION_TIE = 16
    SAMPLE = 17
    CHECK_IMAGES = 18
    CHECK_PROBE = 19
    CHECK_HEAD = 20
    # probes
    PROBE_SPLIT = 21
    PROBE_TIE = 22
    PROBE_SUBSET = 23
    CURVATURE_SKETCH = 26  # of the logistic solver
    ATTENTIVE_INIT = 31
    ATTENTIVE_ORDER = 32
    # scaling studies and distances
    BOOTSTRAP = 33
    FRECHET_FLOOR = 41
    FRECHET_KID = 42
    STUDY_PICTURES = 51  # that are completed, and compared with
    # what bench times
    BENCH_PICTURES = 71
    BENCH_TOKENS = 72
    BENCH_FEATURES = 73
    BENCH_PALETTE = 74
    BENCH_SIDES = 75
