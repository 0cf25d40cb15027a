"""The kernels on a machine that has neither a GPU nor, perhaps, Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHED = Path(__file__).parent / "launched"
ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_every_kernel_under_the_interpreter_passes():
    """In a process of its own: Triton decides when it is imported whether kernels are compiled or interpreted."""
    pytest.importorskip("triton", reason="the kernels' tests need triton: pip install -e '.[test]' on Linux")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(LAUNCHED)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout


@pytest.mark.slow
def test_op_without_triton_warns_once_and_falls_back():
    program = """
import sys, warnings
sys.modules["triton"] = None  # as if it were not installed
import torch
from factorkit import kernels, ops
from factorkit.ops import dispatch
assert "triton cannot be imported" in kernels.unavailable()
x, w = torch.randn(2, 4, 3, 3), torch.ones(4)
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    dispatch.run_triton_kernels_on("cpu")  # as on a GPU without Triton
    for _ in range(2):
        y = ops.group_norm_silu(x, w, w, groups=2)
torch.testing.assert_close(y, ops.reference.norm_silu(x, None, None, w, w, None, None, None, 2, "group"))
(warning,) = [str(h.message) for h in heard]
assert "pip install" in warning and "slower" in warning, warning
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
