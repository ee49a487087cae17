"""Certificates: a sound checkpoint passes, and every planted fault is caught by the line that is about it."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_tokens
from safetensors.torch import load_file, save_file

from pixseq.artifacts.palette import palette_id
from pixseq.errors import PixseqError
from pixseq.models import igpt, sampling
from pixseq.models.attention import split_heads
from pixseq.stages import check


def failing(path, tokens=None):
    result = check.run(path, tokens, device="cpu")
    assert result["ok"] == all(c["ok"] for c in result["checks"])
    return {c["name"] for c in result["checks"] if not c["ok"]}


@pytest.fixture
def sound(tmp_path):
    """A checkpoint whose palette id is that of its colours, and tokens that go with it."""
    from pixseq.config import PretrainFile, effective
    from pixseq.stages import pretrain

    colors = np.random.default_rng(1).uniform(-1, 1, (16, 3))
    store = write_tokens(tmp_path / "t.zarr", palette_id=palette_id(colors))
    tiny = ("model.n_layer=2", "model.n_head=2", "model.d_model=16", "train.steps=4", "train.batch_size=8")
    pretrain.run(store, tmp_path / "m", effective(PretrainFile, sets=tiny), device="cpu")
    return tmp_path / "m", store


def test_sound_checkpoints_pass(sound, checkpoints):
    model, tokens = sound
    names = [c["name"] for c in check.run(model, tokens, device="cpu")["checks"]]
    assert not failing(model) and not failing(model, tokens)
    assert names == [
        *("content id", "finite weights", "parameters", "palette", "palette self-check", "pairing"),
        *("causality", "cache", "loss"),
    ]
    assert failing(checkpoints["bert"]) == {"palette"}  # the fixture's palette id is made up


def test_the_quick_path_is_certified_as_closely_as_it_rounds(sound, aim, pixels):
    for model, images in (sound, (aim["prefix"], pixels)):
        result = check.run(model, images, device="cpu", precision="bf16")
        assert result["ok"] and result["precision"] == "bf16"
    paired = next(each for each in result["checks"] if each["name"] == "pairing")
    assert re.fullmatch(r"\d+x\d+", paired["figure"])  # pixels have no palette to name


def test_a_mask_off_by_one_is_caught(sound, monkeypatch):
    def leaky(self, qkv):
        t = qkv.shape[1]
        sees = torch.ones(t, t, dtype=torch.bool).tril(1)
        return F.scaled_dot_product_attention(*split_heads(qkv, self.n_head), attn_mask=sees).transpose(1, 2).flatten(2)

    monkeypatch.setattr(igpt.Attention, "attend", leaky)
    assert "causality" in failing(sound[0]) and "causality" in failing(*sound)


@pytest.mark.parametrize("objective", ["ar", "bert"])
@pytest.mark.parametrize("side, n_vocab, said", [(1, 16, "a single pixel"), (3, 1, "a single colour")])
def test_where_nothing_can_be_tested_that_is_said_and_no_fault(tmp_path, objective, side, n_vocab, said):
    from pixseq.config import PretrainFile, effective
    from pixseq.stages import pretrain

    colors = np.random.default_rng(1).uniform(-1, 1, (n_vocab, 3))
    t = write_tokens(tmp_path / "t.zarr", side=side, n_vocab=n_vocab, palette_id=palette_id(colors))
    tiny = ("model.n_layer=1", "model.n_head=2", "model.d_model=16", "train.steps=2", "train.batch_size=8")
    config = effective(PretrainFile, sets=[*tiny, f"model.objective={objective}"])
    pretrain.run(t, tmp_path / "m", config, device="cpu")
    checks = {c["name"]: c for c in check.run(tmp_path / "m", t, device="cpu")["checks"]}
    about = checks["causality" if objective == "ar" else "attention sees all"]
    assert said in about["about"] and about["ok"] and not failing(tmp_path / "m", t)


def test_a_single_pixel_that_is_seen_too_early_is_caught(tmp_path, monkeypatch):
    from pixseq.config import PretrainFile, effective
    from pixseq.stages import pretrain

    t = write_tokens(tmp_path / "t.zarr", side=1)
    tiny = ("model.n_layer=1", "model.n_head=2", "model.d_model=16", "train.steps=2", "train.batch_size=8")
    pretrain.run(t, tmp_path / "m", effective(PretrainFile, sets=tiny), device="cpu")
    plain = lambda self, x, masked=None: F.embedding(x, self.wte) + self.wpe[: x.shape[1]]  # noqa: E731
    monkeypatch.setattr(igpt.ImageGPT, "embed", plain)
    assert "causality" in failing(tmp_path / "m")


def test_a_bert_model_that_masks_causally_is_caught(checkpoints, monkeypatch):
    def causal(self, qkv):
        return F.scaled_dot_product_attention(*split_heads(qkv, self.n_head), is_causal=True).transpose(1, 2).flatten(2)

    assert "attention sees all" not in failing(checkpoints["bert"])
    monkeypatch.setattr(igpt.Attention, "attend", causal)
    assert "attention sees all" in failing(checkpoints["bert"])


def test_a_bert_model_that_sees_hidden_pixels_is_caught(checkpoints, monkeypatch):
    monkeypatch.setattr(igpt.ImageGPT, "embed", lambda self, x, masked=None: F.embedding(x, self.wte) + self.wpe)
    assert "hidden pixels unseen" in failing(checkpoints["bert"])


def test_a_cache_one_position_late_is_caught(sound, monkeypatch):
    real = sampling.Decoder.step
    late = lambda self, token, position: real(self, token, max(position - 1, 1))  # noqa: E731
    monkeypatch.setattr(sampling.Decoder, "step", late)
    assert failing(sound[0]) == {"cache"}


def test_a_cache_that_gives_no_numbers_is_caught(sound, monkeypatch):
    real = sampling.Decoder.step
    once = lambda self, token, position: real(self, token, position) * (torch.nan if position == 3 else 1)  # noqa: E731
    monkeypatch.setattr(sampling.Decoder, "step", once)
    assert failing(sound[0]) == {"cache"}


def test_a_leak_that_gives_no_numbers_is_caught(sound, monkeypatch):
    real, last = igpt.ImageGPT.embed, []

    def embed(self, x, masked=None):
        last.append(int(x[0, -1]))  # a pixel that nothing may depend on
        return real(self, x, masked) * (1 if last[-1] == last[0] else torch.nan)

    monkeypatch.setattr(igpt.ImageGPT, "embed", embed)
    assert "causality" in failing(sound[0])


def test_an_input_that_is_not_shifted_is_caught(sound, monkeypatch):
    plain = lambda self, x, masked=None: F.embedding(x, self.wte) + self.wpe[: x.shape[1]]  # noqa: E731
    monkeypatch.setattr(igpt.ImageGPT, "embed", plain)
    assert {"causality", "loss"} <= failing(sound[0])


def test_changed_files_are_caught(sound):
    model, tokens = sound
    weights = load_file(model / "model.safetensors")
    save_file({**weights, "wpe": weights["wpe"] * torch.inf}, model / "model.safetensors")
    assert {"content id", "finite weights"} <= failing(model)
    save_file(weights, model / "model.safetensors")
    codec = json.loads((model / "codec.json").read_text())
    codec["palette"].reverse()
    (model / "codec.json").write_text(json.dumps(codec))
    assert failing(model, tokens) == {"content id", "palette"}


@pytest.mark.parametrize("colors", ["x", [], [[1, 2]], [[0, 0, "red"]], [[0, 0, 7]]], ids=str)
def test_a_palette_that_holds_no_colours_is_damage_and_no_bug(sound, colors):
    model, _ = sound
    codec = json.loads((model / "codec.json").read_text())
    (model / "codec.json").write_text(json.dumps({**codec, "palette": colors}))
    with pytest.raises(PixseqError, match=r"codec\.json cannot be read: its palette"):
        check.run(model, device="cpu")


@pytest.mark.parametrize("content", ["[1]", "{}", "[" * 100000], ids=["a list", "no keys", "deep"])
def test_a_codec_that_says_nothing_is_damage(sound, content):
    (sound[0] / "codec.json").write_text(content)
    with pytest.raises(PixseqError, match=r"codec\.json (cannot be read|is not readable|holds a list)"):
        check.run(sound[0], device="cpu")


def test_a_table_that_finds_another_colour_fails_the_self_check(sound, monkeypatch):
    real = check.nearest_table
    monkeypatch.setattr(check, "nearest_table", lambda colors: real(colors[::-1]))
    assert failing(sound[0]) == {"palette self-check"}


def test_tokens_of_another_palette_fail_the_pairing(sound, tmp_path):
    other = write_tokens(tmp_path / "o.zarr", palette_id="sha256:other")
    assert failing(sound[0], other) == {"pairing"}
