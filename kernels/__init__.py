"""Triton kernels, installed as `factorkit.kernels`; `factorkit.ops` says what each of them means.

Every module is a family: its kernels, then the functions that take tensors and launch them. Features lie channels
last in memory (rows x pixels x channels) in any of bf16, fp16 and fp32; arithmetic and statistics are fp32; offsets
are 64-bit; a sum over many programs goes through a buffer of partial sums, never through atomics, so every result is
reproducible.

Triton is optional: :func:`unavailable` says why the kernels cannot run. The families are imported at first use, as
attributes of this package.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType

FAMILIES = ("mask_pyramid", "masked_add", "norm", "norm_backward", "pixel_norm", "region_blend", "region_pool", "tiles")


@lru_cache
def unavailable() -> str | None:
    """None where the kernels can be imported, otherwise the cause."""
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation raises more than ImportError
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    return None


def __getattr__(name: str) -> ModuleType:
    if name not in FAMILIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
