"""The command line keeps its promises: stdout is data, stderr is talk, the exit code is the verdict."""

import errno
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from program import called, good, until

from pixseq.cli import COMMANDS, GROUPS
from pixseq.cli.brief import in_brief
from pixseq.cli.output import emit
from pixseq.cli.stdio import Patient
from pixseq.config import preset_names, read_preset

ALL = [[name] for name in COMMANDS] + [[group, name] for group, (_, commands) in GROUPS.items() for name in commands]
TINY = ["--set", "model.n_layer=2", "--set", "model.n_head=2", "--set", "model.d_model=16", "--device", "cpu"]


def process(*words, folder):
    """One of its own, where that is what is looked at."""
    command = [sys.executable, "-m", "pixseq", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.fixture(scope="module")
def helps():
    return {tuple(command): good(*command, "--help") for command in ALL}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with pictures, palettes, tokens and a model, all made by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    for i in range(40):
        path = folder / "good" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(path)
    for line in (
        "palette fit good --colors 16 --size 8 -o p.json",
        "palette fit good --colors 8 --size 8 -o p8.json",
        "encode good --palette p.json --size 8 -o t.zarr",
        "encode good --palette p8.json --size 8 -o t8.zarr",
        "encode good --scheme pixels --size 448 --limit 2 -o x.zarr",
        f"pretrain t.zarr --preset igpt-s {' '.join(TINY)} --steps 2 --batch-size 4 -o m",
    ):
        good(*line.split(), "--quiet", folder=folder)
    return folder


def test_help_imports_nothing_heavy():
    heavy = "{'torch', 'numpy', 'zarr', 'sklearn', 'scipy', 'PIL'}"
    code = f"import sys; from pixseq.cli import app\ntry: app(['--help'])\nfinally: print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "scaling" in run.stdout and run.stdout.rstrip().endswith("set()")


@pytest.mark.parametrize("command", ALL, ids=" ".join)
def test_every_command_has_help_with_an_example_that_parses(command, helps):
    out = helps[tuple(command)]
    example = re.search(r"Example: (pixseq .*)", " ".join(out.split())).group(1)
    assert example.startswith(f"pixseq {' '.join(command)} ")
    for flag in re.findall(r"--[a-z-]+", example):
        assert flag in out
    for flag in ("--json", "--quiet", "--overwrite"):
        assert flag in out


@pytest.mark.parametrize("group", [[], *([name] for name in GROUPS)], ids=" ".join)
def test_lists_of_commands_tell_each_whole_in_80_columns(group):
    listed = good(*group, "--help").partition("Commands:")[2].splitlines()[1:]
    assert listed and all(len(line) <= 80 and not line.endswith("...") for line in listed)


def test_commands_are_listed_in_the_order_of_the_chain():
    listed = re.findall(r"(?m)^  (\w+)  ", good("--help").partition("Commands:")[2])
    chain = ["palette", "encode", "pretrain", "features", "probe", "finetune", "evaluate", "sample"]
    assert [name for name in listed if name in chain] == chain


def test_help_uses_a_wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert 100 < max(map(len, good("encode", "--help").splitlines())) <= 120


@pytest.mark.parametrize("preset", preset_names())
def test_the_commands_that_a_preset_names_parse(preset, helps):
    about = read_preset(preset)["about"]
    for command in filter(None, [about.get("pictures"), about["command"], *about.get("measure", [])]):
        program, name, *words = command.split()
        assert program == "pixseq" and {word for word in words if word.startswith("--")} <= set(helps[name,].split())


def test_the_list_of_options_grows_only_on_purpose(helps):
    """A flag is a promise. Add to FLAGS when you mean to make one."""
    flags = {flag for command in ALL for flag in re.findall(r"(?m)^\s+(?:-\w, )?(--[a-z-]+)", helps[tuple(command)])}
    assert flags == set(FLAGS.split())


FLAGS = """
    --attention --augment --background --baseline --batch-size --below --bit-depth --bootstrap --budget
    --budget-limit --by-position --c --calibrate --cell --classes --colors --column --columns --compile
    --completions --concat --config --cost --count --device --drop --dry-run --dtype --epochs --filter --first
    --floor --from --gen-weight --growth --head --heads --help --images --jobs --json --keep --label-column
    --labels-per-class --layer --layers --limit --lineage --lora-alpha --lora-rank --lora-targets --low-data-choice
    --lr --masks --max-images --max-iter --max-pixels --maximize --memory --method --metric --metrics --micro-batch
    --nanogpt --objective --on-error --order --out --overwrite --palette --part --patience --peer --pictures --plot
    --pool --precision --preset --probe-layers --prompt --quiet --random-init --recentre --refine-steps --refit
    --resize --resized-side --resolution --resume --rounds --save-minutes --scale --scheme --seconds --seed --set
    --size --solver --split --standardize --start-flops --steps --target --temperature --test --threads --time-limit
    --tokens --tokens-per-pixel --top-k --top-p --trials --val --val-fraction --verify --views --weight-decay
    --weights --window --workers
"""


def test_stdout_is_the_path_or_one_json_line(work):
    out = good("encode", "digits", "--palette", "p.json", "--size", 8, "--limit", 20, "-o", "d.zarr", folder=work)
    assert out == "d.zarr"
    manifest = json.loads(good("show", out, "--verify", "--json", folder=work))
    assert manifest["kind"] == "tokens" and manifest["id"].startswith("sha256:")
    made = json.loads(good("decode", out, "-o", "d.png", "--json", folder=work))
    assert made == json.loads(good("show", "d.png", "--json", folder=work))
    apart = process("evaluate", "m", "t.zarr", "--json", folder=work)
    assert apart.stdout.count("\n") == 1 and "nats_per_token" in json.loads(apart.stdout)


def test_quiet_is_quiet_and_talk_goes_to_stderr(work):
    encode = ["encode", "good", "--palette", "p.json", "--size", "8", "-o"]
    run = process(*encode, "talk.zarr", folder=work)
    assert run.stdout == "talk.zarr\n" and "labels: 2 classes" in run.stderr
    run = process(*encode, "hush.zarr", "--quiet", folder=work)
    assert run.stderr == ""


def test_dry_run_shows_the_recipe_and_makes_nothing(work):
    for preset in preset_names():
        aim = preset.startswith("aim-")
        args = ["pretrain", "x.zarr" if aim else "t.zarr", "--preset", preset, "--dry-run", "--json", "--device", "cpu"]
        plan = json.loads(good(*args, folder=work))
        assert plan["parameters"] > 0 and plan["training_flops"] > 0 and plan["flops_counted"] == "exact"
        assert plan["model"].items() >= ({"family": "aim"} if aim else {"objective": "ar"}).items()
        assert plan["preset.expect"]
    plain = called("pretrain", "t.zarr", "--dry-run", "--device", "cpu", folder=work)
    assert "note: the shape is the default" in plain.err and "igpt-cifar16" in plain.err
    assert not list(work.glob("*.partial"))


def test_export_takes_numbers_or_none(work, tmp_path):
    numbers, out = str(tmp_path / "e.json"), str(tmp_path / "exported")
    good("evaluate", "m", "t.zarr", "-o", numbers, folder=work)
    good("export", "hf", "m", "-o", out, folder=work)
    good("export", "hf", "m", "--metrics", numbers, "-o", out, "--overwrite", folder=work)


def test_configuration_of_a_checkpoint_is_accepted_back(work):
    plan = good("pretrain", "t.zarr", "--config", "m/config.yaml", "--dry-run", "--json", folder=work)
    assert json.loads(plan)["model"] == {"n_layer": 2, "n_head": 2, "d_model": 16, "objective": "ar"}


class Gadget:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


@pytest.fixture(scope="module")
def bad(work):
    """The same folder with bad input beside the good."""
    for name in ("text", "trunc", "empty", "evil"):
        (work / name).mkdir()
    (work / "text" / "x.png").write_text("not a picture")
    (work / "trunc" / "x.png").write_bytes((work / "good" / "a" / "0.png").read_bytes()[:60])
    (work / "broken.json").write_text('{"pixseq": ')
    (work / "evil" / "data_batch_1").write_bytes(pickle.dumps({b"data": Gadget(), b"labels": [0]}, protocol=2))
    np.savez(work / "objects.npz", images=np.array([{"a": 1}], dtype=object))
    shutil.copytree(work / "t.zarr", work / "holed.zarr")
    (work / "holed.zarr" / "tokens" / "c" / "0" / "0").unlink()
    shutil.copytree(work / "m", work / "half")
    weights = (work / "half" / "model.safetensors").read_bytes()
    (work / "half" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (work / "bad.yaml").write_text("model:\n  n_layers: 3\n")
    (work / "sci.yaml").write_text("train:\n  lr: 3e-4x\n")
    (work / "red[bold]x[red]").mkdir()
    return work


ENCODE = "encode {} --palette p.json -o o.zarr"
PRETRAIN = "pretrain t.zarr --steps 1 -o o "
CASES = {
    "a part that is none": (2, ENCODE.format("digits") + " --val-fraction 0.1 --part test"),
    "a pooling that is none": (2, "features m t.zarr --pool max -o f.zarr"),
    "a probe that is none": (2, "probe f.zarr --test f.zarr --method svm"),
    "missing source": (1, ENCODE.format("nowhere")),
    "empty folder": (1, ENCODE.format("empty")),
    "text named .png": (1, ENCODE.format("text")),
    "truncated picture": (1, ENCODE.format("trunc")),
    "pickle with code": (1, ENCODE.format("evil")),
    "object array": (1, ENCODE.format("objects.npz")),
    "folder with markup in its name": (1, ENCODE.format("red[bold]x[red]")),
    "existing target": (1, "encode good --palette p.json --size 8 -o t.zarr"),
    "broken palette": (1, "encode good --palette broken.json -o o.zarr"),
    "tokens for a palette": (1, "encode good --palette t.zarr -o o.zarr"),
    "no palette": (2, "encode good -o o.zarr"),
    "unknown scheme": (2, "encode good --palette p.json --scheme cmyk -o o.zarr"),
    "no such split": (1, "encode good --palette p.json --split test -o o.zarr"),
    "zero colours": (2, "palette fit good --colors 0 -o o.json"),
    "another palette": (1, "features m t8.zarr -o o.zarr"),
    "missing chunk": (1, "pretrain holed.zarr --steps 1 -o o"),
    "truncated weights": (1, "features half t.zarr -o o.zarr"),
    "unknown key": (2, PRETRAIN + "--config bad.yaml"),
    "text for a number in YAML": (2, PRETRAIN + "--config sci.yaml"),
    "unknown preset": (2, PRETRAIN + "--preset igpt-huge"),
    "heads do not divide": (2, PRETRAIN + "--set model.n_head=3 --set model.d_model=16"),
    "negative steps": (2, "pretrain t.zarr --steps -5 -o o"),
    "no output": (2, "pretrain t.zarr --steps 1"),
    "val fraction": (2, PRETRAIN + "--val-fraction 1.5"),
    "no such device": (2, PRETRAIN + "--device tpu"),
    "no such precision": (2, PRETRAIN + "--precision fp8"),
    "tokens to probe": (1, "probe t.zarr --test t.zarr"),
    "baseline form": (2, "probe f.zarr --test f.zarr --baseline x"),
    "sample tokens": (1, "sample t.zarr -o o.png"),
    "keep out of range": (2, "sample m --prompt t.zarr --keep 1.5 -o o.png"),
    "keep of no row": (2, "sample m --prompt t.zarr --keep 0.01 -o o.png"),
    "unwritable target": (1, "sample m -o /proc/nope/o.png"),
    "show nothing": (1, "show nowhere"),
    "show a foreign file": (1, "show good/a/0.png"),
    "show a broken file": (1, "show broken.json"),
    "unknown option": (2, "show p.json --colour"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_one_line_a_hint_and_no_target(bad, case):
    code, line = CASES[case]
    before = sorted(p.name for p in bad.iterdir())
    got, out, err = called(*line.split(), folder=bad)
    assert got == code, err
    assert "Traceback" not in err and out == ""
    if code == 1:
        assert "\nerror: " in f"\n{err}" and "\n\nhint: " in err, err  # on a busy machine after what it does so long
    assert sorted(p.name for p in bad.iterdir()) == before
    assert not (bad / "pwned").exists()


@pytest.mark.parametrize(("name", "given"), [("encode", ""), ("probe", "f.zarr"), ("scaling forecast", "fit.json")])
def test_what_is_missing_is_shown_by_an_example(name, given):
    code, out, err = called(*name.split(), *given.split())
    assert (code, out) == (2, "") and "error: Missing" in err
    assert f"hint: for example pixseq {name} " in err and f"pixseq {name} --help" in err


def test_a_thousand_names_from_a_shell_are_told_in_one_line():
    code, _, err = called("encode", *(f"photos/{i}.jpg" for i in range(1000)), "--palette", "p.json", "-o", "o.zarr")
    assert code == 2 and len(err) < 500 and "their folder, or - and their paths on stdin" in err


@pytest.mark.parametrize("words", ["pretrain t.zarr --steps abc", "bench --rounds 0", "sample m -o y.png --top-p x"])
def test_a_value_that_is_refused_is_named(bad, words):
    err = called(*words.split(), folder=bad).err
    assert f": '{words.split()[-1]}' should be" in err and "Input" not in err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("encode good --palette m -o o.zarr", "`pixseq show MODEL --lineage` names the palette"),
        ("encode good --palette good -o o.zarr", "hint: a palette is a .json of `pixseq palette fit`"),
        ("features m good -o o.zarr", "pictures become one by `pixseq encode`"),
        ("probe t.zarr --test t.zarr", "what `pixseq features MODEL TOKENS` makes"),
        ("probe m --test t.zarr", "what `pixseq features MODEL TOKENS` makes"),
        ("encode good --size 8 -o o.zarr", "`pixseq palette fit good --size 8 -o palette.json`"),
        ("pretrain t.zarr --config nowhere.yaml -o o", "check the path: it names a YAML file"),
        ("show nowhere.partial", "check the path"),
        ("encode https://host/x.zip --palette p.json -o o.zarr", "nothing is downloaded: fetch it first"),
        ("encode good --palette p.json --out", "see pixseq"),
        ("evaluate m t8.zarr", "`pixseq show m --lineage` names it"),
    ],
)
def test_a_wrong_kind_is_told_the_command_that_helps(bad, words, hint):
    assert hint in called(*words.split(), folder=bad).err


def test_a_stage_ends_with_what_came_out(work):
    """The last words of those that make an artifact, before its path."""
    model = [*TINY, "--steps", 2, "--batch-size", 4, "-o"]
    for words, said in (
        (["palette", "fit", "good", "--colors", 4, "--size", 8, "-o", "b.json"], "4 colours for 2,560 pixels, mean sq"),
        (["encode", "good", "--palette", "p.json", "--size", 8, "--views", 2, "-o", "b.zarr"], "80 rows of 64 tokens"),
        (["encode", "good", "--scheme", "pixels", "--size", 8, "-o", "px.zarr"], "40 pictures"),
        (["pretrain", "t.zarr", "--val-fraction", 0.2, *model, "b"], "2 steps in 0s; best at step "),
        (["pretrain", "t.zarr", *model, "c"], "nothing tells how good it is"),
        (["features", "m", "t.zarr", "-o", "bf.zarr"], "3 layers of width 16 of 40 rows"),
        (["features", "pixels", "t.zarr", "-o", "bp.zarr"], "1 layer of width 192 of 40 rows"),
    ):
        code, _, err = called(*words, folder=work)
        last = err.splitlines()[-1]
        assert code == 0 and last.startswith(words[0]) and re.search(re.sub("in .s", "in ..?s", said), last), err


def test_a_summary_of_another_version_is_no_fault():
    assert in_brief({"stage": "pretrain", "summary": {"steps": 3}}) is None
    assert in_brief({"stage": "features", "summary": {"layers": 1, "width": None, "rows": 2}}) is None


def test_encode_ends_with_how_pictures_were_converted(work, tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 9)).save(tmp_path / "a.png")
    Image.new("CMYK", (8, 8)).save(tmp_path / "b.jpg")
    Image.new("RGB", (8, 8)).save(tmp_path / "c.png")
    err = called("encode", tmp_path, "--scheme", "gray", "--size", 8, "-o", "conv.zarr", folder=work).err
    assert "3 rows of 64 tokens (converted: 1 transparent, on --background; 1 CMYK)" in err


def test_show_tells_a_recipe_key_by_key(work):
    shown = good("show", "m", folder=work)
    assert re.search(r"(?m)^config\.train\.lr  ", shown) and " ..." not in shown.partition("inputs.")[0]


def test_sigterm_exits_130_and_says_how_to_go_on(work):
    args = [sys.executable, "-m", "pixseq", "pretrain", "t.zarr", *TINY, "--steps", "100000", "-o", "long", "--quiet"]
    run = subprocess.Popen(args, cwd=work, stderr=subprocess.PIPE, text=True)
    log = work / "long.partial" / "log.jsonl"
    until(lambda: log.exists() and log.stat().st_size, lambda: run.poll() is None)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate()
    assert run.returncode == 130 and "--resume" in err and not (work / "long").exists()
    assert (work / "long.partial" / "resume" / "state.pt").is_file()


@pytest.mark.parametrize("words", ["show p.json", "--help", "palette --help", "encode --help", "--version"])
def test_a_closed_pipe_is_silent(work, words):
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run(
        [sys.executable, "-m", "pixseq", *words.split()], cwd=work, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert run.returncode == 141 and run.stderr == ""


@pytest.mark.parametrize("streams", [">&- 2>&- <&-", "2>&-", "2>/dev/full"])
def test_streams_that_are_closed_or_full_are_no_fault(work, streams):
    """A daemon or cron starts it so. What is meant for a closed stream must not reach the files it writes either."""
    if "full" in streams and not os.path.exists("/dev/full"):
        pytest.skip("no such device here")
    name = f"c{len(streams)}.zarr"
    command = f"exec {sys.executable} -m pixseq encode good --palette p.json --size 8 -o {name} {streams}"
    run = subprocess.run(["/bin/sh", "-c", command], cwd=work, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == ("" if ">&- 2" in streams else f"{name}\n")
    good("show", name, "--verify", folder=work)


def test_a_full_disk_behind_stdout_is_said_and_nothing_is_undone(work):
    if not os.path.exists("/dev/full"):
        pytest.skip("no such device here")
    with open("/dev/full", "w") as full:
        args = ["encode", "good", "--palette", "p.json", "--size", "8", "-o", "f.zarr"]
        command = [sys.executable, "-m", "pixseq", *args]
        run = subprocess.run(command, cwd=work, stdout=full, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 1 and "what was made stands" in run.stderr and (work / "f.zarr").is_dir()


def test_a_terminal_that_goes_away_is_no_fault(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text=""):
            raise OSError(errno.EIO, "Input/output error")

        flush = write

        def fileno(self):
            return null.fileno()

    with open(os.devnull, "w") as null:
        stream = Patient(Gone())
        assert stream.write("lost") == 4 and stream.flush() is None and not stream.isatty()
        monkeypatch.setattr(sys, "stdout", Gone())
        assert emit("lost") is None  # what was made is made


def test_shell_completion_is_offered():
    env = {**os.environ, "_PIXSEQ_COMPLETE": "complete_bash", "COMP_WORDS": "pixseq pal", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['pixseq']; from pixseq.cli import main; main()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.stdout.split() == ["palette"]


ROOT = Path(__file__).parent.parent


def commands_in(text: str) -> list[list[str]]:
    """The pixseq commands of a text, continuation lines joined."""
    joined = text.replace("\\\n", " ")
    return [line.split() for line in re.findall(r"(?m)^\s*(?:\w+=\$\()?(pixseq [^)\n#|>]*)", joined)]


def test_every_command_has_words_for_what_it_does_where_that_takes_long():
    for path in (ROOT / "pixseq" / "cli").glob("*.py"):
        assert "talk(quiet)" not in path.read_text(), path


DOCUMENTS = [Path("README.md"), Path("pipelines/layers.mk"), Path("pipelines/digits/summary.py")]
DOCUMENTS += [
    path.relative_to(ROOT)
    for path in ROOT.glob("pipelines/*/*")
    if path.suffix == ".md" or (path.name == "Makefile" and "guide.mk" not in path.read_text())  # runs what is read
]


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_documented_commands_use_options_that_exist(path, helps):
    found = commands_in((ROOT / path).read_text())
    assert found or path.name == "README.md" != str(path)  # a pipeline's may leave its commands to the Makefile
    for _, *words in found:
        command = tuple(words[:2]) if words[0] in GROUPS else tuple(words[:1])
        assert command in helps, words
        for flag in (word for word in words if word.startswith("--")):
            assert flag.split("=")[0] in helps[command], f"{path}: {flag} of {command}"


def check_summary(out, printed):
    """The end of the quickstart: its three numbers are those measured, its pictures exist, its commands are sound."""
    text = (out / "summary.txt").read_text()
    assert printed.endswith(text)
    probe, tuned = (json.loads((out / name).read_text()) for name in ("probe.json", "evaluation.json"))
    raw = next(row for row in probe["baselines"] if row["name"] == "raw pixels")
    wanted = [row["test_accuracy"] for row in (raw, probe)] + [tuned["accuracy"]]
    assert re.findall(r"(?m)^ +([\d.]+) %  (raw pixels|layer \d|fine-tuned)", text) == [
        (f"{100 * share:.1f}", name)
        for share, name in zip(wanted, ("raw pixels", f"layer {probe['best_layer']}", "fine-tuned"))
    ]
    pictures = re.findall(r"(?m)^  (/.*\.png)$", text)
    assert len(pictures) == 4 and all(Path(picture).is_file() for picture in pictures)


def test_the_digits_pipeline_runs_and_runs_no_more(tmp_path):
    """A copy with few steps: from palette to samples; again: nothing; after a change of config: what depends on it."""
    shutil.copytree(ROOT / "pipelines", tmp_path / "pipelines", ignore=shutil.ignore_patterns("out"))
    folder = tmp_path / "pipelines" / "digits"
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(
        re.sub(r"steps: \d+", "steps: 6", config).replace("train:", "train:\n  steps: 6")
    )
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def make(*options):
        run = subprocess.run(
            ["make", "--no-print-directory", "LIMIT=300", *options, "-C", folder],
            capture_output=True,
            text=True,
            env=env,
        )
        assert run.returncode == 0, run.stderr
        return run.stdout

    first = make()
    out = folder / "out"
    for name in ("probe.json", "probe.png", "loss.png", "samples.png", "completions.png", "evaluation.json"):
        assert (out / name).is_file()
    assert "best layer" in first
    check_summary(out, first)
    assert "pixseq" not in make()
    time.sleep(1)
    (folder / "config.yaml").touch()
    again = make("--dry-run")
    assert "pixseq pretrain" in again and "pixseq probe" in again and "pixseq encode" not in again
