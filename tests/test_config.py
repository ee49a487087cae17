"""Configuration: one home for each default, strict reading, the stated precedence."""

import pytest
import yaml

from pixseq.config import FinetuneFile, GridFile, PretrainFile, as_dict, effective, preset_names, read_preset
from pixseq.errors import UsageError


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_precedence_is_default_preset_file_set_flag(tmp_path):
    file = write(tmp_path, "train: {lr: 0.5, beta2: 0.9}\n")
    config = effective(PretrainFile, "igpt-s", file, ["train.beta2=0.8", "model.n_layer=3"], {"model.n_layer": 4})
    assert config.model.n_layer == 4 and config.model.d_model == 512
    assert config.train.beta2 == 0.8 and config.train.lr == 0.5 and config.train.steps == 1_000_000
    assert config.train.beta1 == 0.9


def test_effective_configuration_is_accepted_back(tmp_path):
    config = effective(PretrainFile, "igpt-m", None, ["train.ema=0.99"])
    assert effective(PretrainFile, None, write(tmp_path, yaml.safe_dump(as_dict(config)))) == config
    assert as_dict(effective(FinetuneFile))["finetune"]["schedule"] == "constant"


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_reads_and_says_what_to_expect(name):
    effective(PretrainFile, name)
    assert {"source", "size", "command", "cost", "expect"} <= read_preset(name)["about"].keys()


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("model:\n  n_layers: 3\n", "unknown key model.n_layers", "n_layer"),
        ("model: {attention: causal}\n", "model.attention is of models of family aim", "one attention pattern: causal"),
        ("model: {family: aim, objective: ar}\n", "model.objective is of models of family igpt", "one objective"),
        ("train:\n  lr: 3e-4x\n", "'3e-4x'", "a number"),
        ("train:\n  lr: fast\n", "'fast'", "a number"),
        ("train:\n  lr: '1_0'\n", "'1_0'", "a number"),
        ("train:\n  lr: 'inf'\n", "'inf'", "a number"),
        ("train:\n  steps: 1e-3\n", "'1e-3'", "a whole number"),
        ("train:\n  steps: 1.55e1\n", "'1.55e1'", "a whole number"),
        ("train: {steps: 1e20}", "'1e20'", "a whole number"),
        ("train: {lr: 1e400}", "train.lr is inf, it must be finite, above 0", ""),
        ("sequence: {order: 3}", "order is 3", "text"),
        ("sequence: {order: 3}", "order is 3", "write it in quotes"),
        ("sequence: {order: [a, 0.1]}", "order is ['a', 0.1], not text", "it must be text: 'a,0.1'"),
        ("train: {steps: 1:30}", "train.steps is '1:30'", "a whole number"),
        ("train: {steps: 017}", "train.steps is '017'", "a whole number"),
        ("train: {augment: no}", "train.augment is 'no'", "one of: none"),
        ("train: {eps: 1.0e-300}", "train.eps is 1e-300, it must be at least 1e-18", ""),
        ("train: {weight_decay: 1.0e+5}", "train.weight_decay 100000 at lr 0.003", "at most 333.333"),
        ("train: {steps: 1.5}", "steps", "whole number"),
        ("train: {steps: true}", "steps", "whole number"),
        ("model: {objective: gpt}", "objective", "ar"),
        ("model: 3", "not a section", ""),
        ("- 1\n", "list", ""),
        ("a: [", "not YAML", ""),
        ("train: {lr: 0.1}\nmodel: {n_layer: 2}\ntrain: {steps: 5}\n", "the key train is given twice", "mend"),
        ("a: !!python/object/apply:os.system ['true']", "not YAML", ""),
        ("model: {n_head: 3, d_model: 16}", "16 cannot be split", "multiple"),
        ("train: {steps: -5}", "-5", ""),
        ("train: {lr: .nan}", "lr", ""),
        ("train: {ema: 1.0}", "ema", ""),
        ("model: {d_model: 1000000000}", "model.d_model is 1000000000, it must be at least 1 and at most 131,072", ""),
        ("model: {n_layer: 1000000}", "model.n_layer is 1000000, it must be at least 1 and at most 1,024", ""),
        ("model: {family: aim, head_width: 1000000}", "model.head_width", ""),
        ("model: {family: aim, image_size: 1000000}", "model.image_size", ""),
        ("train: {batch_size: 1000000000}", "train.batch_size is 1000000000", ""),
        ("train: {steps: 100000000000000}", "train.steps is 100000000000000", ""),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, text, message, hint):
    with pytest.raises(UsageError) as fault:
        effective(PretrainFile, None, write(tmp_path, text))
    assert message in fault.value.message and hint in (fault.value.hint or "")


def test_unknown_presets_and_malformed_sets_are_named(tmp_path):
    with pytest.raises(UsageError, match="igpt-huge"):
        effective(PretrainFile, "igpt-huge")
    with pytest.raises(UsageError, match="key=value"):
        effective(PretrainFile, sets=["train.lr"])
    with pytest.raises(UsageError, match="does not exist"):
        effective(PretrainFile, file=tmp_path / "none.yaml")


def test_words_and_dates_are_what_is_asked_for(tmp_path):
    file = write(tmp_path, "data: {train: 2001-01-01, val: off}\nbudgets: [1.0e+9]\nrecentre: no\n")
    grid = effective(GridFile, None, file)
    assert (grid.data[0].train, grid.data[0].val, grid.recentre) == ("2001-01-01", "off", False)
    assert effective(FinetuneFile, sets=["finetune.refit=on"]).finetune.refit is True


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1e-3", "1.e-3", "10e-4", "'0.001'"])
def test_a_number_without_a_decimal_point_is_one(tmp_path, text):
    """YAML 1.1 reads it as text, which is nobody's wish."""
    file = write(tmp_path, f"train: {{lr: {text}, warmup_epochs: {text}}}\nfinetune: {{lr: {text}, eps: {text}}}\n")
    train = effective(PretrainFile, None, file).train
    assert train.lr == train.warmup_epochs == 1e-3 and isinstance(train.lr, float)
    finetune = effective(FinetuneFile, None, file).finetune
    assert finetune.lr == finetune.eps == 1e-3
    grid = write(tmp_path, "data: {train: a, val: b}\nbudgets: {from: 1e12, to: 1e14}\nshapes: {aspect_ratio: 3e1}\n")
    assert effective(GridFile, None, grid).budgets == (1e12, 1e14)
    assert effective(GridFile, None, grid).shapes.aspect_ratio == 30
    assert effective(PretrainFile, sets=[f"train.lr={text.strip(chr(39))}"]).train.lr == 1e-3


@pytest.mark.parametrize("text", ["1e3", "1E+3", "1.0e3", "1000.0", "10e2"])
def test_a_whole_number_with_an_exponent_is_one(tmp_path, text):
    for config in (
        effective(PretrainFile, None, write(tmp_path, f"train: {{steps: {text}}}\n")),
        effective(PretrainFile, sets=[f"train.steps={text}"]),
    ):
        assert config.train.steps == 1000 and isinstance(config.train.steps, int)
