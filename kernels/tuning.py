"""Number of warps per kernel launch, measured on the GPU where FACTORKIT_TUNE=1 asks for it.

Only warps are tuned: the layout of partial sums depends on the block sizes, and another order of summation changes the
last digits. A kernel writes its results from its arguments alone, so it may run many times. Results are stored per GPU
and Triton version in factorkit's cache folder (``$FACTORKIT_CACHE``, default ``~/.cache/factorkit``).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
import triton

WARP_COUNTS = (1, 2, 4, 8, 16)


def is_enabled() -> bool:
    return os.environ.get("FACTORKIT_TUNE", "0") not in ("", "0")


def describe_launch(name: str, arguments: tuple, constants: dict) -> str:
    """Return a key of everything that the speed of a launch depends on."""
    parts = [str(x.dtype).removeprefix("torch.") if isinstance(x, torch.Tensor) else str(x) for x in arguments]
    return " ".join([name, *parts, *(f"{key}={value}" for key, value in sorted(constants.items()))])


def best_warps(launch: str, default: int, run: Callable[[int], None]) -> int:
    """Return the number of warps with which ``run`` is fastest, measured once for each ``launch`` and GPU.

    Nothing is measured while a CUDA graph is captured: an unknown launch then uses ``default``.
    """
    table = load_table(table_path())
    if launch not in table:
        if torch.cuda.is_current_stream_capturing():
            return default
        times = {warps: measure(lambda warps=warps: run(warps)) for warps in WARP_COUNTS}
        table[launch] = min(times, key=times.get) if min(times.values()) < math.inf else default
        save_table(table_path(), table)
    return table[launch]


def measure(run: Callable[[], None]) -> float:
    """Return milliseconds, or infinity where the GPU lacks registers or memory for it."""
    try:
        return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return math.inf


def table_path() -> Path:
    """Return the file with the measured warps of the current GPU."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "factorkit"
    cache = Path(os.environ.get("FACTORKIT_CACHE") or default).expanduser()
    return cache / (re.sub(r"\W+", "-", f"warps {gpu} triton {triton.__version__}") + ".json")


@lru_cache
def load_table(path: Path) -> dict[str, int]:
    """Load warps by launch. An unreadable file counts as empty and is overwritten."""
    try:
        return {launch: warps for launch, warps in json.loads(path.read_text()).items() if warps in WARP_COUNTS}
    except (OSError, ValueError, AttributeError):
        return {}


def save_table(path: Path, table: dict[str, int]) -> None:
    """Write the table atomically; if the folder is not writable the choices last for this process only."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(table, indent=1, sort_keys=True))
        os.replace(draft, path)
    except OSError:
        pass
