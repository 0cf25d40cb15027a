"""The ops of the U-Net, each family in a program of its own (norm_check.cpp ...), under sanitizers."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CXX = shlex.split(os.environ.get("CXX", "c++"))


SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# These checks of undefined behaviour triple the time of the compiler; AddressSanitizer sees what they would.
SANITIZERS += ["-fno-sanitize=null,pointer-overflow,object-size"]
FLAGS = ["-std=c++17", "-fopenmp-simd", "-pthread", "-DFACTORKIT_CLONES=", f"-I{CSRC}"]
FLAGS += ["-DFACTORKIT_LANES=16"]  # of the norm, which then uses vectors of 8 as well


def compile_program(sources: list[Path], program: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [*CXX, *FLAGS, *flags, *map(str, sources), "-o", str(program)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["norm", "projection", "region", "region_pool", "skip"])
def test_op_under_sanitizers_agrees_with_sums_in_double(tmp_path, name):
    (tmp_path / "probe.cpp").write_text("int main() { return 0; }\n")
    probe = compile_program([tmp_path / "probe.cpp"], tmp_path / "probe", *SANITIZERS)
    if probe.returncode or subprocess.run([str(tmp_path / "probe")]).returncode:
        pytest.skip(f"{CXX[0]} has no address and undefined-behaviour sanitizers that work here")
    # Not optimised, as most time goes to the optimiser; the sums in double are, as most time of the program goes there.
    built = compile_program([CSRC / f"{name}_cpu.cpp"], tmp_path / "op.o", *SANITIZERS, "-O0", "-c")
    assert built.returncode == 0, built.stderr[-4000:]
    sources = [HERE / f"{name}_check.cpp", CSRC / "threads_cpu.cpp", tmp_path / "op.o"]
    built = compile_program(sources, tmp_path / "check", *SANITIZERS, "-O1")
    assert built.returncode == 0, built.stderr[-4000:]
    done = subprocess.run([str(tmp_path / "check")], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "passed\n"), done.stdout + done.stderr[-4000:]
