"""Talk on a terminal shows foreign names as they are."""

import re
import time

import pytest

from pixseq import progress
from pixseq.text import printable


@pytest.fixture
def terminal(monkeypatch, capsys):
    """What rich draws on a terminal, as text."""
    monkeypatch.setattr(progress, "_on_terminal", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then draws into what capsys captures, too
    monkeypatch.setenv("COLUMNS", "200")
    return lambda: capsys.readouterr().err


@pytest.mark.parametrize("name", ["[/b]", "[bold]x", "[link=", ":smile:", "a\x1b]0;title\x07b"])
def test_names_are_no_markup(terminal, name):
    with progress.track(f"probe {name}", 50, "images") as bar:
        bar.note(f"at {name}")
        bar.advance(37)
    drawn = terminal()
    safe = printable(name)
    assert f"probe {safe}" in drawn and f"at {safe}" in drawn and "37/50 images" in drawn
    with progress.board(["cell", name]) as board:
        board.show(lambda: [["r8", name]])
        board.say(f"done {name}")
    drawn = terminal()
    assert drawn.count(safe) >= 3 and f"done {safe}" in drawn


def test_times_are_whole_in_80_columns(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with progress.track("probe", 2, "layers") as bar:
        bar.note("layer 0: 0.8583 held out, 0.7333 test")
        bar.advance()
    drawn = terminal()
    assert re.search(r"\d:\d\d:\d\d", drawn) and "0.7333 test" in drawn and "…" not in drawn


def test_rates_are_plain_numbers():
    rates = [progress.per_second(rate) for rate in (0.1234, 12.34, 999.4, 999.6, 12_345.6, 1_234_567.8)]
    assert rates == ["0.123/s", "12.3/s", "999/s", "1,000/s", "12,346/s", "1,234,568/s"]


def test_a_stream_has_no_end_to_show(terminal):
    with progress.track("encode", None, "images") as bar:
        bar.advance(37)
    assert "37 images" in (drawn := terminal()) and "None" not in drawn
    assert progress.Bar("encode", None, "images").line().startswith("encode: 0 images, none yet")


def test_a_first_step_that_takes_long_shows_that_it_runs(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_enabled", True)
    monkeypatch.setattr(progress, "FIRST_LINE_SECONDS", 0.05)
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.05)
    with progress.track("pretrain", 3, "steps"):
        said = ""
        for _ in range(100):
            time.sleep(0.05)
            said += capsys.readouterr().err
            if said.count("pretrain: 0/3 steps, none yet after") > 1:
                break
        else:
            pytest.fail(said)
    time.sleep(0.2)
    capsys.readouterr()
    time.sleep(0.2)
    assert capsys.readouterr().err == ""  # not beyond its end


def test_what_can_spoil_a_result_is_said_last(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_enabled", False)
    progress.enable()
    progress.warn("the pictures are dark")
    progress.note("a palette of 16")
    progress.last_words()
    assert capsys.readouterr().err.splitlines() == [
        "warning: the pictures are dark",
        "note: a palette of 16",
        "warning: the pictures are dark",
    ]
    progress.warn("just now")
    progress.last_words()
    assert capsys.readouterr().err.splitlines() == ["warning: just now"]


def test_durations_are_for_people():
    assert [progress.clock(s) for s in (42, 190, 7500, 86400 * 12 + 4 * 3600)] == ["42s", "3m10s", "2h05m", "12d04h"]


def test_what_is_done_is_said_unless_something_else_is_sooner(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_enabled", True)
    monkeypatch.setattr(progress, "SOON_SECONDS", 0.05)
    progress.say_soon("features: of a by b")
    progress._soon.join()
    assert capsys.readouterr().err == "features: of a by b\n"
    progress.say_soon("features: of a by b")
    progress.say_soon("computing on cpu in bf16")
    progress._soon.join()
    assert capsys.readouterr().err == "features: of a by b; computing on cpu in bf16\n"
    monkeypatch.setattr(progress, "SOON_SECONDS", 60)
    progress.say_soon("features: of a by b")
    progress.tell("error: a is missing")
    progress._soon.join(5)
    assert not progress._soon.is_alive() and capsys.readouterr().err == "error: a is missing\n"
