"""Free memory, checked before work that would exhaust it: Linux ends such a process instead of refusing."""

from __future__ import annotations

from pathlib import Path

import torch

from factorkit.utils.errors import OutOfMemoryError

CHECKED_BYTES = 1 << 28  # smaller needs are not checked
MEMINFO = Path("/proc/meminfo")


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
