"""One table turns tensors of another program into ours and back, and tells what does not fit it."""

from pathlib import Path

import pytest
import torch

from pixseq.errors import PixseqError
from pixseq.interop.rules import ALL_BUT_LAST_ROW, LAST_ROW, TRANSPOSED, Rule, Words, check_tensors, give, take

RULES = {
    "wte": Rule(("emb",), (4, 3), ALL_BUT_LAST_ROW),
    "sos": Rule(("emb",), (4, 3), LAST_ROW),
    "fc": Rule(("c_fc",), (3, 5), TRANSPOSED),
}
ZEROS = {"c_fc.bias": (5,)}
WORDS = Words(missing=("{file} lacks {names}", "a"), unknown=("{file} has {names} too", "b"))


def test_tensors_come_back_bit_for_bit_and_share_no_memory():
    theirs = {"emb": torch.randn(4, 3), "c_fc": torch.randn(3, 5), "c_fc.bias": torch.zeros(5)}
    ours = take(theirs.__getitem__, RULES)
    assert torch.equal(ours["fc"], theirs["c_fc"].T) and torch.equal(ours["sos"], theirs["emb"][3])
    assert all(x.is_contiguous() for x in ours.values())
    assert len({x.untyped_storage().data_ptr() for x in [*ours.values(), *theirs.values()]}) == 6
    back = give(ours, RULES, ZEROS)
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], x) for name, x in theirs.items())


def test_several_of_theirs_stand_one_below_the_other_in_ours():
    theirs = {name: torch.randn(3, 2) for name in "qkv"}
    rule = Rule(("q", "k", "v"), (3, 2), TRANSPOSED)
    assert torch.equal(take(theirs.__getitem__, {"qkv": rule})["qkv"], torch.cat([x.T for x in theirs.values()]))


@pytest.mark.parametrize(
    "change, told",
    [
        ({"emb": None}, r"m\.bin lacks emb$"),
        ({"c_fc.bias": None}, r"lacks c_fc\.bias$"),
        ({"more": (1,), "again": (1,)}, "has again, more too"),
        ({"c_fc": (5, 3)}, r"c_fc in m\.bin has shape \[5, 3\], and \[3, 5\] fits"),
        ({"c_fc.bias": (1, 5)}, r"c_fc\.bias in m\.bin has shape \[1, 5\]"),
    ],
)
def test_what_does_not_fit_is_told_from_shapes_alone(change, told):
    shapes = {"emb": (4, 3), "c_fc": (3, 5), "c_fc.bias": (5,)}
    check_tensors(Path("m.bin"), shapes, RULES, ZEROS, WORDS)
    found = {name: shape for name, shape in (shapes | change).items() if shape is not None}
    with pytest.raises(PixseqError, match=told):
        check_tensors(Path("m.bin"), found, RULES, ZEROS, WORDS)
