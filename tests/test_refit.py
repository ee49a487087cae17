"""finetune: what it may validate on, whom an error blames, and the refit on train and validation together (§3.1)."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_tokens

from pixseq.artifacts.arrays import open_store
from pixseq.artifacts.checkpoint import open_checkpoint
from pixseq.config import FinetuneFile, effective
from pixseq.engine.training import Limits
from pixseq.errors import Interrupted, PixseqError, UsageError
from pixseq.stages import finetune, sample

SETS = [
    "finetune.steps=12",
    "finetune.batch_size=8",
    "finetune.lr=0.01",
    "finetune.val_every=3",
    "finetune.log_every=1",
]


def recipe(*sets):
    return effective(FinetuneFile, sets=[*SETS, "finetune.refit=true", *sets])


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("sets", [(), ("finetune.lora_rank=2",), ("finetune.ema=0.5",)])
def test_the_refit_is_the_same_recipe_on_all_rows_for_the_chosen_steps(checkpoints, tokens, tmp_path, sets):
    config = recipe(*sets)
    record = finetune.run(checkpoints["ar"], tokens, tmp_path / "m", config, val_fraction=0.25, device="cpu")
    chosen = record["summary"]["best"]["step"]
    assert record["config"]["finetune"]["refit"] is True
    own = record["summary"]["refit"]
    assert record["summary"]["images"] == 72 and (own["images"], own["steps"]) == (96, chosen)
    once = effective(FinetuneFile, sets=[*SETS, *sets])
    plain = finetune.run(checkpoints["ar"], tokens, tmp_path / "p", once, val_fraction=0.25, device="cpu")
    assert plain["summary"]["best"] == record["summary"]["best"] and "refit" not in plain["summary"]
    ours, choice = open_checkpoint(tmp_path / "m"), open_checkpoint(tmp_path / "p").weights()
    assert all(torch.equal(x, choice[name]) for name, x in ours.weights("best").items())
    assert not all(torch.equal(x, choice[name]) for name, x in ours.weights().items())
    log = rows_of(tmp_path / "m" / "refit.jsonl")
    assert [row["step"] for row in log] == list(range(chosen)) and not any("val_loss" in row for row in log)
    rates = {row["step"]: row["lr"] for row in rows_of(tmp_path / "m" / "log.jsonl") if "lr" in row}
    assert all(row["lr"] == rates[row["step"]] for row in log)
    assert not (tmp_path / "m" / "resume").exists()
    if "finetune.ema=0.5" in sets:
        assert ours.weights("ema").keys() == ours.weights().keys()


def test_the_refit_takes_a_validation_set_of_its_own_too(checkpoints, tokens, tmp_path, monkeypatch):
    other, seen = write_tokens(tmp_path / "v.zarr", count=24, seed=5), []
    train = finetune.train

    def watched(training):
        seen.append(training.images.batch(np.arange(len(training.images))))
        return train(training)

    monkeypatch.setattr(finetune, "train", watched)
    finetune.run(checkpoints["ar"], tokens, tmp_path / "m", recipe(), val=other, device="cpu")
    stores = [open_store(path, "tokens") for path in (tokens, other)]
    assert len(seen) == 2
    assert np.array_equal(seen[1][0], np.concatenate([store.read("tokens") for store in stores]))
    assert np.array_equal(seen[1][1], np.concatenate([store.labels() for store in stores]))


def test_both_runs_share_one_time_limit_and_the_summary_counts_both(checkpoints, tokens, tmp_path, monkeypatch):
    train, clock, given = finetune.train, [0.0], {}

    def timed(training):
        given[training.name] = training.limits.time_limit_minutes
        clock[0] += 120
        return {**train(training), "seconds": {"finetune": 120.0, "refit": 30.0}[training.name]}

    monkeypatch.setattr(finetune, "train", timed)
    monkeypatch.setattr(finetune, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    options = {"val_fraction": 0.25, "device": "cpu", "limits": Limits(time_limit_minutes=5)}
    summary = finetune.run(checkpoints["ar"], tokens, tmp_path / "m", recipe(), **options)["summary"]
    assert given == {"finetune": 5, "refit": 3}
    assert summary["training_seconds"] == 150.0 and summary["refit"]["training_seconds"] == 30.0
    assert Limits(time_limit_minutes=1).after(90).time_limit_minutes == 0
    assert Limits().after(90).time_limit_minutes is None


def test_a_run_killed_in_either_phase_goes_on_to_the_same_weights(checkpoints, tokens, tmp_path, monkeypatch):
    few = recipe("finetune.steps=6")
    whole = finetune.run(checkpoints["ar"], tokens, tmp_path / "whole", few, val_fraction=0.25, device="cpu")
    stops, phases = 0, set()
    train = finetune.train

    def watched(training):
        phases.add(training.name)
        return train(training)

    monkeypatch.setattr(finetune, "train", watched)
    while True:
        try:
            again = finetune.run(
                checkpoints["ar"],
                tokens,
                tmp_path / "parts",
                few,
                val_fraction=0.25,
                device="cpu",
                limits=Limits(time_limit_minutes=0),
                resume=True,
            )
            break
        except Interrupted:
            stops += 1
            assert (tmp_path / "parts.partial" / "resume" / "state.pt").is_file()
            assert stops < 40
    assert phases == {"finetune", "refit"} and stops > whole["summary"]["best"]["step"]
    assert again["id"] == whole["id"]
    assert all(again["summary"]["refit"][key] == whole["summary"]["refit"][key] for key in ("images", "steps"))
    assert again["summary"]["weights"] == whole["summary"]["weights"]
    assert len(rows_of(tmp_path / "parts" / "refit.jsonl")) == whole["summary"]["refit"]["steps"]


def test_a_refit_is_another_recipe(checkpoints, tokens, tmp_path):
    options = {"val_fraction": 0.25, "device": "cpu", "resume": True}
    with pytest.raises(Interrupted):
        limits = Limits(time_limit_minutes=0)
        finetune.run(checkpoints["ar"], tokens, tmp_path / "m", recipe(), limits=limits, **options)
    with pytest.raises(PixseqError, match=r"another recipe.*refit \(True then, False now\)"):
        finetune.run(checkpoints["ar"], tokens, tmp_path / "m", effective(FinetuneFile, sets=SETS), **options)


def test_what_is_trained_on_does_not_validate(checkpoints, tokens, tmp_path):
    with pytest.raises(PixseqError, match="holds the same images as"):
        finetune.run(checkpoints["ar"], tokens, tmp_path / "m", recipe(), val=tokens, device="cpu")
    copy = write_tokens(tmp_path / "copy.zarr", chunk_rows=7)
    with pytest.raises(PixseqError, match=r"copy\.zarr holds the same images as"):
        finetune.run(checkpoints["ar"], tokens, tmp_path / "m", recipe(), val=copy, device="cpu")
    assert not list(tmp_path.glob("m*"))


def test_missing_labels_are_told_of_the_store_that_lacks_them(checkpoints, tokens, tmp_path):
    bare = write_tokens(tmp_path / "bare.zarr", count=24, seed=5, labels=False)
    with pytest.raises(PixseqError, match=r"bare\.zarr has no labels"):
        finetune.run(checkpoints["ar"], tokens, tmp_path / "m", recipe(), val=bare, device="cpu")
    with pytest.raises(PixseqError, match=r"bare\.zarr has no labels"):
        finetune.run(checkpoints["ar"], bare, tmp_path / "m", recipe(), val=tokens, device="cpu")


def test_completions_stand_in_the_columns_asked_for(checkpoints, tokens, tmp_path, monkeypatch):
    wide = []
    monkeypatch.setattr(sample, "grid", lambda images, columns, **rest: wide.append(columns) or images[0])
    for columns, count in ((None, 4), (3, 4), (6, 4), (12, 4), (30, 4)):
        sample.run(
            checkpoints["ar"],
            tmp_path / f"{columns}.png",
            prompt=str(tokens),
            count=count,
            columns=columns,
            device="cpu",
        )
    assert wide == [3, 3, 6, 12, 12]
    for columns, prompt in ((4, str(tokens)), (2, str(tokens)), (0, None)):
        with pytest.raises(UsageError, match=f"--columns.*{columns}"):
            sample.run(checkpoints["ar"], tmp_path / "x.png", prompt=prompt, columns=columns, device="cpu")


def test_an_interrupted_refit_can_be_given_up(checkpoints, tokens, tmp_path, monkeypatch):
    """--overwrite without --resume clears what either phase left."""
    train = finetune.train

    def cut(training):
        if training.name == "refit":
            training.limits = Limits(time_limit_minutes=0)
        return train(training)

    monkeypatch.setattr(finetune, "train", cut)
    with pytest.raises(Interrupted):
        finetune.run(checkpoints["ar"], tokens, tmp_path / "m", recipe(), val_fraction=0.25, device="cpu")
    assert list((tmp_path / "m.partial").rglob("refit/**/state.pt"))
    monkeypatch.setattr(finetune, "train", train)
    few = effective(FinetuneFile, sets=[*SETS, "finetune.steps=2"])
    finetune.run(checkpoints["ar"], tokens, tmp_path / "m", few, val_fraction=0.25, device="cpu", overwrite=True)
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert "refit.jsonl" not in names and "resume" not in names and not list(tmp_path.glob("*.partial"))
