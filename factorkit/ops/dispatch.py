"""How an op reaches torch's dispatcher, and the one way round it (FACTORKIT_REFERENCE=1)."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor


def use_reference() -> bool:
    """True when the user asked for the plain differentiable reference of every op (for debugging)."""
    return os.environ.get("FACTORKIT_REFERENCE", "0") not in ("", "0")


def dense_format(x: Tensor) -> torch.memory_format:
    """channels_last for a tensor that lies so and only so, else contiguous: ops keep the layout of their input."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def full_precision(run: Callable) -> Callable:
    """Out of autocast's reach: it would cast the matrix products behind statistics and tokens to half precision."""

    @functools.wraps(run)
    def outside(first: Tensor, *args):
        with torch.autocast(first.device.type, enabled=False):
            return run(first, *args)

    return outside
