"""The check that memory suffices."""

from __future__ import annotations

import pytest
import torch

from factorkit.utils import memory
from factorkit.utils.errors import OutOfMemoryError

CPU = torch.device("cpu")


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
