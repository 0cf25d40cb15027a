"""What the rendering ops refuse before any address is passed on.

Values (NaN, the order of offsets) are looked at on the CPU only: on CUDA that would wait for the device. There the
kernels themselves take no foreign address whatever the values are, and a NaN ray gets no samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_rays(origins: Tensor, directions: Tensor) -> None:
    """Two tensors [N, 3] of one float dtype on one device, without NaN or infinity.

    Raises:
        ValueError: they are anything else.
    """
    for name, x in (("origins", origins), ("directions", directions)):
        if x.dim() != 2 or x.shape[1] != 3:
            raise ValueError(f"{name} must be [rays, 3]; got {tuple(x.shape)}")
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must be float32 or float64; got {x.dtype}: rays lose too much in 16 bits")
        check_values(name, x)
    check_alike("directions", directions, "origins", origins)


def check_alike(name: str, x: Tensor, like_name: str, like: Tensor, shape: torch.Size | None = None) -> None:
    """The dtype, the device and the shape (that of ``like`` unless given) that belong together."""
    shape = like.shape if shape is None else shape
    if x.shape != shape:
        raise ValueError(f"{name} must be {tuple(shape)} to fit {like_name} {tuple(like.shape)}; got {tuple(x.shape)}")
    if x.dtype != like.dtype or x.device != like.device:
        raise ValueError(f"{name} is {x.dtype} on {x.device} but {like_name} is {like.dtype} on {like.device}")


def check_values(name: str, x: Tensor, infinite: bool = False) -> None:
    """No NaN, and no infinity unless allowed."""
    if not _visible(x):
        return
    bad = x.isnan() if infinite else ~x.isfinite()
    if bad.any():
        first = bad.reshape(bad.shape[0], -1).any(1).nonzero()[0].item()
        raise ValueError(
            f"{name} holds {'NaN' if infinite else 'NaN or infinity'}, first in row {first} of {x.shape[0]}"
        )


def check_offsets(offsets: Tensor, samples: int, device: torch.device) -> None:
    """int64 [rays + 1] on this device: from 0 on, never falling, at most ``samples``."""
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"ray_offsets must be int64 [rays + 1]; got {offsets.dtype} {tuple(offsets.shape)}")
    if offsets.device != device:
        raise ValueError(f"ray_offsets are on {offsets.device} but the samples are on {device}")
    if not _visible(offsets):
        return
    if offsets[0] != 0 or (offsets.diff() < 0).any() or offsets[-1] > samples:
        raise ValueError(
            f"ray_offsets must start at 0, never fall, and end at {samples} or before, the number of samples; "
            f"they go from {offsets[0].item()} to {offsets[-1].item()}, smallest step {_smallest_step(offsets)}"
        )


def _smallest_step(offsets: Tensor) -> int | None:
    return int(offsets.diff().min()) if offsets.shape[0] > 1 else None


def _visible(x: Tensor) -> bool:
    """Whether values can be looked at for free: not on a device, not while torch.compile or fake tensors trace."""
    from torch._subclasses.fake_tensor import FakeTensor

    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)


def check_box(lower, upper) -> tuple[list[float], list[float]]:
    """Corners as three floats each, every lower one below the upper."""
    lower, upper = [float(v) for v in lower], [float(v) for v in upper]
    if (
        len(lower) != 3
        or len(upper) != 3
        or not all(-math.inf < a < b < math.inf for a, b in zip(lower, upper, strict=True))
    ):
        raise ValueError(
            f"a box needs three finite coordinates a corner, lower < upper in each; got {lower} and {upper}"
        )
    return lower, upper


def check_seed(seed: int | None) -> None:
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed}; it must be from 0 to 2^63 - 1, or None for no jitter")
