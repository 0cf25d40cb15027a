"""Triton kernels, installed as `factorkit.kernels`; `factorkit.ops` says what each of them means.

Every module is a family: its kernels, then the functions that take tensors and launch them. Features lie channels last
in memory (rows x pixels x channels) in any of bf16, fp16 and fp32; arithmetic and statistics are fp32; offsets are 64-bit;
a sum over many programs goes through a buffer of partial sums, never through atomics, so every result is reproducible.

Triton is optional: :func:`unavailable` says why the kernels cannot run; nothing else here may be imported then.
"""

from __future__ import annotations

import importlib
from functools import lru_cache


@lru_cache
def unavailable() -> str | None:
    """None where the kernels can be imported, otherwise the cause."""
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation raises more than ImportError
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    return None
