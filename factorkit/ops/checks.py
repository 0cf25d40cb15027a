"""Input checks of the rendering ops, made before any address is passed to compiled code.

Values (NaN, the order of offsets) are checked on the CPU only: on CUDA that would wait for the device. The kernels read
no foreign address whatever the values are, and a NaN ray gets no samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def check_rays(origins: Tensor, directions: Tensor) -> None:
    """Raise ValueError unless both are [N, 3], of one float dtype on one device, without NaN or infinity."""
    for name, x in (("origins", origins), ("directions", directions)):
        if x.dim() != 2 or x.shape[1] != 3:
            raise ValueError(f"{name} must be [rays, 3]; got {tuple(x.shape)}")
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must be float32 or float64; got {x.dtype}: 16 bits are too few for rays")
        check_values(name, x)
    check_matches("directions", directions, "origins", origins)


def check_matches(name: str, x: Tensor, like_name: str, like: Tensor, shape: torch.Size | None = None) -> None:
    """Raise ValueError unless x has the dtype, the device and the shape (or ``shape``) of ``like``."""
    shape = like.shape if shape is None else shape
    if x.shape != shape:
        raise ValueError(f"{name} must be {tuple(shape)} to fit {like_name} {tuple(like.shape)}; got {tuple(x.shape)}")
    if x.dtype != like.dtype or x.device != like.device:
        raise ValueError(f"{name} is {x.dtype} on {x.device} but {like_name} is {like.dtype} on {like.device}")


def check_values(name: str, x: Tensor, allow_infinity: bool = False) -> None:
    """Raise ValueError where x holds NaN, or infinity unless allowed."""
    if not is_readable(x):
        return
    bad = x.isnan() if allow_infinity else ~x.isfinite()
    if bad.any():
        row = bad.reshape(bad.shape[0], -1).any(1).nonzero()[0].item()
        values = "NaN" if allow_infinity else "NaN or infinity"
        raise ValueError(f"{name} holds {values}, first in row {row} of {x.shape[0]}")


def check_offsets(offsets: Tensor, samples: int, device: torch.device) -> None:
    """Raise ValueError unless offsets are int64 [rays + 1] on the device, rising from 0 to at most ``samples``."""
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"ray_offsets must be int64 [rays + 1]; got {offsets.dtype} {tuple(offsets.shape)}")
    if offsets.device != device:
        raise ValueError(f"ray_offsets are on {offsets.device} but the samples are on {device}")
    if not is_readable(offsets):
        return
    steps = offsets.diff()
    if offsets[0] != 0 or (steps < 0).any() or offsets[-1] > samples:
        raise ValueError(
            f"ray_offsets must start at 0, never fall, and end at {samples} or before, the number of samples; they go "
            f"from {offsets[0].item()} to {offsets[-1].item()}, smallest step {min(steps.tolist(), default=None)}"
        )


def is_readable(x: Tensor) -> bool:
    """Return whether values can be read for free: on the CPU, and not while torch traces with fake tensors."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and type(x) in (Tensor, torch.nn.Parameter)


def check_box(lower: Sequence[float], upper: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the corners as three floats each; raise ValueError unless every lower one is below the upper."""
    low, high = [float(v) for v in lower], [float(v) for v in upper]
    if len(low) != 3 or len(high) != 3 or not all(-math.inf < a < b < math.inf for a, b in zip(low, high, strict=True)):
        raise ValueError(f"a box needs three finite coordinates a corner, lower < upper in each; got {low} and {high}")
    return low, high


def check_seed(seed: int | None) -> None:
    """Raise ValueError unless the seed is None or fits 63 bits."""
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed}; it must be from 0 to 2^63 - 1, or None for no jitter")
