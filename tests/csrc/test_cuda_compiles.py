"""nvcc takes every kernel for every target, and none spills registers to memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

TARGETS = (80, 90, 100, 120)
CSRC = Path(__file__).resolve().parents[2] / "csrc"
NVCC = shutil.which("nvcc")


def kernel_names(mangled: list[str]) -> list[str]:
    """As the source has them, without namespaces and parameters; as they are where there is no c++filt."""
    if shutil.which("c++filt") is None:
        return mangled
    plain = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"^void |factorkit::|\(anonymous namespace\)::", "", line) for line in plain.splitlines()]


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("source", sorted(CSRC.glob("*.cu")), ids=lambda path: path.stem)
@pytest.mark.slow
def test_no_kernel_spills(source, tmp_path, capsys):
    targets = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in TARGETS]
    # code for devices alone: tests/test_build.py compiles that of the host
    command = [NVCC, "-std=c++17", "-O3", "--threads=2", *targets, "-Xptxas", "-v", "--fatbin", str(source)]
    result = subprocess.run([*command, "-o", str(tmp_path / "out.fatbin")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'", result.stderr)
    registers = re.findall(r"Used (\d+) registers", result.stderr)
    assert len(spills) == len(kernels) == len(registers) == len(TARGETS) * result.stderr.count("for 'sm_90'")
    names = kernel_names([name for name, _ in kernels])
    used: dict[str, dict[str, str]] = {}
    for name, (_, target), count in zip(names, kernels, registers, strict=True):
        used.setdefault(name.split("(")[0], {})[target] = count
    with capsys.disabled():
        print(f"\n{source.name}: registers on {', '.join(f'sm_{target}' for target in TARGETS)}")
        for name, counts in sorted(used.items()):
            print("".join(f"{counts[f'sm_{target}']:>5}" for target in TARGETS), f" {name}")
    assert all(pair == ("0", "0") for pair in spills), [
        n for n, s in zip(names, spills, strict=True) if s != ("0", "0")
    ]
