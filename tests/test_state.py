"""What a run goes on from: a saved state that is not of this run is refused in one line, before any of it is used."""

import copy

import pytest
import torch

from pixseq.artifacts.checkpoint import best_weights, load_state, save_state, save_weights
from pixseq.artifacts.unfinished import check_best
from pixseq.config import TrainConfig
from pixseq.engine.state import TrainState
from pixseq.errors import PixseqError
from pixseq.models.family import build
from pixseq.models.igpt import IgptShape

RECIPE = TrainConfig(steps=10, optimizer="muon", ema=0.9)


def fresh():
    shape = IgptShape(n_layer=1, n_head=2, d_model=8, n_vocab=4, n_ctx=4)
    return build(shape).init_weights(torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def saved():
    run = TrainState(fresh(), RECIPE, None)
    sum(p.sum() for p in run.model.parameters()).backward()
    run.update(0.1)
    run.update_best({"val_loss": 1.0}, lambda row: -row["val_loss"])
    return run.snapshot()


def test_a_state_is_gone_on_with(saved, tmp_path):
    save_state(tmp_path, saved)
    run = TrainState(fresh(), RECIPE, load_state(tmp_path))
    assert (run.step, run.best) == (1, saved["best"])
    now = run.snapshot()["optimizers"]
    for ours, theirs in zip(now, saved["optimizers"]):
        for i, values in theirs["state"].items():
            assert all(torch.equal(ours["state"][i][name], x) for name, x in values.items())


def put(*keys):
    *above, last, value = keys

    def change(state):
        for key in above:
            state = state[key]
        state[last] = value

    return change


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda state: state.pop("model"), "has no 'model'"),
        (lambda state: state["model"].pop("wte"), "model wte is missing"),
        (put("model", "wte", torch.zeros(4, 9)), r"model wte is torch.float32 \[4, 9\], the run's is .* \[4, 8\]"),
        (put("model", "wte", torch.zeros(4, 8).int()), "model wte is torch.int32"),
        (put("model", "more", torch.zeros(1)), "the run's is missing"),
        (put("model", 3), "does not fit"),
        (put("ema", None), "no averaged weights"),
        (put("ema", "n_averaged", "many"), "n_averaged is str"),
        (put("optimizers", []), "0 optimizers"),
        (put("optimizers", 0, "param_groups", 0, "betas", (0.0, 3.0)), "another betas"),
        (put("optimizers", 0, "param_groups", 0, "params", [0]), "another params"),
        (put("optimizers", 0, "state", 99, {}), "weight 99"),
        (put("optimizers", 1, "state", 0, "momentum_buffer", torch.zeros(2, 2)), "momentum_buffer of weight 0"),
        (put("optimizers", 1, "state", 0, {"momentum_buffer": 3}), "momentum_buffer of weight 0 is int"),
        (put("step", 11), "step is 11, of 10"),
        (put("step", 1.5), "step is 1.5"),
        (put("best", {"score": 0.5, "step": -1}), "best step is -1"),
        (put("best", [1]), "does not fit"),
        (put("seconds", float("nan")), "nan seconds"),
        (put("settled", "yes"), "settled"),
    ],
)
def test_a_state_of_another_run_is_refused(saved, tmp_path, change, why):
    state = copy.deepcopy(saved)
    change(state)
    save_state(tmp_path, state)
    with pytest.raises(PixseqError, match=why) as error:
        TrainState(fresh(), RECIPE, load_state(tmp_path))
    assert "--overwrite" in error.value.hint


@pytest.mark.parametrize(
    "state, why",
    [
        ([1], "holds a list"),
        ({"step": 1j}, "step is a complex"),
        ({"model": {"w": torch.zeros(1).expand(1000)}}, "model.w declares 1,000 numbers"),
        ({"model": {"w": torch.zeros(2, 2).to_sparse()}}, "model.w is a Tensor"),
    ],
    ids=["list", "complex", "expanded", "sparse"],
)
def test_a_state_of_what_no_state_holds_is_refused(tmp_path, state, why):
    (tmp_path / "resume").mkdir()
    torch.save(state, tmp_path / "resume" / "state.pt")
    with pytest.raises(PixseqError, match=why):
        load_state(tmp_path)


@pytest.mark.parametrize(
    "best, why",
    [
        (lambda weights: {**weights, "wte": torch.zeros(4, 9)}, r"wte is \[4, 9\] and not \[4, 8\]"),
        (lambda weights: {k: x for k, x in weights.items() if k != "wte"}, r"wte is missing and not \[4, 8\]"),
        (lambda weights: None, "No such file"),
    ],
    ids=["shape", "names", "none"],
)
def test_best_weights_of_another_run_are_refused_before_it_goes_on(saved, tmp_path, best, why):
    weights, path = best(saved["model"]), best_weights(tmp_path, saved["best"])
    check_best(tmp_path, None)
    save_weights(path, saved["model"])
    check_best(tmp_path, saved)
    path.unlink() if weights is None else save_weights(path, weights)
    with pytest.raises(PixseqError, match=why) as error:
        check_best(tmp_path, saved)
    assert str(path) in error.value.message and "--overwrite" in error.value.hint
