"""The loops over threads in a program of their own (threads_check.cpp); also under ThreadSanitizer, where it works."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
OPENMP = ["-Wl,--no-as-needed", "-lgomp"]  # in the program, as PyTorch's is in its process


@pytest.mark.parametrize("flags", [[], ["-fsanitize=thread"], OPENMP], ids=["own", "sanitizer", "openmp"])
def test_parallel_for_visits_every_index_once(tmp_path, flags):
    program = tmp_path / "check"
    command = [*shlex.split(os.environ.get("CXX", "g++")), "-std=c++17", "-O1", "-g", "-pthread", f"-I{CSRC}"]
    if flags:
        (tmp_path / "probe.cpp").write_text("int main() { return 0; }\n")
        probe = subprocess.run([*command, str(tmp_path / "probe.cpp"), *flags, "-o", str(program)], capture_output=True)
        if probe.returncode or subprocess.run([str(program)], capture_output=True).returncode:
            pytest.skip(f"{' '.join(flags)} does not work with this compiler here")
    sources = [str(HERE / "threads_check.cpp"), str(CSRC / "threads_cpu.cpp")]
    built = subprocess.run([*command, *sources, *flags, "-ldl", "-o", str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-4000:]
    arguments = ["without fork"] if flags == ["-fsanitize=thread"] else []
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stderr[-4000:]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted as Linux lists them")
def test_ops_run_in_the_threads_that_torch_has_started():
    """Of fewer images than threads too: a smaller team would end some, and torch would start others."""
    program = """
import ctypes, os, torch
from factorkit import ops
threads = lambda: set(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
use_torch = lambda: (torch.randn(1000, 1000) + 1).exp()
use_torch()
before = threads()
for images in (6, 2):
    x = torch.randn(images, 16, 32, 32).to(memory_format=torch.channels_last)
    ops.group_norm_silu(x, torch.ones(16), torch.zeros(16), groups=4)
    use_torch()
print(len(before), len(threads() ^ before), int(hasattr(ctypes.CDLL(None), "GOMP_parallel")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, changed, has_openmp = map(int, done.stdout.split())
    if not has_openmp:
        pytest.skip("this torch has no OpenMP with that interface")
    assert before >= 3 and changed == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
@pytest.mark.parametrize("before", ["", "norm()"], ids=["unused", "used"])
def test_op_in_a_forked_child_does_not_wait_for_threads_of_the_parent(before):
    program = f"""
import os, torch
from factorkit import ops
torch.set_num_threads(2)
x = torch.randn(4, 16, 8, 8).to(memory_format=torch.channels_last)
norm = lambda: ops.group_norm_silu(x, torch.ones(16), torch.zeros(16), groups=4)
torch.randn(1000, 1000).exp()
{before}
child = os.fork()
if child == 0:
    norm()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "7\n"
