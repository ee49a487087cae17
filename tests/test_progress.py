"""Talk on a terminal shows foreign names as they are."""

import pytest

from pixseq import progress


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
    safe = progress.printable(name)
    assert f"probe {safe}" in drawn and f"at {safe}" in drawn and "37/50 images" in drawn
    with progress.board(["cell", name]) as board:
        board.show(lambda: [["r8", name]])
        board.say(f"done {name}")
    drawn = terminal()
    assert drawn.count(safe) >= 3 and f"done {safe}" in drawn


def test_a_stream_has_no_end_to_show(terminal):
    with progress.track("encode", None, "images") as bar:
        bar.advance(37)
    assert "37 images" in (drawn := terminal()) and "None" not in drawn
    assert progress.Bar("encode", None, "images").line().startswith("encode: 0 images, 0/s")
