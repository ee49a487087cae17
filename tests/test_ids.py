"""The ids of artifacts are promises: those that hold no computed fraction are the same on every machine, for ever."""

import pytest
import torch
from ids import COMPUTED, STORED, found, make

LITERAL = {
    "palette.json": "sha256:ce0a331eb909d5896bc5b52a7630e8cbf51ff391794e4d47b991c7c143881ecb",
    "train.zarr": "sha256:4c17e5dcb42d6c7a9290ebe4502ab9e993f57220fa001345955fcf89512d3bbd",
    "test.zarr": "sha256:776c5d38730ce9747d839fcc44e203e7ee43aa8df67a3bde29f4d8e5b730f8d9",
    "views.zarr": "sha256:05822cd1fe75dd76a098224efc37bc341aba3b345deb06d786659283d492feea",
    "rgb.zarr": "sha256:ee80e121e719e925a1b425e0192e90eec00ada9d37502238e7f2f613831af1fe",
    "gray.zarr": "sha256:2f178a47a97e481213c1b7cb8261d231234b0b8231728092c34a6d3bca1653d3",
    "pixels.zarr": "sha256:2a6a8d84ed7ce2e73f6371de9cc52aa23e3a74cf0c8db8893c844197b1d80838",
    "whole.zarr": "sha256:f94060519196cf211808bb0e867e887c00e57073e9e6c65f112ec605b9206340",
}
TWICE = ("ar", "aim", "train.features.zarr", "test.features.zarr", "probe.json")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ids")
    for name, command in STORED.items():
        make(folder, name, command)
    return folder


def test_palettes_tokens_and_pixels_keep_their_ids(stored):
    assert {name: id for name, id in found(stored).items() if name in STORED} == LITERAL


def test_the_same_commands_give_the_same_ids_and_logs(stored):
    """Of models and what they compute, which differ from machine to machine."""
    threads, made = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for again in (False, True):
            for name in TWICE:
                make(stored, name, COMPUTED[name] + " --overwrite" * again)
            made.append(found(stored))
    finally:
        torch.set_num_threads(threads)
    assert made[0] == made[1] and made[0].keys() >= {*TWICE, "ar/log.jsonl", "aim/log.jsonl"}
