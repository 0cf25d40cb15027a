"""The check that memory suffices, and what a training does with freed memory."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from factorkit.utils import memory
from factorkit.utils.errors import OutOfMemoryError

CPU = torch.device("cpu")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_require_memory_more_than_is_free_raises_with_both_numbers(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 << 30)
    memory.require_memory(2 << 30, CPU, "They", "use less")
    with pytest.raises(OutOfMemoryError, match=r"They need 3.0 GiB of memory, and 2.0 GiB are free on cpu: use less"):
        memory.require_memory(3 << 30, CPU, "They", "use less")


def test_free_memory_without_the_system_file_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    assert memory.free_memory(CPU) is None
    memory.require_memory(1 << 60, CPU, "They", "use less")
    (tmp_path / "none").write_text("MemTotal: 8 kB\nMemAvailable:       4 kB\n")
    assert memory.free_memory(CPU) == 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
@pytest.mark.skipif(bool(os.environ.keys() & set(memory.MALLOC_SETTINGS)), reason="malloc has settings already")
@pytest.mark.skipif(HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text(), reason="a fault is 2 MiB, not 4 KiB")
def test_freed_memory_is_kept_in_the_block_and_returned_behind_it():
    """In a process of its own: what other tests left in the heap decides where the next tensor lies."""
    program = """
import resource, torch
from factorkit.utils.memory import keep_freed_memory

def count_page_faults():  # of filling memory that is freed at once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(24 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with keep_freed_memory(torch.device("cpu")):
    kept = min(count_page_faults() for _ in range(30))  # a free place without room for alignment is not taken again
print(kept, count_page_faults())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    kept, returned = map(int, done.stdout.split())
    assert kept < 1000 < returned  # of 6144 pages of 4 KiB


@pytest.mark.parametrize("case", ["gpu", "settings", "another library"])
def test_freed_memory_where_malloc_has_no_such_settings_is_left_alone(monkeypatch, case):
    calls = []
    functions = (
        {} if case == "another library" else {"mallopt": lambda *a: calls.append(a), "malloc_trim": calls.append}
    )
    monkeypatch.setattr(
        ctypes, "CDLL", lambda name: type("Library", (), {k: staticmethod(f) for k, f in functions.items()})
    )
    for name in memory.MALLOC_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    if case == "settings":
        monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    with memory.keep_freed_memory(torch.device("cuda" if case == "gpu" else "cpu")):
        pass
    assert calls == []
