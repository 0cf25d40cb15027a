"""The hash grid in a program of its own (hash_grid_check.cpp): under sanitizers, and through the CUDA kernels, emulated
on the CPU warp by warp."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CXX = shlex.split(os.environ.get("CXX", "c++"))


def build(folder: Path, flags: list[str], *sources: Path) -> Path:
    """The compiled program; skips where the compiler lacks what ``flags`` ask for."""
    common = ["-std=c++17", "-g", "-fopenmp-simd", "-pthread", "-DFACTORKIT_CLONES=", *flags]
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    if subprocess.run([*CXX, *common, str(probe), "-o", str(folder / "probe")], capture_output=True).returncode:
        pytest.skip(f"{CXX[0]} does not take {' '.join(flags)}")
    files = [HERE / "hash_grid_check.cpp", CSRC / "hash_grid_cpu.cpp", CSRC / "threads_cpu.cpp", *sources]
    includes = [f"-I{CSRC}", f"-I{HERE / 'emulation'}"]
    command = [*CXX, *common, *includes, *map(str, files), "-o", str(folder / "check")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder / "check"


def run(program: Path) -> None:
    result = subprocess.run([program], capture_output=True, text=True, timeout=240)
    assert (result.returncode, result.stdout) == (0, "passed\n"), result.stdout + result.stderr[-4000:]


@pytest.mark.parametrize("sanitizers", ["address,undefined,float-cast-overflow", "thread"])
@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path, sanitizers):
    run(build(tmp_path, [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-O1"]))


@pytest.mark.slow
def test_cuda_kernels_agree_with_the_cpu(tmp_path):
    """kernel<<<blocks, threads, 0, stream>>>(...) becomes a call of the emulation's launch."""
    if not Path("/usr/include/ucontext.h").exists():
        pytest.skip("the emulation's fibers need ucontext.h")
    text = (CSRC / "hash_grid_cuda.cu").read_text(encoding="utf-8")
    pattern = r"(\w+(?:<[\w, ]+>)?)<<<(.+?), (k\w+), 0, .+?>>>\("
    text, count = re.subn(pattern, r"launch([](const auto&... a) { \1(a...); }, \2, \3)(", text)
    assert count == 3
    source = tmp_path / "hash_grid_cuda.cpp"
    source.write_text(text)
    # fp32 below four dimensions has the vector atomics of sm_90; the others add number by number.
    # Nothing is optimised: that takes the compiler far longer than the program runs
    flags = ["-DEMULATED_CUDA", "-D__CUDA_ARCH__=900", "-Wno-unknown-pragmas", "-fsanitize=undefined"]
    run(build(tmp_path, flags, source))
