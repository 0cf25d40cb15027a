"""nvcc takes every kernel for every target, and none spills registers to memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

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
    targets = [f"-gencode=arch=compute_{a},code={code}_{a}" for a, code in ((80, "sm"), (90, "sm"), (90, "compute"))]
    command = [NVCC, "-std=c++17", "-O3", *targets, "-Xptxas", "-v", "-c", str(source), "-o", str(tmp_path / "out.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'", result.stderr)
    registers = re.findall(r"Used (\d+) registers", result.stderr)
    assert len(spills) == len(kernels) == len(registers) == 2 * result.stderr.count("for 'sm_90'")
    names = kernel_names([name for name, _ in kernels])
    used: dict[str, dict[str, str]] = {}
    for name, (_, target), count in zip(names, kernels, registers, strict=True):
        used.setdefault(name.split("(")[0], {})[target] = count
    with capsys.disabled():
        print(f"\n{source.name}: registers on sm_80 and sm_90")
        for name, counts in sorted(used.items()):
            print(f"{counts['sm_80']:>5} {counts['sm_90']:>4}  {name}")
    assert all(pair == ("0", "0") for pair in spills), [
        n for n, s in zip(names, spills, strict=True) if s != ("0", "0")
    ]
