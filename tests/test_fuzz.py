"""Whatever is changed in an artifact or a source, its readers answer with an error for users or with what it holds."""

import warnings

import pytest
from fuzz import KINDS, fuzz

FEW = {"interrupted": 20, "plan": 40, "cell": 40}  # what takes its time


@pytest.mark.parametrize("name", KINDS)
def test_no_mutation_is_met_by_a_bug(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, about damage that they read all the same
        found = fuzz(name, FEW.get(name, 200), share=0.01)
    assert not found, "\n\n".join(f"{done}\n{trace}" for done, trace in found[:3])
