"""How many warps a kernel runs on, found by measuring where FACTORKIT_TUNE=1 asks for it; heuristics decide otherwise.

Blocks are not tried: partial buffers are cut to them, and another order of summing gives other last digits. A kernel
writes its results from its arguments alone, so running it many times leaves what one run leaves. What was found is kept
for each GPU and version of Triton in factorkit's cache folder (``$FACTORKIT_CACHE``, ``~/.cache/factorkit``).
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

WARPS = (1, 2, 4, 8, 16)


def wanted() -> bool:
    return os.environ.get("FACTORKIT_TUNE", "0") not in ("", "0")


def describe(name: str, arguments: tuple, constants: dict) -> str:
    """A launch, as far as its speed depends on it."""
    given = [str(x.dtype).removeprefix("torch.") if isinstance(x, torch.Tensor) else str(x) for x in arguments]
    return " ".join([name, *given, *(f"{key}={value}" for key, value in sorted(constants.items()))])


def best_warps(launch: str, usual: int, run: Callable[[int], None]) -> int:
    """The number of warps with which ``run`` takes the least time, measured once for each ``launch`` and GPU.

    While a CUDA graph is captured nothing is measured: what is not known then runs as usual.
    """
    known = choices(device_file())
    if launch not in known:
        if torch.cuda.is_current_stream_capturing():
            return usual
        times = {warps: measured(lambda warps=warps: run(warps)) for warps in WARPS}
        known[launch] = min(times, key=times.get) if min(times.values()) < math.inf else usual
        keep(device_file(), known)
    return known[launch]


def measured(run: Callable[[], None]) -> float:
    """Milliseconds, infinite where the GPU has not the registers or the memory for it."""
    try:
        return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return math.inf


def device_file() -> Path:
    """Where the choices for the current GPU stand."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "factorkit"
    cache = Path(os.environ.get("FACTORKIT_CACHE") or usual).expanduser()
    return cache / (re.sub(r"\W+", "-", f"warps {gpu} triton {triton.__version__}") + ".json")


@lru_cache
def choices(file: Path) -> dict[str, int]:
    """Warps by launch. A file that cannot be read holds none and is written anew."""
    try:
        found = json.loads(file.read_text())
        return {launch: warps for launch, warps in found.items() if warps in WARPS}
    except (OSError, ValueError, AttributeError):
        return {}


def keep(file: Path, known: dict[str, int]) -> None:
    """Write the choices at once or not at all; without a place to write they hold for this process."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(known, indent=1, sort_keys=True))
        os.replace(draft, file)
    except OSError:
        pass
