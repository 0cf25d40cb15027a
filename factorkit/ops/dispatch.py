"""How an op reaches torch's dispatcher, and the one way round it (FACTORKIT_REFERENCE=1)."""

from __future__ import annotations

import os

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
