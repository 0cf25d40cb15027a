"""nvcc takes every kernel for every target, and none spills registers to memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("source", sorted(CSRC.glob("*.cu")), ids=lambda path: path.stem)
def test_no_kernel_spills(source, tmp_path):
    targets = [f"-gencode=arch=compute_{a},code={code}_{a}" for a, code in ((80, "sm"), (90, "sm"), (90, "compute"))]
    command = [NVCC, "-std=c++17", "-O3", *targets, "-Xptxas", "-v", "-c", str(source), "-o", str(tmp_path / "out.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    names = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'", result.stderr)
    registers = re.findall(r"Used (\d+) registers", result.stderr)
    assert len(spills) == len(names) == len(registers) == 2 * result.stderr.count("for 'sm_90'")
    print(
        "\n".join(
            f"{target} {used:>4} registers  {name}" for (name, target), used in zip(names, registers, strict=True)
        )
    )
    assert all(pair == ("0", "0") for pair in spills), [
        n for n, s in zip(names, spills, strict=True) if s != ("0", "0")
    ]
