"""The start of a palette against scikit-learn's k-means, which started it before: the very same bits."""

import warnings

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from pixseq.numerics import weighted_kmeans as module
from pixseq.numerics.weighted_kmeans import weighted_kmeans

GREYS = np.repeat(np.arange(256.0)[:, None], 3, axis=1)  # many points lie between two centres exactly


def clumps(rng):
    """So that clusters lose all their points, and some never had two different ones."""
    return np.concatenate([rng.normal(m, 0.01, (40, 3)) for m in (0, 100, 255)] + [np.full((300, 3), 5.0)])


def points(name):
    rng = np.random.default_rng(0)
    made = {"greys": GREYS, "colours": rng.integers(0, 256, (3000, 3)) * 1.0, "clumps": clumps(rng)}[name]
    return made, rng.integers(1, 1000, len(made)) * 1.0


@pytest.mark.parametrize(
    "name, clusters", [("greys", 7), ("greys", 100), ("colours", 1), ("colours", 300), ("clumps", 64)]
)
@pytest.mark.parametrize("cores", [1, 3])
def test_centres_are_those_of_scikit_learn_bit_for_bit(monkeypatch, name, clusters, cores):
    from sklearn.cluster import KMeans

    monkeypatch.setattr(module, "usable_cores", lambda: cores)
    made, weights = points(name)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = KMeans(clusters, n_init=1, random_state=3).fit(made, sample_weight=weights)
        ours = weighted_kmeans(made, weights, clusters, 3)
    np.testing.assert_array_equal(ours, theirs.cluster_centers_)
