"""One counting of FLOPs wherever none is named, and its name beside every figure."""

import re

import pytest

from pixseq.config import PretrainFile, as_dict, effective, preset_names, read_preset
from pixseq.models.family import SHAPES
from pixseq.models.flops import COUNTING, COUNTINGS
from pixseq.numerics.orders import RASTER

# side, colours
PICTURES = {"igpt-digits": (12, 16), "igpt-cifar16": (16, 512), "igpt-xl": (64, 512), "aim-64": (64, 0)}


@pytest.mark.parametrize("name", preset_names())
def test_a_presets_cost_is_what_its_recipe_takes_by_the_default_counting(name):
    stated = re.search(r"([\d.e+]+) training FLOPs \((\S+?)\)", read_preset(name)["about"]["cost"])
    assert stated.group(2) == COUNTING
    side, colours = PICTURES.get(name, (224, 0) if re.fullmatch(r"aim-.*b", name) else (32, 512))
    recipe = effective(PretrainFile, name)
    shape = SHAPES[recipe.model.family].of(as_dict(recipe.model), (side, side, 1), colours, RASTER)
    flops = recipe.train.steps * recipe.train.batch_size * shape.n_ctx * shape.flops_per_token()
    assert float(stated.group(1)) == pytest.approx(flops, rel=0.05)


@pytest.mark.parametrize("name", ["igpt-s", "aim-64"])
def test_the_default_is_exact(name):
    recipe = effective(PretrainFile, name)
    shape = SHAPES[recipe.model.family].of(as_dict(recipe.model), (32, 32, 1), 512, RASTER)
    assert COUNTING == "exact" and COUNTINGS == ("exact", "exact-causal", "6nd")
    assert shape.flops_per_token() == shape.flops_per_token("exact")
