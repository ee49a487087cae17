"""OpenAI's checkpoints: the bundle reader against a writer of its own, the mapping against OpenAI's graph."""

import numpy as np
import pytest
import torch
from bundle_writer import Raw, field, table, write_bundle
from openai_graph import run, variables

from pixseq.errors import PixseqError
from pixseq.interop.bundle import open_bundle
from pixseq.interop.openai import read_openai
from pixseq.models.igpt import IgptShape, ImageGPT

SLOTS = ("Adam", "Adam_1", "adam_m", "adam_v", "AdamWeightDecayOptimizer", "AdamWeightDecayOptimizer_1")


def with_slots(arrays: dict) -> dict:
    """What a training run leaves beside the weights; the slots hold NaN, for nobody may read them."""
    slots = {f"{name}/{slot}": np.full(arrays[name].shape, np.nan, np.float32) for name in arrays for slot in SLOTS}
    rest = {"beta1_power": np.float32(0.5), "beta2_power": np.float32(0.5), "_step": np.int64(7)}
    return {**arrays, **slots, **{k: np.asarray(v) for k, v in rest.items()}, "global_step": np.asarray(1000000)}


def refused(call, *words: str) -> None:
    with pytest.raises(PixseqError) as caught:
        call()
    for word in words:
        assert word in caught.value.message


# ------------------------------------------------------------------------------------------------------ the bundle


def mixed() -> dict:
    rng = np.random.default_rng(0)
    kinds = ("f4", "f8", "i4", "u1", "i2", "i1", "i8", "u2", "f2", "u4")
    found = {f"a/long/scope/{kind}/{n}": rng.normal(0, 50, (n, 3)).astype(kind) for kind in kinds for n in range(5)}
    return {**found, "scalar": np.asarray(3, np.int64), "b": rng.random((2, 1, 4)) < 0.5, "ü": np.ones(3, np.float32)}


@pytest.mark.parametrize("shards", [1, 5, 32])
def test_a_bundle_comes_back_whole(tmp_path, shards):
    arrays = mixed()
    bundle = open_bundle(write_bundle(tmp_path / "model.ckpt-10", arrays, shards))
    assert list(bundle.entries) == sorted(arrays)
    for name, array in arrays.items():
        entry, found = bundle.entries[name], bundle.read(name)
        assert entry.shape == found.shape == array.shape
        assert found.dtype == (np.float32 if array.dtype == np.float16 else array.dtype)
        assert found.flags.writeable
        np.testing.assert_array_equal(found, array.astype(found.dtype))


def test_bfloat16_becomes_float32(tmp_path):
    exact = np.array([[1.0, -2.5], [0.0, 3e38]], np.float32)
    upper = (exact.view(np.uint32) >> 16).astype("<u2")
    bundle = open_bundle(write_bundle(tmp_path / "m", {"x": Raw(14, (2, 2), upper.tobytes())}))
    np.testing.assert_array_equal(bundle.read("x"), (upper.astype(np.uint32) << 16).view(np.float32))


def test_every_file_of_a_checkpoint_and_its_folder_name_it(tmp_path):
    one = write_bundle(tmp_path / "one" / "model.ckpt-10", {"x": np.ones(2, np.float32)}, 2)
    for end in ("", ".index", ".meta", ".data-00000-of-00002", ".data-00001-of-00002"):
        assert open_bundle(f"{one}{end}").prefix == one
    assert open_bundle(one.parent).prefix == one

    two = write_bundle(tmp_path / "one" / "model.ckpt-20", {"x": np.ones(2, np.float32)})
    refused(lambda: open_bundle(one.parent), "holds 2 checkpoints")
    with pytest.raises(PixseqError, match="2 checkpoints") as caught:
        open_bundle(one.parent)
    assert str(one) in caught.value.hint and str(two) in caught.value.hint
    (one.parent / "checkpoint").write_text('model_checkpoint_path: "/far/away/model.ckpt-20"\nall_model_checkpoint')
    assert open_bundle(one.parent).prefix == two
    (one.parent / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-30"')
    refused(lambda: open_bundle(one.parent), "holds 2 checkpoints")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    refused(lambda: open_bundle(tmp_path), str(tmp_path), "no .index")
    refused(lambda: open_bundle(tmp_path / "model.ckpt-1"), "model.ckpt-1.index")
    refused(lambda: open_bundle(tmp_path / "gone" / "model.ckpt-1.meta"), "model.ckpt-1.index")
    write_bundle(tmp_path / "model.ckpt-2", {"x": np.ones(2)})
    with pytest.raises(PixseqError) as caught:
        open_bundle(tmp_path / "model.ckpt-1")
    assert "model.ckpt-2" in caught.value.hint


def test_missing_and_short_shards_are_refused_before_anything_is_read(tmp_path):
    prefix = write_bundle(tmp_path / "m", {f"x{i}": np.ones(9, np.float32) for i in range(12)}, 4)
    last = tmp_path / "m.data-00003-of-00004"
    last.write_bytes(last.read_bytes()[:-1])
    refused(lambda: open_bundle(prefix), "m.data-00003-of-00004", "truncated", "x9")
    last.unlink()
    refused(lambda: open_bundle(prefix), "lacks 1 of 4 shards", "m.data-00003-of-00004")


def test_a_shard_with_a_flipped_bit_is_refused(tmp_path):
    bundle = open_bundle(write_bundle(tmp_path / "m", {"good": np.ones(9), "spoilt": np.ones(9)}))
    data = bytearray(bundle.shard(0).read_bytes())
    data[-1] ^= 1
    bundle.shard(0).write_bytes(data)
    assert bundle.read("good").all()
    refused(lambda: bundle.read("spoilt"), "spoilt", "checksum", bundle.shard(0).name)
    refused(lambda: bundle.read("other"), "no variable other")
    bundle.shard(0).write_bytes(data[:-8])  # cut after it was opened
    refused(lambda: bundle.read("spoilt"), "spoilt", "ends inside")


def test_damaged_indexes_are_refused(tmp_path):
    prefix = write_bundle(tmp_path / "m", mixed())
    index = tmp_path / "m.index"
    whole = index.read_bytes()
    for content, word in (
        (b"", "footer"),
        (whole[:40], "footer"),
        (whole[:-1], "truncated"),
        (whole[:100] + whole[200:], "m.index"),
        (whole[:-8] + bytes(8), "mark"),
        (whole[:9] + bytes([whole[9] ^ 4]) + whole[10:], "checksum"),
    ):
        index.write_bytes(content)
        refused(lambda: open_bundle(prefix), "m.index", word)
    index.write_bytes(bytes(1 << 22) + whole)
    refused(lambda: open_bundle(prefix), "m.index", "bytes")


@pytest.mark.parametrize("name", [b"a\x1b[2J", b"\xff\xfe", b"a\nb"])
def test_names_that_are_no_text_do_not_reach_the_terminal(tmp_path, name):
    (tmp_path / "m.index").write_bytes(table({b"": field(1, 1), name: field(1, 1)}, 600))
    refused(lambda: open_bundle(tmp_path / "m"), "a name in it", repr(name)[2:-1])


def test_names_may_not_unfold_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("pixseq.interop.bundle.MAX_INDEX_BYTES", 1 << 16)
    rows = {b"": field(1, 1), **{b"x" * 1000 + b"%03d" % n: b"" for n in range(100)}}
    (tmp_path / "m.index").write_bytes(table(rows, 100000))
    refused(lambda: open_bundle(tmp_path / "m"), "m.index", "too long")


ONE = {"x": np.ones((2, 3), np.float32)}


@pytest.mark.parametrize(
    "how, words",
    [
        ({"compression": 1}, ["snappy"]),
        ({"header": field(1, 1) + field(2, 1)}, ["big-endian"]),
        ({"header": b"\x0f"}, ["wire type 7"]),
        ({"header": field(1, b"text")}, ["text where a number"]),
        ({"change": lambda name, m: m[:-1]}, ["ends too early"]),
        ({"change": lambda name, m: m + field(2, 5)}, ["number where a message"]),
        ({"change": lambda name, m: m + field(3, 1)}, ["shard"]),
        ({"change": lambda name, m: m + field(2, field(2, field(1, 2)) * 33)}, ["shape"]),
        ({"change": lambda name, m: m + field(4, 1 << 62)}, ["truncated"]),
        ({"change": lambda name, m: m + b"\x20" + b"\xff" * 10}, ["no end"]),
        ({"damage": lambda block: block[:-4] + b"\xff\xff\xff\xff"}, ["list of starts"]),
    ],
)
def test_hostile_indexes_are_refused(tmp_path, how, words):
    prefix = write_bundle(tmp_path / "m", ONE, **how)
    refused(lambda: open_bundle(prefix), "m.", *words)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda name, m: m + field(7, b""), ["x", "partitioned"]),
        (lambda name, m: m + field(1, 7), ["x", "type", "7"]),
        (lambda name, m: m + field(1, 2), ["x", "[2, 3]", "24 bytes"]),
        (lambda name, m: m + field(2, field(2, field(1, 1 << 60))), ["x", "24 bytes"]),
        (lambda name, m: m + field(2, field(2, field(1, 1 << 62)) * 3 + field(2, b"")) + b"\x28\0", ["m.data"]),
    ],
)
def test_a_tensor_that_cannot_be_read_harms_no_other(tmp_path, change, words):
    arrays = {**ONE, "y": np.arange(4, dtype=np.float32)}
    bundle = open_bundle(write_bundle(tmp_path / "m", arrays, change=lambda n, m: change(n, m) if n == "x" else m))
    np.testing.assert_array_equal(bundle.read("y"), arrays["y"])
    refused(lambda: bundle.read("x"), *words)


@pytest.mark.parametrize("sealed", [True, False], ids=["below the checksums", "above them"])
def test_mutated_indexes_raise_nothing_else(tmp_path, sealed):
    arrays = {name: array for name, array in mixed().items() if name.endswith(("/2", "scalar"))}
    outcomes = set()
    for seed in range(400):
        rng = np.random.default_rng(seed)

        def damage(block: bytes, rng=rng) -> bytes:
            if rng.random() < 0.5:
                return block
            mutant = bytearray(block)
            for _ in range(rng.integers(1, 4)):
                at = int(rng.integers(len(mutant)))
                match rng.integers(4):
                    case 0:
                        mutant[at] = rng.integers(256)
                    case 1:
                        mutant[at] ^= 1 << rng.integers(8)
                    case 2:
                        del mutant[at : at + int(rng.integers(1, 9))]
                    case 3:
                        mutant[at:at] = rng.bytes(3)
            return bytes(mutant) or b"\0"

        prefix = write_bundle(tmp_path / "m", arrays, 2, 200, damage=damage if sealed else lambda block: block)
        if not sealed:
            index = tmp_path / "m.index"
            index.write_bytes(damage(index.read_bytes()))
        try:
            bundle = open_bundle(prefix)
        except PixseqError:
            outcomes.add("refused")
            continue
        for name in bundle.entries:
            try:
                bundle.read(name)
                outcomes.add("read")
            except PixseqError:
                outcomes.add("refused on reading")
    assert outcomes >= {"refused", "read"}


# ----------------------------------------------------------------------------------------------------- the mapping


def difference(found, arrays: dict, bert: bool) -> float:
    """Our model in float64 on the found weights against OpenAI's graph on `arrays`: the largest |logit| difference."""
    shape = IgptShape(**found.shape)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, shape.n_vocab, (3, shape.n_ctx))
    keep = rng.random(tokens.shape) > 0.3 if bert else None
    model = ImageGPT(shape)
    model.load_state_dict(found.weights)
    with torch.no_grad():
        ours = model.double()(torch.from_numpy(tokens), None if keep is None else torch.from_numpy(~keep))
    return float(np.abs(ours.logits.numpy() - run(arrays, tokens, keep)[0]).max())


@pytest.mark.parametrize("bert", [False, True], ids=["ar", "bert"])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"layers": 12, "heads": 1, "size": 5, "context": 9},
        {"layers": 1, "heads": 7, "size": 1, "context": 1, "colours": 2},
        {"layers": 3, "heads": 4, "size": 4, "context": 25, "colours": 16},
    ],
    ids=str,
)
def test_logits_equal_openais(tmp_path, sizes, bert):
    arrays = variables(bert=bert, **sizes)
    found = read_openai(write_bundle(tmp_path / "model.ckpt-1000000", with_slots(arrays), 4))
    n = len(SLOTS) * len(arrays) + 4
    assert found.notes == [f"skipped {n} optimizer variables"]
    assert found.config == {"checkpoint": "model.ckpt-1000000", "global_step": 1000000}
    assert [path.suffix for path in found.files] == [".index"]
    assert found.shape["objective"] == ("bert" if bert else "ar")
    assert sum(x.numel() for x in found.weights.values()) == IgptShape(**found.shape).parameter_count()
    assert all(x.dtype == torch.float32 and x.is_contiguous() for x in found.weights.values())
    assert difference(found, arrays, bert) < 1e-9


def swap(x, a, b, parts):
    """Rows of x in `parts` equal parts, part a in the place of part b and the other way round."""
    pieces = list(x.chunk(parts))
    pieces[a], pieces[b] = pieces[b], pieces[a]
    return torch.cat(pieces)


MISTAKES = {
    "q, k, v transposed": ("attn.qkv.weight", lambda x: torch.cat([part.T for part in x.chunk(3)])),
    "heads interleaved": ("attn.qkv.weight", lambda x: x.view(3, 5, 6, 30).transpose(1, 2).reshape(90, 30)),
    "q, k, v inside each head": ("attn.qkv.weight", lambda x: x.view(3, 5, 6, 30).transpose(0, 1).reshape(90, 30)),
    "v before k": ("attn.qkv.weight", lambda x: swap(x, 1, 2, 3)),
    "output not transposed": ("attn.proj.weight", lambda x: x.T),
    "output heads interleaved": ("attn.proj.weight", lambda x: x.view(30, 5, 6).transpose(1, 2).reshape(30, 30)),
    "fc reshaped": ("mlp.fc.weight", lambda x: x.T.reshape(120, 30)),
    "proj reshaped": ("mlp.proj.weight", lambda x: x.T.reshape(30, 120)),
}


@pytest.mark.parametrize("bert", [False, True], ids=["ar", "bert"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_layouts_would_be_seen(tmp_path, mistake, bert):
    arrays = variables(bert=bert)
    found = read_openai(write_bundle(tmp_path / "m", arrays))
    end, spoil = MISTAKES[mistake]
    for name in found.weights:
        if name.endswith(end):
            found.weights[name] = spoil(found.weights[name]).contiguous()
    assert difference(found, arrays, bert) > 1e-2


def test_queries_and_keys_may_not_change_places_under_a_causal_mask(tmp_path):
    arrays = variables()
    found = read_openai(write_bundle(tmp_path / "m", arrays))
    for name in found.weights:
        if name.endswith("qkv.weight"):
            found.weights[name] = swap(found.weights[name], 0, 1, 3)
    assert difference(found, arrays, bert=False) > 1e-2


def test_embedding_and_head_are_not_one(tmp_path):
    arrays = variables()
    found = read_openai(write_bundle(tmp_path / "m", arrays))
    w = found.weights
    w["wte"], w["head.weight"] = w["head.weight"], w["wte"]
    assert difference(found, arrays, bert=False) > 1e-2


def test_a_trained_class_head_is_taken_and_an_untrained_one_left(tmp_path):
    arrays = variables(classes=4)
    found = read_openai(write_bundle(tmp_path / "tuned", arrays))
    assert found.shape["n_classes"] == 4 and found.notes == []
    tokens = np.random.default_rng(2).integers(0, 11, (3, 16))
    model = ImageGPT(IgptShape(**found.shape))
    model.load_state_dict(found.weights)
    with torch.no_grad():
        ours = model(torch.from_numpy(tokens)).class_logits
    np.testing.assert_allclose(ours.numpy(), run(arrays, tokens)[1], atol=1e-5)

    arrays["model/clf/wclf"][:] = 0
    found = read_openai(write_bundle(tmp_path / "released", arrays))
    assert found.shape["n_classes"] == 0 and "classifier.weight" not in found.weights
    assert len(found.notes) == 1 and "model/clf/wclf" in found.notes[0]
    assert difference(found, arrays, bert=False) < 1e-9


def test_other_number_types_become_float32(tmp_path):
    arrays = {name: x.astype(np.float16) for name, x in variables().items()}
    arrays["model/wte"] = arrays["model/wte"].astype(np.float64)
    found = read_openai(write_bundle(tmp_path / "m", arrays))
    assert {x.dtype for x in found.weights.values()} == {torch.float32}
    assert difference(found, arrays, bert=False) < 1e-9


def test_a_palette_beside_the_weights_is_found(tmp_path, monkeypatch):
    prefix = write_bundle(tmp_path / "run" / "m", variables())
    assert read_openai(prefix).palette is None
    palette = tmp_path / "run" / "kmeans_centers.npy"
    np.save(palette, np.zeros((11, 3)))
    assert read_openai(prefix).palette == palette
    monkeypatch.chdir(prefix.parent)
    assert read_openai(prefix.name).palette.absolute() == read_openai(".").palette.absolute() == palette


def put(name, array):
    return lambda arrays: {**arrays, name: np.asarray(array)}


def drop(name):
    return lambda arrays: {key: array for key, array in arrays.items() if key != name}


def spoil(name, value):
    def change(arrays):
        arrays[name].flat[3] = value
        return arrays

    return change


def rename(old, new):
    return lambda arrays: {key.replace(old, new): array for key, array in arrays.items()}


@pytest.mark.parametrize(
    "change, words",
    [
        (put("model/extra/w", np.ones(3)), ["model/extra/w"]),
        (put("other/Adamant", np.ones(3)), ["other/Adamant"]),
        (put("model/h01/ln_1/g", np.ones(30)), ["model/h01/ln_1/g"]),
        (put("model/h5/ln_1/g", np.ones(30)), ["model/h2/ln_1/g"]),
        (drop("model/wte"), ["model/wte"]),
        (drop("model/wtet"), ["model/wtet"]),
        (drop("model/h0/attn/q_proj"), ["model/h0/attn/q_proj"]),
        (drop("model/h1/mlp/c_proj/w"), ["model/h1/mlp/c_proj/w"]),
        (put("model/h1/attn/k_proj", np.ones((6, 5, 30))), ["model/h1/attn/k_proj", "[6, 5, 30]", "[5, 6, 30]"]),
        (put("model/h1/mlp/c_fc/w", np.ones((1, 30, 120))), ["model/h1/mlp/c_fc/w", "[1, 30, 120]"]),
        (put("model/h0/attn/q_proj", np.ones((4, 7, 30))), ["model/h0/attn/q_proj", "[4, 7, 30]", "30"]),
        (put("model/h0/attn/q_proj", np.ones((30, 30))), ["model/h0/attn/q_proj", "[30, 30]"]),
        (put("model/wpe", np.ones((0, 30))), ["model/wpe", "[0, 30]"]),
        (put("model/wpe", np.ones((15, 30))), ["model/wpe", "15 positions", "square"]),
        (put("model/clf/wclf", np.ones((4, 29))), ["model/clf/wclf", "[4, 29]"]),
        (put("model/sos", np.ones(30, np.int32)), ["model/sos", "int32"]),
        (spoil("model/h1/ln_2/g", np.nan), ["model/h1/ln_2/g", "non-finite"]),
        (spoil("model/h1/attn/v_proj", np.inf), ["model/h1/attn/v_proj", "non-finite"]),
        (put("model/sos", np.full(30, 1e300)), ["model/sos", "non-finite"]),
        (rename("model/", "gpt/"), ["model/", "gpt/h0/attn/c_proj"]),
        (lambda arrays: {"global_step": np.asarray(1)}, ["model/"]),
        (put("model/h0/attn/c_attn/w", np.ones((1, 30, 90))), ["GPT-2", "model/h0/attn/c_attn/w"]),
        (put("model/h0/ln_1/b", np.ones(30)), ["GPT-2", "model/h0/ln_1/b"]),
    ],
)
def test_what_is_no_image_gpt_is_refused_by_name(tmp_path, change, words):
    prefix = write_bundle(tmp_path / "m", change(variables()))
    refused(lambda: read_openai(prefix), *words)
