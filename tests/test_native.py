"""Code that a compiler makes when it is first used is loaded where that is safe."""

import mmap
from pathlib import Path

import pytest

from pixseq import native


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not say what is loaded")
def test_code_that_would_bring_a_second_openmp_of_llvm_is_not_loaded(tmp_path):
    """Two copies end the program; a library of the same name, or gcc's, is none."""

    def is_loaded(needed):
        source = tmp_path / "x.c"
        source.write_text(f'const char needed[] = "{needed}";')
        return native.library(source, []) is not None

    if not is_loaded("libm.so.6"):
        pytest.skip("there is no C compiler here")
    assert is_loaded("libomp.so.5")
    theirs = tmp_path / "libiomp5.so"
    theirs.write_bytes(b"\0")
    with theirs.open("r+b") as file, mmap.mmap(file.fileno(), 1):
        assert not is_loaded("libomp.so.5")
        assert is_loaded("libiomp5.so") and is_loaded("libgomp.so.1")
