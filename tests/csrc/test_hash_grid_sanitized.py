"""csrc's hash grid under AddressSanitizer, UndefinedBehaviorSanitizer and, for its threads, ThreadSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CXX = os.environ.get("CXX", "c++")


@pytest.mark.skipif(shutil.which(CXX) is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("sanitizers", ["address,undefined,float-cast-overflow", "thread"])
def test_hash_grid_is_clean(tmp_path, sanitizers):
    program = tmp_path / "program"
    flags = ["-DFACTORKIT_CLONES=", "-std=c++17", "-O1", "-g", "-fopenmp-simd", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    sources = [HERE / "hash_grid_sanitized.cpp", CSRC / "hash_grid_cpu.cpp"]
    subprocess.run([CXX, *flags, *map(str, sources), "-pthread", "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "passed\n", result.stdout + result.stderr
