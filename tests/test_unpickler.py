"""CIFAR's pickles: read as numpy of any age wrote them, and never run."""

import os
import pickle
import pickletools

import numpy as np
import pytest

from pixseq.data import unpickle
from pixseq.errors import PixseqError

DATA = np.arange(12, dtype=np.uint8).reshape(2, 6)

# Python 2 and numpy 1 wrote this: the opcodes of CIFAR's own files (protocol 2, byte strings, numpy.core).
PYTHON_2 = (
    b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87R"
    b"(K\x01K\x02K\x06\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    b"\x89U\x0c" + DATA.tobytes() + b"tbU\x06labels]q\x05(K\x03K\x04eU\x09filenames]U\x05\xe9.pngau."
)


def test_reads_what_python_2_wrote():
    content = unpickle.load(PYTHON_2, "batch")
    np.testing.assert_array_equal(content["data"], DATA)
    assert content["labels"] == [3, 4] and content["filenames"] == [b"\xe9.png"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("key", ["data", b"data"])
def test_reads_what_this_numpy_writes_at_every_protocol(protocol, key):
    arrays = {key: DATA, "transposed": DATA.T, "big": DATA.astype(">i4"), "labels": [1, 2], "nested": (1, {2})}
    content = unpickle.load(pickle.dumps(arrays, protocol), "batch")
    np.testing.assert_array_equal(content["data"], DATA)
    np.testing.assert_array_equal(content["transposed"], DATA.T)
    np.testing.assert_array_equal(content["big"], DATA)
    assert content["labels"] == [1, 2] and content["nested"] == (1, {2})


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_check_of_sizes_goes_through_the_steps_that_pickletools_finds(protocol):
    """Cut anywhere, both find the end missing; with a number of a value that is too high, both stop at it."""
    whole = pickle.dumps({"data": DATA, "labels": [1, -2, 1 << 40, 0.5], "names": ["a", b"b" * 300]}, protocol)
    for data in (whole, *(whole[:n] for n in range(len(whole)))):
        complete = True
        try:
            list(pickletools.genops(data))
        except Exception:
            complete = False
        if complete:
            unpickle._check_sizes(data)
        else:
            with pytest.raises((ValueError, IndexError)):
                unpickle._check_sizes(data)
    high = {0: b"]p9\n.", 1: b"]q\x09."}.get(protocol, b"\x80\x02]r\xff\xff\xff\x7f.")
    with pytest.raises(unpickle.UnsafePickle, match="it numbers a value"):
        unpickle._check_sizes(high)


class Gadget:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "function, arguments",
    [(os.system, ("touch {}",)), (eval, ("open('{}', 'w')",)), (os.mkdir, ("{}",)), (getattr, (np, "savetxt"))],
)
def test_a_gadget_does_not_run(tmp_path, protocol, function, arguments):
    ran = tmp_path / "ran"
    gadget = Gadget(function, *(a.format(ran) if isinstance(a, str) else a.__name__ for a in arguments))
    with pytest.raises(PixseqError, match=r"batch: this pickle is refused: it asks for"):
        unpickle.load(pickle.dumps({b"data": DATA, b"labels": [gadget]}, protocol), "batch")
    assert not ran.exists()


@pytest.mark.parametrize("held", [np.array([{"a": 1}], dtype=object), np.zeros(2, dtype=[("a", "i4")])])
def test_only_arrays_of_numbers_are_made(held):
    with pytest.raises(PixseqError, match="batch"):
        unpickle.load(pickle.dumps({"data": held}, 2), "batch")


def test_damage_is_one_clear_error_at_every_length():
    for length in range(len(PYTHON_2)):
        with pytest.raises(PixseqError, match=r"^batch"):
            unpickle.load(PYTHON_2[:length], "batch")
    for i in range(len(PYTHON_2)):  # a flipped byte either still reads or is refused; never another exception
        flipped = bytearray(PYTHON_2)
        flipped[i] ^= 0x41
        try:
            unpickle.load(bytes(flipped), "batch")
        except PixseqError as error:
            assert error.message.startswith("batch")
