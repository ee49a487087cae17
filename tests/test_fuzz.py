"""Whatever is changed in an artifact or a source, its readers answer with an error for users or with what it holds."""

import warnings

import pytest
from fuzz import KINDS, fuzz


@pytest.mark.parametrize("name", KINDS)
def test_no_mutation_is_met_by_a_bug(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, about damage that they read all the same
        found = fuzz(name, 200)
    assert not found, "\n\n".join(f"{done}\n{trace}" for done, trace in found[:3])
