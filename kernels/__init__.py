"""Triton kernels, installed as ``factorkit.kernels``; :mod:`factorkit.ops` defines what each of them computes.

Each module is a family: its kernels, and the functions that take tensors and launch them. Features are channels last
in memory (rows x pixels x channels) in bf16, fp16 or fp32; arithmetic and statistics are fp32; offsets are 64-bit. A
sum over many programs goes through a buffer of partial sums, never through atomics, so every result is reproducible.

Triton is optional: :func:`unavailable` returns why the kernels cannot run. The families are imported at first use, as
attributes of this package.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType

FAMILIES = ("group_norm", "mask_pyramid", "masked_add", "pixel_norm", "region_blend", "region_pool", "tiles")


@lru_cache
def unavailable() -> str | None:
    """Return why the kernels cannot be imported, or None where they can."""
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation raises more than ImportError
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    return None


def __getattr__(name: str) -> ModuleType:
    if name not in FAMILIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
