"""Tables of runs as they are exported: names, marks between cells, numbers, and what is missing."""

import json

import numpy as np
import pytest

from pixseq.artifacts.fit import Excluded, Run
from pixseq.errors import PixseqError, UsageError
from pixseq.studies import columns, fit, run_table
from pixseq.studies.points import Direction

BASE = [
    {"params": N, "tokens": C / (6 * N), "flops": C, "loss": 1.7 + 400 * N**-0.34 + 400 * (C / 6 / N) ** -0.28}
    for C in np.geomspace(1e18, 1e20, 4).tolist()
    for N in (0.6 * C**0.45 * np.geomspace(0.25, 4, 5)).tolist()
]


def table(rows, between=",", number=repr):
    """Lines of text; `rows` are mappings."""
    shown = [[number(float(v)) if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return "\n".join(between.join(line) for line in [list(rows[0]), *shown]) + "\n"


def renamed(**names):
    return [{names.get(key, key): value for key, value in row.items() if names.get(key, key)} for row in BASE]


@pytest.fixture
def read(tmp_path):
    def run(text, metrics=None, chosen=(), encoding="utf-8"):
        path = tmp_path / "runs.csv"
        path.write_text(text, encoding=encoding)
        return run_table.read(path, metrics, chosen)

    return run


def same(found):
    assert [run.params for run in found.runs] == pytest.approx([row["params"] for row in BASE], rel=1e-4)
    assert [run.tokens for run in found.runs] == pytest.approx([row["tokens"] for row in BASE], rel=1e-4)
    assert [run.flops for run in found.runs] == pytest.approx([row["flops"] for row in BASE], rel=1e-4)
    (metric,) = found.metrics
    assert [run.values[metric] for run in found.runs] == pytest.approx([row["loss"] for row in BASE], rel=1e-3)
    return found


@pytest.mark.parametrize(
    "names",
    [
        {},
        {"params": "Params", "tokens": "TOKENS", "flops": "FLOPs", "loss": "Loss"},
        {"params": "Model Size", "tokens": "Training Tokens", "flops": "Training FLOP"},
        {
            "params": "Parameters",
            "tokens": "Training dataset size (datapoints)",
            "flops": "Training compute (FLOP)",
        },
        {"params": "config/n_params", "tokens": "summary/tokens_seen", "flops": "total_flops", "loss": "summary/loss"},
        {
            "params": "config.num_params",
            "tokens": "config.train_tokens",
            "flops": "summary.flops",
            "loss": "summary.loss",
        },
        {"params": "N", "tokens": "D", "flops": "C"},
        {"params": "nParams", "tokens": "nTokens", "flops": "trainFlops"},
        {"params": "non_embedding_params", "tokens": "num_tokens", "flops": "compute"},
    ],
    ids=lambda names: names.get("params", "ours"),
)
def test_columns_are_known_by_the_names_that_people_give_them(read, names):
    found = same(read(table(renamed(**names))))
    assert found.metrics == ["loss"] and found.counting is None
    others = {name for part, name in names.items() if part != "loss"}
    assert all(any(repr(name) in note for note in found.notes) for name in others)


def spelt_in_german(value):
    return f"{value:.6f}".replace(".", ",") if value < 100 else f"{value:.4e}".replace(".", ",")


@pytest.mark.parametrize(
    ("between", "number", "encoding"),
    [
        ("\t", repr, "utf-8"),
        (";", repr, "utf-8"),
        (";", spelt_in_german, "utf-8-sig"),
        ("\t", spelt_in_german, "utf-16"),
        (",", lambda v: f'"{v:,.3f}"', "utf-8"),
        (";", lambda v: f"{v:,.3f}", "utf-8"),
        ("\t", lambda v: f"{v:,.3f}".replace(",", " "), "utf-8"),
    ],
)
def test_marks_between_cells_and_ways_to_write_numbers(read, between, number, encoding):
    same(read(table(BASE, between, number), encoding=encoding))


def test_a_spreadsheets_word_on_its_separator_is_no_line_of_names(read):
    same(read("sep=;\n" + table(BASE, ";")))


def test_a_table_of_runs_as_weights_and_biases_exports_it(read):
    rows = [
        {
            "Name": f"run-{i}",
            "State": "finished" if i else "crashed",
            "Notes": "-",
            "User": "ada",
            "Tags": "",
            "Created": "2024-01-01T00:00:00.000Z",
            "Runtime": 3600 + i,
            "Sweep": "",
            "n_params": row["params"],
            "tokens_seen": row["tokens"],
            "lr": 0.001 * (1 + i),
            "batch_size": 8,
            "PF-days": 1.5 + i,
            "GPU hours": 3 + i,
            "gpuHour": 3 + i,
            "PFLOP/s-days": 1.5 + i,
            "tokens/sec": 900 - i,
            "_step": 400,
            "_timestamp": 1.7e9,
            "val_loss": row["loss"],
        }
        for i, row in enumerate(BASE)
    ]
    found = read(table(rows))
    assert found.metrics == ["val_loss"] and found.counting == "6nd"
    assert found.excluded == [Excluded("run-0", "crashed")]
    assert [run.id for run in found.runs] == [f"run-{i}" for i in range(1, len(BASE))]
    assert any("no column of flops: 6 params tokens (6nd) are taken" in note for note in found.notes)
    assert any("text" in note and "User" in note and "Created" in note for note in found.notes)


@pytest.mark.parametrize("spell", [json.dumps, repr])
def test_runs_as_the_script_in_weights_and_biases_documentation_writes_them(read, spell):
    rows = []
    for i, row in enumerate(BASE):
        summary = {"loss": row["loss"], "_step": 9, "best": {"epoch": 3}}
        config = {"n_params": row["params"], "tokens": row["tokens"], "optimizer": "adam", "seed": 1}
        cells = [
            f'"{spell(each)}"' if spell is repr else '"' + spell(each).replace('"', '""') + '"'
            for each in (summary, config)
        ]
        rows.append({"": i, "summary": cells[0], "config": cells[1], "name": f"r{i}"})
    found = same(read(table(rows)))
    assert found.metrics == ["loss"] and found.runs[3].id == "r3"
    assert any("not read" in note and "(without a name)" in note for note in found.notes)


@pytest.mark.parametrize(
    ("missing", "taken"),
    [("flops", "6 params tokens (6nd)"), ("tokens", "flops / (6 params)"), ("params", "flops / (6 tokens)")],
)
def test_one_of_three_that_is_missing_follows_from_the_others_and_is_said(read, missing, taken):
    found = same(read(table(renamed(**{missing: None}))))
    assert found.counting == "6nd" and found.notes == [f"there is no column of {missing}: {taken} are taken"]


def test_columns_of_text_are_left_aside_and_named(read):
    found = same(read(table([{"who": "ada", **row, "date": "2024-01-01", "ok": "True"} for row in BASE])))
    assert found.metrics == ["loss"] and "columns of text are not fitted: who, date, ok" in found.notes


def test_what_may_be_two_columns_is_asked_with_the_way_out(read):
    rows = [
        {"active_params": 1.0, "total_params": row["params"] * 1.1, "n_params": row["params"], **row} for row in BASE
    ]
    rows = [{key: value for key, value in row.items() if key != "params"} for row in rows]
    with pytest.raises(PixseqError, match="2 columns may be params: total_params, n_params") as caught:
        read(table(rows), ["loss"])
    assert "--column 'params=total_params'" in caught.value.hint
    found = same(read(table(rows), ["loss"], ["params=n_params"]))
    assert any("not read: total_params" in note for note in found.notes)
    same(read(table([{**row, "parameters": row["params"]} for row in BASE])))  # of params' very name: no doubt
    twice = [{"N": row["params"], "n_params": row["params"], **row} for row in BASE]
    same(read(table([{key: value for key, value in row.items() if key != "params"} for row in twice])))  # one thing


@pytest.mark.parametrize(
    ("chosen", "message"),
    [("params", "not of the form"), ("size=params", "not of the form"), ("params=parms", "no column 'parms'")],
)
def test_a_choice_of_column_that_cannot_be(read, chosen, message):
    with pytest.raises(UsageError, match=message) as caught:
        read(table(BASE), None, [chosen])
    assert caught.value.hint


def test_settings_of_a_run_are_no_metrics_unless_named(read):
    rows = [{**row, "dropout": 0.1 + i, "config/warmup": i, "n_layer": i + 1} for i, row in enumerate(BASE)]
    assert read(table(rows)).metrics == ["loss"]
    assert read(table(rows), ["dropout"]).metrics == ["dropout"]


def test_a_metric_is_found_in_any_case_and_place(read):
    rows = renamed(loss="summary/Val_Loss")
    for name in ("val_loss", "Val_Loss", "summary/Val_Loss"):
        assert read(table(rows), [name]).metrics == ["Val_Loss"]
    rows = [{**row, "VAL_LOSS": 1.0} for row in renamed(loss="val-loss")]
    with pytest.raises(UsageError, match="may be any of: val-loss, VAL_LOSS"):
        read(table(rows), ["val_loss"])


def test_numbers_that_may_be_either_are_refused(read):
    rows = [
        {**row, "params": f"{i + 1},500", "tokens": f"{i + 1},250", "flops": f"{i + 1},125", "loss": f"{i},750"}
        for i, row in enumerate(BASE)
    ]
    with pytest.raises(PixseqError, match="may be a number with three decimals"):
        read(table(rows, ";"))


def test_the_export_of_a_chart_is_called_so(read):
    names = ["Step", "a - val_loss", "a - val_loss__MIN", "a - val_loss__MAX"]
    with pytest.raises(PixseqError, match="no column params or tokens or flops") as caught:
        read(",".join(names) + "\n1,2,3,4\n")
    assert "export of a chart" in caught.value.hint


def test_notes_stand_in_the_numbers_of_the_fit(tmp_path):
    (tmp_path / "runs.csv").write_text(table(renamed(flops=None)))
    numbers = fit.run(tmp_path / "runs.csv", resamples=0)
    assert numbers["counting"] == "6nd" and numbers["notes"] == [
        "there is no column of flops: 6 params tokens (6nd) are taken"
    ]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("Parameters (M)", None),  # a unit that scales: not plain counts
        ("tokens_per_param", None),
        ("tokens_per_second", None),
        ("params_opt", None),
        ("nd", None),
        ("n", None),
        ("Training compute (FLOP)", "flops"),
        ("compute_budget", "budget"),
        ("Display Name", "id"),
    ],
)
def test_near_names_are_not_taken(name, role):
    assert columns.role(name) == role


def run_with(metric, value):
    return Run(None, None, 1e9, 1.0, 1.0, 1e9, None, {metric: value})


@pytest.mark.parametrize("name", ["val_acc", "top5", "accuracy", "test/top-1", "eval_acc1"])
def test_a_share_of_right_answers_is_to_be_large_whatever_its_name(name):
    assert Direction.of(name, [run_with(name, 0.4), run_with(name, 0.9)], maximize=False).ceiling == 1.0
    assert Direction.of("loss", [run_with("loss", 0.4)], maximize=False).ceiling is None
