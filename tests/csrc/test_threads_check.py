"""The loops over threads in a program of their own (threads_check.cpp); also under ThreadSanitizer, where it works."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


@pytest.mark.parametrize("sanitizer", [None, "thread"])
def test_parallel_for_visits_every_index_once(tmp_path, sanitizer):
    program = tmp_path / "check"
    common = [*shlex.split(os.environ.get("CXX", "g++")), "-std=c++17", "-O1", "-g", "-pthread", f"-I{CSRC}"]
    if sanitizer:
        common.append(f"-fsanitize={sanitizer}")
        (tmp_path / "probe.cpp").write_text("int main() { return 0; }\n")
        probe = subprocess.run([*common, str(tmp_path / "probe.cpp"), "-o", str(program)], capture_output=True)
        if probe.returncode or subprocess.run([str(program)], capture_output=True).returncode:
            pytest.skip(f"-fsanitize={sanitizer} does not work with this compiler here")
    sources = [str(HERE / "threads_check.cpp"), str(CSRC / "threads_cpu.cpp")]
    built = subprocess.run([*common, *sources, "-o", str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-4000:]
    arguments = ["without fork"] if sanitizer else []
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stderr[-4000:]
