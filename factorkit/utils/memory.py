"""Free memory, checked before work that would exhaust it: Linux ends such a process instead of refusing.

Freed memory, kept by the process for the next step of a training.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from factorkit.utils.errors import OutOfMemoryError

CHECKED_BYTES = 1 << 28  # smaller needs are not checked
MEMINFO = Path("/proc/meminfo")

# Of mallopt in glibc: free bytes at the end of the heap from which they go back to the system (-1: never), and the size
# from which an allocation is mapped by itself, and so goes back when it is freed.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT = ((TRIM_THRESHOLD, -1), (MMAP_THRESHOLD, 32 << 20), (MMAP_THRESHOLD, 1 << 30))  # old ones refuse the last
RETURNED = ((TRIM_THRESHOLD, 64 << 20), (MMAP_THRESHOLD, 32 << 20))  # the most that glibc itself rises to
MALLOC_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes of a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None


def require_memory(needed: int, device: torch.device, what: str, advice: str) -> None:
    """Check that memory suffices.

    Args:
        needed: bytes.
        device: where.
        what: needs them, in the plural.
        advice: what to change.

    Raises:
        OutOfMemoryError: fewer bytes are free.
    """
    free = free_memory(device) if needed > CHECKED_BYTES else None
    if free is not None and needed > free:
        raise OutOfMemoryError(
            f"{what} need {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free on {device}: {advice}"
        )


@contextmanager
def keep_freed_memory(device: torch.device) -> Iterator[None]:
    """Let the process keep what it frees during the block; at the end it goes back to the system.

    glibc returns it after every step of a training on a CPU, and the next step waits for pages of zeros. The process
    grows a little, by some of the largest tensors: 4% for segdiff's steps. This does nothing on another device, with
    another C library, or where the environment has settings of malloc. Blocks are not nested.
    """
    libc: Any = ctypes.CDLL(None) if device.type == "cpu" and os.name == "posix" else None
    if not all(hasattr(libc, name) for name in ("mallopt", "malloc_trim")) or os.environ.keys() & set(MALLOC_SETTINGS):
        yield
        return
    for parameter, value in KEPT:
        libc.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in RETURNED:
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)
