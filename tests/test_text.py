"""Text of another hand is safe where it goes, and still told apart."""

import json

import pytest

from pixseq import text

STEERING = ["\x1b]0;title\x07", "a\nb", "\u202egpj.exe", "\udcff", "\u200b", "\x9b31m"]


@pytest.mark.parametrize("name", STEERING)
def test_nothing_that_steers_a_terminal_comes_through(name):
    made = [text.one_line(name), text.one_line(name, " "), text.shown(name), text.few([name]), text.markdown(name)]
    made += [text.code_span(name), text.json_line(json.dumps(name, ensure_ascii=False))]
    assert all(each.isprintable() for each in made)
    lines = [text.printable(name), text.code_block(name, "yaml")]
    assert all(each.replace("\n", "").isprintable() for each in lines)
    assert json.loads(text.json_line(json.dumps(name, ensure_ascii=False))) == name
    assert text.shown(name) != text.shown(name + "\x1b") and text.shown("grün 模型") == "grün 模型"


def test_names_are_counted_beyond_the_first():
    assert text.few("abcdefg") == "a, b, c, d, e and 2 more" and text.few("ab", 1) == "a and 1 more"
    assert text.few("abcde") == "a, b, c, d, e" and text.few([]) == ""


def test_a_path_is_one_word_of_a_command():
    assert text.word("runs/a b's") == "'runs/a b'\"'\"'s'" and text.word("runs/a-1.zarr") == "runs/a-1.zarr"
