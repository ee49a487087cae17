"""Extractors that torch.export has written: run as they are, and never by executing code of the file."""

import json
import os
import pickle
import warnings
import zipfile

import exports
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_tokens
from torch import nn

from pixseq.artifacts.arrays import open_store
from pixseq.errors import PixseqError, UsageError
from pixseq.interop import torch_export
from pixseq.interop.torch_export import open_exported
from pixseq.stages import features, frechet
from pixseq.studies import cell as one
from pixseq.studies import plan
from pixseq.studies.study import open_study


class Net(nn.Module):
    """What extractors are made of: a resize, convolutions, norms, pools, attention."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.attend, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(16, 5)
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))

    def forward(self, x):
        x = F.interpolate(x - self.mean, size=(12, 12), mode="bilinear", antialias=True)
        x = F.max_pool2d(torch.relu(self.norm(self.conv(x))), 2)
        t = x.flatten(2).transpose(1, 2)
        a, b = (t + self.attend(t, t, t, need_weights=False)[0]).mean(1, keepdim=True).chunk(2, dim=2)
        return self.out(torch.cat([a[:, 0], b[:, 0], x.mean((2, 3))], 1)).reshape(x.shape[0], -1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A network, and its exports of any and of one batch size, and in torch's smaller operators."""
    torch.manual_seed(0)
    folder, net, x = tmp_path_factory.mktemp("pt2"), Net().eval(), torch.rand(3, 3, 6, 6)
    batch = torch.export.Dim("batch", min=1, max=512)
    whole = torch.export.export(net, (x,), dynamic_shapes=({0: batch},))
    torch.export.save(whole, folder / "any.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own use of what it will leave
        torch.export.save(whole.run_decompositions(), folder / "small.pt2")
    torch.export.save(torch.export.export(net, (x,)), folder / "three.pt2")
    return folder, net


def edited(source, target, change):
    """A copy of an archive; `change` gets {name inside: bytes} to edit."""
    with zipfile.ZipFile(source) as archive:
        found = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(found)
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in found.items():
            archive.writestr(f"model/{name}", data)
    return target


def with_graph(change):
    def edit(files):
        program = json.loads(files["models/model.json"])
        change(program["graph_module"]["graph"])
        files["models/model.json"] = json.dumps(program)

    return edit


@pytest.mark.parametrize("name", ["any.pt2", "three.pt2", "small.pt2"])
def test_an_export_gives_the_features_of_its_network(saved, name):
    folder, net = saved
    images = torch.rand(7, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.allclose(open_exported(folder / name).features(images), net(images), atol=1e-6)
    with pytest.raises(PixseqError, match="takes pictures of 6x6, these are 8x8"):
        open_exported(folder / name).features(torch.rand(2, 3, 8, 8))


def test_an_export_computes_where_its_weights_are_brought(saved):
    folder, net = saved
    meta = torch.device("meta")
    found = open_exported(folder / "any.pt2").on(meta).features(torch.empty(7, 3, 6, 6, device=meta))
    assert found.device == meta and found.shape == net(torch.zeros(7, 3, 6, 6)).shape


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def pickled_weight(files):
    config = json.loads(files["data/weights/model_weights_config.json"])
    config["config"]["conv.bias"]["use_pickle"] = True
    files["data/weights/model_weights_config.json"] = json.dumps(config)
    files["data/weights/weight_1"] = pickle.dumps(Evil())


def custom_object(files):
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    files["data/constants/model_constants_config.json"] = json.dumps({"config": {"evil": entry}})
    files["data/constants/opaque_obj_0"] = pickle.dumps(Evil())


def calling(target, *args):
    node = {"target": target, "inputs": [{"name": "p", "arg": arg, "kind": 1} for arg in args], "outputs": []}
    return with_graph(lambda graph: graph["nodes"].insert(0, node))


@pytest.mark.parametrize(
    "change, words",
    [
        (pickled_weight, "is pickled"),
        (custom_object, "is pickled"),
        (calling("torch.os.mkdir", {"as_string": "ran"}), "torch.os.mkdir"),
        (calling("torch.ops.aten.from_file.default", {"as_string": "ran"}), "from_file"),
        (calling("_operator.attrgetter", {"as_string": "x"}), "attrgetter"),
        (calling("math.factorial", {"as_int": 10**9}), "math.factorial"),
        (calling("torch.ops.aten._cudnn_init_dropout_state.default"), "_cudnn_init"),
        (lambda files: files.update({"data/aotinductor/model/x.so": b""}), "compiled"),
        (lambda files: files.pop("models/model.json"), "0 graphs"),
        (lambda files: files.update({"models/model.json": b"{}"}), "not laid out"),
        (lambda files: files.update({"data/weights/weight_0": b"1234"}), "cut short"),
        (with_graph(lambda graph: graph["nodes"].pop(3)), "cannot be run"),
    ],
)
def test_what_is_not_plainly_a_graph_is_refused_and_nothing_runs(saved, tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    path = edited(saved[0] / "any.pt2", tmp_path / "odd.pt2", change)
    with pytest.raises(PixseqError, match=words):
        open_exported(path).features(torch.rand(2, 3, 6, 6))
    assert not (tmp_path / "ran").exists()


REFUSED = "save.default set_data.default manual_seed.default requires_grad_.default warn.default add.out relu.out"
REFUSED += " mkldnn_rnn_layer.default mul.left_t remainder.int"
REFUSED += " resize_.default as_strided.default set_.source_Tensor rand.default to_sparse.default _linalg_svd.default"


@pytest.mark.parametrize("name", REFUSED.split())
def test_operators_outside_the_list_and_those_that_write_into_a_tensor_are_refused(saved, tmp_path, name):
    path = edited(saved[0] / "any.pt2", tmp_path / "odd.pt2", calling(f"torch.ops.aten.{name}"))
    with pytest.raises(PixseqError, match=f"aten.{name}.*none of the operators"):
        open_exported(path)


X, K, W, E, G = (exports.tensor(name) for name in "xkweg")  # E: an expanded W
NONE = {"as_none": True}
FLASH = "_scaled_dot_product_flash_attention_for_cpu.default"
RESIZE = "_upsample_bilinear2d_aa.default"


def flash(*sizes):
    """Attention of x [2, 3, 6, 6] to keys and values of these sizes."""
    nodes = [exports.call("full.default", name, list(size), 1.0) for name, size in zip("kv", sizes)]
    return [*nodes, exports.call(FLASH, ["y", "l"], X, K, exports.tensor("v"))]


def lstm(*params):
    """Of steps [2, 1, 1] and one state."""
    hx, params = ({"as_tensors": [{"name": name} for name in names]} for names in ("hh", params))
    call = exports.call("lstm.input", ["y", "a", "b"], exports.tensor("s"), hx, params, True, 1, 0.0, *[False] * 3)
    return [exports.call("full.default", "s", [2, 1, 1], 1.0), exports.call("full.default", "h", [1, 1, 1], 1.0), call]


@pytest.mark.parametrize(
    "nodes, words",
    [
        ([exports.call("native_batch_norm.default", "y", X, W, W, W, W, False, 0.1, 1e-5)], "3 channels .* weight"),
        ([exports.call("_native_batch_norm_legit.default", "y", X, W, W, W, W, False, 0.1, 1e-5)], "3 channels"),
        ([exports.call("_native_batch_norm_legit.no_stats", "y", X, NONE, W, True, 0.1, 1e-5)], "channels .* bias"),
        (
            [exports.call("_native_batch_norm_legit_no_training.default", "y", X, NONE, NONE, W, W, 0.1, 1e-5)],
            "channels .* running_mean",
        ),
        ([exports.call("native_group_norm.default", ["y"], X, E, E, 2, 3, 36, 1, 1e-5)], "weight of .*, strides .0"),
        (flash((2, 3, 5, 6), (2, 3, 4, 6)), "do not fit"),
        (flash((1, 3, 5, 6), (1, 3, 5, 6)), "do not fit"),
        (flash((2, 2, 5, 6), (2, 2, 5, 6)), "do not fit"),
        (flash((2, 3, 0, 6), (2, 3, 0, 6)), "is empty"),
        ([exports.call("transpose.int", "k", X, 2, 3), exports.call(FLASH, ["y"], K, K, K)], "head by head"),
        ([exports.call("median.dim", ["y", "i"], E, 0)], "expanded"),
        (lstm("f", "f", "f", "w"), "weights that do not fit"),
        ([exports.call("grid_sampler_2d.default", "y", X, G, 0, 7, False)], "no padding 7"),
        ([exports.call("grid_sampler_2d.default", "y", X, G, 3, 0, False)], "no mode 3"),
        ([exports.call(RESIZE, "y", X, [12, 60], False, 2.0, 2.0)], "60 of 6, .* scale of 2"),
        (
            [
                exports.call("full.default", "k", [9], -(2**63)),
                exports.call("div.Scalar_mode", "y", K, -1, rounding_mode="trunc"),
            ],
            "divided by -1",
        ),
        ([exports.call("_operator.mod", "n", 5, 0)], "modulo by zero"),
    ],
)
def test_arguments_that_would_lead_torch_beyond_its_tensors_are_refused(tmp_path, nodes, words):
    weights = [
        ("w", [1], [1], bytes(4)),
        ("g", [2, 1, 1, 2], [2, 2, 2, 1], bytes(16)),
        ("f", [4, 1], [1, 1], bytes(16)),
    ]
    expanded = exports.call("expand.default", "e", W, [3])
    path = exports.write(tmp_path / "odd.pt2", expanded, *nodes, weights=weights)
    with pytest.raises(PixseqError, match=f"cannot be run on .*{words}"):
        open_exported(path).features(torch.rand(2, 3, 6, 6))


@pytest.mark.parametrize(
    "name, given",
    [("empty.memory_format", ([2, 5],)), ("empty_like.default", (X,)), ("new_empty.default", (X, [2, 5]))],
)
def test_what_memory_held_before_is_no_feature(tmp_path, name, given):
    path = exports.write(
        tmp_path / "x.pt2",
        exports.call(name, "k", *given),
        exports.call("flatten.using_ints", "y", K, 1),
    )
    torch.use_deterministic_algorithms(True)  # then torch fills with what is no number
    try:
        assert not open_exported(path).features(torch.rand(2, 3, 6, 6)).any()
    finally:
        torch.use_deterministic_algorithms(False)


def test_every_operator_on_the_list_is_one_of_aten():
    assert all(hasattr(torch.ops.aten, name) for name in torch_export.OPERATORS)


def test_sample_inputs_of_a_file_are_never_opened(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = {"data/sample_inputs/model.pt": pickle.dumps(Evil())}
    path = edited(saved[0] / "any.pt2", tmp_path / "odd.pt2", lambda files: files.update(evil))
    assert open_exported(path).features(torch.rand(2, 3, 6, 6)).shape == (2, 5) and not (tmp_path / "ran").exists()


def test_memory_that_ends_is_no_fault_of_the_file(saved, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch_export, "_called", full)
    with pytest.raises(torch.OutOfMemoryError):
        open_exported(saved[0] / "any.pt2").features(torch.rand(2, 3, 6, 6))


def test_what_is_no_export_is_refused(tmp_path):
    (tmp_path / "x.pt2").write_bytes(b"PK no zip")
    for name, words in (("x.pt2", "no archive"), ("none.pt2", "cannot be read")):
        with pytest.raises(PixseqError, match=words):
            open_exported(tmp_path / name)


def test_a_study_is_judged_by_an_export(saved, tmp_path):
    write_tokens(tmp_path / "t.zarr", count=96)
    write_tokens(tmp_path / "v.zarr", count=48, seed=1, labels=False)
    (tmp_path / "g.yaml").write_text(
        f"data: {{train: {tmp_path}/t.zarr, val: {tmp_path}/v.zarr}}\nbudgets: [1.0e+9]\n"
        f"batch: {{steps: 12, smallest: 4}}\ncompletions: {{count: 20, extractor: {saved[0]}/any.pt2}}\n"
    )
    plan.run(tmp_path / "g.yaml", tmp_path / "plan", timed=False)
    study = open_study(tmp_path / "plan")
    numbers = one.run(study, study.cells[0], "cpu", "fp32")
    id = study.manifest["inputs"]["extractor"]["id"]
    assert numbers["frechet_distance"] > 0 and id in numbers["frechet_extractor"]
    large = write_tokens(tmp_path / "l.zarr", count=48, side=8)
    (tmp_path / "g.yaml").write_text(
        (tmp_path / "g.yaml").read_text().replace("v.zarr", "l.zarr").replace("t.zarr", "l.zarr")
    )
    with pytest.raises(PixseqError, match="takes pictures of 6x6"):
        plan.run(tmp_path / "g.yaml", tmp_path / "other", timed=False)
    with pytest.raises(UsageError, match="no layers"):
        features.run(saved[0] / "any.pt2", large, tmp_path / "f.zarr", layers="1")


def test_features_of_an_export_are_of_the_colours_and_compare_with_their_own_alone(saved, tmp_path):
    folder, net = saved
    store = write_tokens(tmp_path / "v.zarr", count=20)
    features.run(folder / "any.pt2", store, tmp_path / "a.zarr", device="cpu")
    features.run(folder / "three.pt2", store, tmp_path / "b.zarr", device="cpu")
    opened = open_store(store, "tokens")
    colours = np.round((np.array(opened.meta["palette"]) + 1) * 127.5)[opened.read("tokens")].reshape(-1, 6, 6, 3)
    with torch.inference_mode():
        expected = net(torch.from_numpy(colours / 255).permute(0, 3, 1, 2).float())
    assert np.allclose(open_store(tmp_path / "a.zarr", "features").read("features")[0], expected, atol=1e-5)
    with pytest.raises(PixseqError, match="exported model"):
        frechet.run(tmp_path / "a.zarr", tmp_path / "b.zarr")
