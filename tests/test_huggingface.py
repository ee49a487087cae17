"""Hugging Face's ImageGPT in and out: the same numbers as transformers, and refusals by name."""

import json
import re
import shutil
import sys
import warnings

import numpy as np
import pytest
import torch
import yaml
from conftest import write_tokens
from hf_models import edit_config, make_hf
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTImageProcessorPil,
    ImageGPTModel,
)

from pixseq import progress
from pixseq.artifacts.arrays import open_store
from pixseq.artifacts.checkpoint import open_checkpoint
from pixseq.artifacts.palette import palette_id
from pixseq.config import FinetuneFile, PretrainFile, effective
from pixseq.engine.opening import open_model
from pixseq.errors import PixseqError, UsageError
from pixseq.models.sampling import sample
from pixseq.runtime import machine
from pixseq.stages import encode, evaluate, exporting, features, finetune, importing, pretrain
from pixseq.stages import sample as sampling


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """(transformers' model, its directory, the imported checkpoint): 5 heads, 49 positions."""
    folder = tmp_path_factory.mktemp("hf")
    model = make_hf(folder / "causal", ImageGPTForCausalImageModeling)
    importing.run("hf", folder / "causal", folder / "model")
    return model, folder / "causal", folder / "model"


@pytest.fixture
def copy(causal, tmp_path):
    shutil.copytree(causal[1], tmp_path / "hf")
    return tmp_path / "hf"


def ours(path):
    with machine("cpu", "fp32") as where:
        return open_model(path, where)[0]


def id_of(path):
    return open_checkpoint(path).manifest["id"]


def some_tokens(n=8, positions=49, seed=0):
    return torch.randint(512, (n, positions), generator=torch.Generator().manual_seed(seed))


def with_sos(tokens):
    return torch.cat([torch.full((len(tokens), 1), 512), tokens[:, :-1]], dim=1)


# --- parity


@torch.no_grad()
def test_logits_and_every_layers_features_equal_transformers(causal):
    theirs, _, path = causal
    x = some_tokens()
    mine = ours(path)(x, pooled=True)
    out = theirs(input_ids=with_sos(x), output_hidden_states=True)
    assert (mine.logits - out.logits).abs().max() < 1e-4 and out.logits.abs().max() > 1
    wanted = [theirs.transformer.h[i].ln_1(out.hidden_states[i]).mean(1) for i in range(3)]
    for layer, want in enumerate([*wanted, out.hidden_states[3].mean(1)]):
        assert (mine.features[layer] - want).abs().max() < 1e-4 * want.abs().max()


@torch.no_grad()
def test_greedy_completions_equal_transformers_token_for_token(causal):
    theirs, _, path = causal
    x = some_tokens(64)[:, :21]
    mine = sample(ours(path), x, torch.zeros(64, 28), temperature=0)
    prompt = torch.cat([torch.full((64, 1), 512), x], dim=1)
    want = theirs.generate(input_ids=prompt, max_length=50, do_sample=False)[:, 1:]
    assert torch.equal(mine, want)


@torch.no_grad()
def test_a_classifier_gives_transformers_answers(tmp_path):
    theirs = make_hf(tmp_path / "hf", ImageGPTForImageClassification, classes=4)
    importing.run("hf", tmp_path / "hf", tmp_path / "m")
    x = some_tokens()
    assert (ours(tmp_path / "m")(x).class_logits - theirs(input_ids=x).logits).abs().max() < 1e-4
    palette = open_checkpoint(tmp_path / "m").codec.palette_id
    store = write_tokens(tmp_path / "t.zarr", count=16, side=7, n_vocab=512, palette_id=palette, class_names=None)
    numbers = evaluate.run(tmp_path / "m", store, device="cpu")
    tokens = torch.from_numpy(open_store(store, "tokens").read("tokens", slice(None)).astype(np.int64))
    hits = theirs(input_ids=tokens).logits.argmax(1).numpy() == open_store(store, "tokens").labels()
    assert numbers["accuracy"] == hits.mean() and "nats_per_token" not in numbers


# --- forms of the directory


def test_shards_pickles_bare_and_half_precision_give_the_same_checkpoint(causal, copy, tmp_path):
    theirs, _, path = causal
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    theirs.save_pretrained(copy, max_shard_size="60KB")
    assert len(list(copy.glob("*.safetensors"))) > 2
    importing.run("hf", copy, tmp_path / "sharded")
    for file in copy.glob("model*"):
        file.unlink()
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 49, 49, dtype=torch.uint8) for i in range(3)}
    masks["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save({**weights, **masks}, copy / "pytorch_model.bin")
    edit_config(copy, architectures=["ImageGPTForCausalLM"], n_ctx=49, gradient_checkpointing=False)
    record = importing.run("hf", copy, tmp_path / "pickled")
    assert "4 attention masks" in record["summary"]["notes"][0]
    names = list(weights)
    torch.save({k: weights[k] for k in names[:9]}, copy / "pytorch_model-00001-of-00002.bin")
    torch.save({k: weights[k] for k in names[9:]}, copy / "pytorch_model-00002-of-00002.bin")
    (copy / "pytorch_model.bin").unlink()
    table = {k: f"pytorch_model-0000{1 + (i > 8)}-of-00002.bin" for i, k in enumerate(names)}
    (copy / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))
    importing.run("hf", copy, tmp_path / "pickled-shards")
    assert (
        id_of(path) == id_of(tmp_path / "sharded") == id_of(tmp_path / "pickled") == id_of(tmp_path / "pickled-shards")
    )

    half = {name: x.half() for name, x in weights.items()}
    save_file(half, copy / "model.safetensors")
    record = importing.run("hf", copy, tmp_path / "half")
    assert "float16" in record["summary"]["notes"][0]
    assert torch.equal(open_checkpoint(tmp_path / "half").weights()["wpe"], half["transformer.wpe.weight"].float())


def test_a_model_without_a_head_gives_features_and_no_loss(causal, tmp_path):
    make_hf(tmp_path / "hf", ImageGPTModel)
    importing.run("hf", tmp_path / "hf", tmp_path / "m")
    palette = open_checkpoint(tmp_path / "m").codec.palette_id
    store = write_tokens(tmp_path / "t.zarr", count=32, side=7, n_vocab=512, palette_id=palette)
    assert features.run(tmp_path / "m", store, tmp_path / "f.zarr", device="cpu")["summary"]["layers"] == 4
    with pytest.raises(PixseqError, match="no prediction head"):
        evaluate.run(tmp_path / "m", store, device="cpu")
    with pytest.raises(PixseqError, match="no prediction head"):
        sampling.run(tmp_path / "m", tmp_path / "s.png", device="cpu")
    recipe = ["finetune.steps=4", "finetune.batch_size=8"]
    finetune.run(tmp_path / "m", store, tmp_path / "c", effective(FinetuneFile, sets=recipe), device="cpu")
    assert "gen_loss" not in (tmp_path / "c" / "log.jsonl").read_text()
    assert "nats_per_token" not in evaluate.run(tmp_path / "c", store, device="cpu")


def test_class_names_and_a_palette_of_ones_own(copy, tmp_path):
    colors = np.random.default_rng(5).uniform(-1, 1, (512, 3))
    np.save(tmp_path / "centers.npy", colors)
    importing.run("hf", copy, tmp_path / "m", palette=tmp_path / "centers.npy")
    assert open_checkpoint(tmp_path / "m").codec.palette == colors.tolist()
    (copy / "preprocessor_config.json").unlink()
    record = importing.run("hf", copy, tmp_path / "bare")
    assert "no palette" in record["summary"]["notes"][0] and open_checkpoint(tmp_path / "bare").codec.palette is None
    make_hf(tmp_path / "clf", ImageGPTForImageClassification, classes=3)
    edit_config(tmp_path / "clf", id2label={"0": "ant", "1": "bee", "2": "cat"})
    importing.run("hf", tmp_path / "clf", tmp_path / "named")
    assert open_checkpoint(tmp_path / "named").codec.class_names == ["ant", "bee", "cat"]


# --- refusals


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "gpt2"}, "is a gpt2 model"),
        ({"activation_function": "gelu_new"}, "activation_function is 'gelu_new'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"n_inner": 128}, "n_inner is 128"),
        ({"n_head": 7}, "not a multiple of n_head 7"),
        ({"n_positions": 50}, "n_positions is 50"),
        ({"n_layer": 4}, "lacks the tensor transformer.h.3.ln_1.weight"),
        ({"n_layer": 10_000_000}, "lacks the tensor transformer.h.3.ln_1.weight"),  # at once, however many
        ({"n_layer": 2}, "Image GPT has not: transformer.h.2"),
        ({"vocab_size": 512}, r"wte.weight is \[513, 60\], its config.json promises \[512, 60\]"),
        ({"n_embd": "60"}, "n_embd is '60'"),
    ],
    ids=str,
)
def test_what_the_model_cannot_express_is_refused_by_name(copy, tmp_path, change, named):
    edit_config(copy, **change)
    with pytest.raises(PixseqError, match=named):
        importing.run("hf", copy, tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize(
    "name, value, named",
    [
        ("transformer.h.1.mlp.c_fc.bias", torch.full((240,), 1e-3), "h.1.mlp.c_fc.bias in .* is not zero"),
        ("transformer.h.0.crossattention.c_attn.bias", torch.zeros(3), "crossattention"),
        ("transformer.h.0.ln_1.bias", torch.zeros(60), "ln_1.bias"),
        ("transformer.wpe.weight", torch.full((49, 60), torch.nan), "wpe.weight in .* holds non-finite values"),
    ],
)
def test_tensors_that_do_not_belong_are_refused_by_name(copy, tmp_path, name, value, named):
    weights = load_file(copy / "model.safetensors")
    save_file({**weights, name: value}, copy / "model.safetensors")
    with pytest.raises(PixseqError, match=named):
        importing.run("hf", copy, tmp_path / "m")


def test_damaged_missing_and_foreign_files(copy, tmp_path):
    def refused(named, path=copy, **options):
        with pytest.raises(PixseqError, match=named):
            importing.run("hf", path, tmp_path / "m", **options)

    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    refused("not there", tmp_path / "nowhere")
    refused("no folder", weights)
    refused("has no config.json", tmp_path)
    weights.write_bytes(whole[:5000])
    refused("damaged or cut short")
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused("Git LFS pointer")
    weights.unlink()
    refused("no model.safetensors and no pytorch_model.bin")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1-of-2.safetensors"}}))
    refused("lacks the shard model-1-of-2.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../secrets"}}))
    refused("lies elsewhere")
    (copy / "model.safetensors.index.json").unlink()
    weights.write_bytes(whole)
    np.save(tmp_path / "short.npy", np.random.default_rng(0).uniform(-1, 1, (256, 3)))
    refused("has 256 colours, the model's vocabulary has 512", palette=tmp_path / "short.npy")
    (copy / "config.json").write_text('{"model_type": "image')
    refused("not readable as JSON")
    assert not list(tmp_path.glob("m*"))


class Code:
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return (exec, (f"open({str(self.flag)!r}, 'w')",))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_in_it_does_not_run(copy, tmp_path, zipped):
    (copy / "model.safetensors").unlink()
    torch.save(
        {"transformer.wte.weight": Code(tmp_path / "ran")},
        copy / "pytorch_model.bin",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(PixseqError, match="could run code"):
        importing.run("hf", copy, tmp_path / "m")
    assert not (tmp_path / "ran").exists()


# --- export


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{"ar", "clf", "bert", "rgb"}: paths of tiny models of our own, and "tokens"."""
    folder = tmp_path_factory.mktemp("trained")
    colors = np.random.default_rng(1).uniform(-1, 1, (16, 3))  # those of write_tokens
    tokens = {
        "palette": write_tokens(folder / "t.zarr", palette_id=palette_id(colors)),
        "rgb": write_tokens(folder / "r.zarr", scheme="rgb", n_vocab=256),
    }
    tiny = ("model.n_layer=2", "model.n_head=2", "model.d_model=16", "train.steps=8", "train.batch_size=8")
    for name, store, objective in (("ar", "palette", "ar"), ("bert", "palette", "bert"), ("rgb", "rgb", "ar")):
        config = effective(PretrainFile, sets=[*tiny, f"model.objective={objective}"])
        pretrain.run(tokens[store], folder / name, config, val_fraction=0.1, device="cpu")
    config = effective(FinetuneFile, sets=["finetune.steps=4", "finetune.batch_size=8"])
    finetune.run(folder / "ar", tokens["palette"], folder / "clf", config, device="cpu")
    return {"tokens": tokens["palette"], **{name: folder / name for name in ("ar", "clf", "bert", "rgb")}}


def load_quietly(kind, path, recwarn, capfd):
    """from_pretrained, which must say nothing."""
    capfd.readouterr()
    model, info = kind.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()) and not len(recwarn)
    assert capfd.readouterr() == ("", "")
    return model.eval()


@torch.no_grad()
def test_exported_models_open_in_transformers_and_come_back_bit_for_bit(trained, tmp_path, recwarn, capfd):
    exporting.run(trained["ar"], tmp_path / "x")
    theirs = load_quietly(ImageGPTForCausalImageModeling, tmp_path / "x", recwarn, capfd)
    x = torch.randint(16, (4, 36))
    logits = theirs(input_ids=torch.cat([torch.full((4, 1), 16), x[:, :-1]], dim=1)).logits
    assert (ours(trained["ar"])(x).logits - logits).abs().max() < 1e-4
    importing.run("hf", tmp_path / "x", tmp_path / "back")
    before, after = open_checkpoint(trained["ar"]), open_checkpoint(tmp_path / "back")
    assert all(torch.equal(value, after.weights()[name]) for name, value in before.weights().items())
    assert before.codec.palette == after.codec.palette and before.codec.class_names == after.codec.class_names


@torch.no_grad()
def test_a_classifier_is_exported_without_its_other_head(trained, tmp_path, recwarn, capfd):
    exporting.run(trained["clf"], tmp_path / "x", drop="head")
    theirs = load_quietly(ImageGPTForImageClassification, tmp_path / "x", recwarn, capfd)
    x = torch.randint(16, (4, 36))
    logits = theirs(input_ids=torch.cat([torch.full((4, 1), 16), x[:, :-1]], dim=1)).logits
    assert (ours(trained["clf"])(x).class_logits - logits).abs().max() < 1e-4
    assert theirs.config.id2label == dict(enumerate("abcd"))
    importing.run("hf", tmp_path / "x", tmp_path / "back")
    assert torch.equal(ours(tmp_path / "back")(x).class_logits, ours(trained["clf"])(x).class_logits)
    exporting.run(trained["clf"], tmp_path / "y", drop="classifier")
    load_quietly(ImageGPTForCausalImageModeling, tmp_path / "y", recwarn, capfd)


@torch.no_grad()
@pytest.mark.parametrize("name, drop", [("ar", None), ("clf", "head")])
def test_a_model_without_palette_is_exported_without_processor(trained, tmp_path, recwarn, capfd, name, drop):
    shutil.copytree(trained[name], tmp_path / "m")
    codec = json.loads((tmp_path / "m" / "codec.json").read_text())
    (tmp_path / "m" / "codec.json").write_text(json.dumps({**codec, "palette": None, "palette_id": None}))
    progress.enable()
    try:
        record = exporting.run(tmp_path / "m", tmp_path / "x", drop=drop)
    finally:
        progress.enable(False)
    assert "no image processor" in record["notes"][0] and "no image processor" in capfd.readouterr().err
    assert not (tmp_path / "x" / "preprocessor_config.json").exists()
    card = (tmp_path / "x" / "README.md").read_text()
    assert "so no image processor" in card and "ImageGPTImageProcessor" not in card and "clusters" not in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(compile(code.replace("'x'", repr(str(tmp_path / "x"))), "card", "exec"), {})
    importing.run("hf", tmp_path / "x", tmp_path / "back")
    x = torch.randint(16, (4, 36))
    a, b = (ours(path)(x) for path in (trained[name], tmp_path / "back"))
    assert torch.equal(a.class_logits, b.class_logits) if drop else torch.equal(a.logits, b.logits)
    exporting.run(tmp_path / "m", tmp_path / "x", drop=drop, overwrite=True)


def test_the_processor_gives_the_tokens_of_squash(causal, tmp_path):
    exporting.run(causal[2], tmp_path / "x")
    rng, pictures = np.random.default_rng(0), []
    for i in range(12):  # smooth and noisy, wide and tall
        h, w = rng.integers(20, 90, 2)
        ramp = np.linspace(0, 255, h)[:, None, None] * rng.random(3) + np.linspace(0, 90, w)[None, :, None]
        pixels = np.clip(ramp + rng.normal(0, 20, (h, w, 3)), 0, 255).astype(np.uint8)
        pictures.append(Image.fromarray(pixels))
        (tmp_path / "pictures").mkdir(exist_ok=True)
        pictures[-1].save(tmp_path / "pictures" / f"{i:02}.png")
    processor = ImageGPTImageProcessorPil.from_pretrained(tmp_path / "x")
    theirs = np.concatenate([np.asarray(processor(images=picture)["input_ids"]) for picture in pictures])
    encode.run(tmp_path / "pictures", tmp_path / "t.zarr", tmp_path / "x", size=7, resize="squash")
    assert np.array_equal(open_store(tmp_path / "t.zarr", "tokens").read("tokens", slice(None)), theirs)


def test_the_model_card_says_what_it_is_and_its_code_runs(trained, causal, tmp_path, monkeypatch):
    numbers = tmp_path / "eval.json"
    evaluate.run(trained["ar"], trained["tokens"], numbers, device="cpu")
    make_hf(tmp_path / "plain", ImageGPTForImageClassification, n_vocab=16)
    importing.run("hf", tmp_path / "plain", tmp_path / "plain-model")
    make_hf(tmp_path / "bare", ImageGPTModel)
    importing.run("hf", tmp_path / "bare", tmp_path / "bare-model")
    exporting.run(trained["ar"], tmp_path / "generative", metrics=[numbers])
    exporting.run(trained["clf"], tmp_path / "classifier", drop="head")
    exporting.run(tmp_path / "plain-model", tmp_path / "plain-classifier")
    exporting.run(tmp_path / "bare-model", tmp_path / "features")
    monkeypatch.chdir(tmp_path)
    for name in ("generative", "classifier", "plain-classifier", "features"):
        card = (tmp_path / name / "README.md").read_text()
        header = yaml.safe_load(card.split("---")[1])
        assert header["library_name"] == "transformers" and f"# {name}" in card
        for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
            space = {}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile(code, name, "exec"), space)
        if name == "generative":
            assert space["pictures"].shape == (4, 6, 6, 3) and 0 < space["nats"] < 4
            rows = header["model-index"][0]["results"]
            assert {row["metrics"][0]["type"] for row in rows} == {"nats_per_token", "bits_per_pixel"}
            assert "batch_size: 8" in card and "[16, x_1 .. x_35]" in card
    with pytest.raises(PixseqError, match="was measured on the model"):
        exporting.run(trained["clf"], tmp_path / "z", drop="head", metrics=[numbers])


@pytest.mark.parametrize(
    "name, options, named",
    [
        ("bert", {}, "always masks causally"),
        ("rgb", {}, "rgb tokens"),
        ("clf", {}, "no class of transformers carries both"),
        ("ar", {"drop": "head"}, "does not have both"),
        ("ar", {"weights": "ema"}, "has no weights 'ema'"),
    ],
)
def test_what_the_format_cannot_carry_is_refused(trained, tmp_path, name, options, named):
    with pytest.raises(PixseqError, match=named):
        exporting.run(trained[name], tmp_path / "x", **options)
    assert not list(tmp_path.iterdir())


def test_overwrite_replaces_exports_and_nothing_else(trained, tmp_path):
    exporting.run(trained["ar"], tmp_path / "x")
    with pytest.raises(PixseqError, match="already exists"):
        exporting.run(trained["ar"], tmp_path / "x")
    exporting.run(trained["ar"], tmp_path / "x", overwrite=True)
    with pytest.raises(UsageError, match="what this command reads, and would be replaced"):
        exporting.run(trained["ar"], trained["ar"], overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(PixseqError, match="pixseq did not make"):
        exporting.run(trained["ar"], tmp_path / "mine", overwrite=True)


def test_neither_import_nor_export_needs_transformers(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    exporting.run(trained["ar"], tmp_path / "x")
    importing.run("hf", tmp_path / "x", tmp_path / "m")
    assert id_of(tmp_path / "m") == id_of(trained["ar"])
