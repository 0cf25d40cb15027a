"""The norm in a program of its own (norm_check.cpp), under sanitizers."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CXX = shlex.split(os.environ.get("CXX", "c++"))


@pytest.mark.slow
def test_norm_under_sanitizers_agrees_with_sums_in_double(tmp_path):
    flags = ["-std=c++17", "-O1", "-g", "-fopenmp-simd", "-pthread", "-DFACTORKIT_CLONES=", f"-I{CSRC}"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    (tmp_path / "probe.cpp").write_text("int main() { return 0; }\n")
    probe = [*CXX, *flags, str(tmp_path / "probe.cpp"), "-o", str(tmp_path / "probe")]
    if subprocess.run(probe, capture_output=True).returncode or subprocess.run([str(tmp_path / "probe")]).returncode:
        pytest.skip(f"{CXX[0]} has no address and undefined-behaviour sanitizers that work here")
    sources = [HERE / "norm_check.cpp", CSRC / "norm_cpu.cpp", CSRC / "threads_cpu.cpp"]
    built = subprocess.run(
        [*CXX, *flags, *map(str, sources), "-o", str(tmp_path / "check")], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[-4000:]
    done = subprocess.run([str(tmp_path / "check")], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "passed\n"), done.stdout + done.stderr[-4000:]
