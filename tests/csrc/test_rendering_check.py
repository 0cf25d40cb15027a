"""The rendering headers in a program of their own (rendering_check.cpp): under sanitizers, and through the CUDA
kernels, emulated on the CPU warp by warp."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
OPS = ("composite", "gaussians", "intersect", "march", "resample")
CXX = shlex.split(os.environ.get("CXX", "c++"))


def build(folder: Path, flags: list[str], sources: list[Path]) -> Path:
    """The compiled program."""
    program = folder / "check"
    includes = [f"-I{CSRC}", f"-I{HERE / 'emulation'}"]
    common = ["-std=c++17", "-fopenmp-simd", "-pthread", "-DFACTORKIT_CLONES="]
    command = [
        *CXX,
        *common,
        *flags,
        *includes,
        str(HERE / "rendering_check.cpp"),
        str(CSRC / "threads_cpu.cpp"),
        *map(str, sources),
        "-o",
        str(program),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return program


def run(program: Path) -> None:
    result = subprocess.run([program], capture_output=True, text=True, timeout=240)
    assert (result.returncode, result.stdout) == (0, "passed\n"), result.stdout + result.stderr[-4000:]


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    tried = subprocess.run([*CXX, *flags, str(probe), "-o", str(tmp_path / "probe")], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"{CXX[0]} has no address and undefined-behaviour sanitizers: {tried.stderr.strip()[:200]}")
    run(build(tmp_path, flags, [CSRC / f"{name}_cpu.cpp" for name in OPS]))


@pytest.mark.slow
def test_cuda_kernels_agree_with_the_cpu(tmp_path):
    """kernel<<<blocks, threads, 0, stream>>>(...) becomes a call of the emulation's launch."""
    if not Path("/usr/include/ucontext.h").exists():
        pytest.skip("the emulation's fibers need ucontext.h")
    sources = [CSRC / f"{name}_cpu.cpp" for name in OPS]
    for name in OPS:
        text = (CSRC / f"{name}_cuda.cu").read_text(encoding="utf-8")
        pattern = r"(\w+(?:<[\w, ]+>)?)<<<(.+?), (k\w+), 0, .+?>>>\("
        text, count = re.subn(pattern, r"launch([](const auto&... a) { \1(a...); }, \2, \3)(", text)
        assert count
        sources.append(tmp_path / f"{name}_cuda.cpp")
        sources[-1].write_text(text)
    run(build(tmp_path, ["-DEMULATED_CUDA", "-Wno-unknown-pragmas"], sources))
