"""A peer of ``group_norm_silu``: GroupNorm and SiLU in two Triton kernels, in the style of SGLang for diffusion models.

One program for each group takes its moments, a second kernel reads the features again. They lie plane by plane
[rows, channels, pixels], so that a group is contiguous. Forward only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # numbers that a program reads at a time


@triton.jit
def moments_of_groups(x, mean, rstd, size, eps, block: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    sums = tl.zeros((block,), tl.float32)
    squares = tl.zeros((block,), tl.float32)
    for begin in range(0, size, block):
        at = begin + tl.arange(0, block)
        values = tl.load(x + group * size + at, mask=at < size, other=0.0).to(tl.float32)
        sums += values
        squares += values * values
    center = tl.sum(sums) / size
    tl.store(mean + group, center)
    tl.store(rstd + group, tl.rsqrt(tl.maximum(tl.sum(squares) / size - center * center, 0.0) + eps))


@triton.jit
def apply_and_activate(
    x, out, mean, rstd, weight, bias, scale, shift, channels, channels_of_group, pixels, block: tl.constexpr
):
    plane = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    channel = plane % channels
    group = plane // channels_of_group  # of all rows
    factor = 1.0 + tl.load(scale + plane).to(tl.float32)
    slope = tl.load(weight + channel) * factor * tl.load(rstd + group)
    offset = tl.load(bias + channel) * factor + tl.load(shift + plane).to(tl.float32)
    values = tl.load(x + plane * pixels + at, mask=at < pixels, other=0.0).to(tl.float32)
    values = (values - tl.load(mean + group)) * slope + offset
    values = values * tl.sigmoid(values)
    tl.store(out + plane * pixels + at, values.to(out.dtype.element_ty), mask=at < pixels)


def two_pass_group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float
) -> Tensor:
    """Compute SiLU(GroupNorm(x) * (1 + scale) + shift) of x [N, C, H, W]; scale and shift [N, C]."""
    x = x.contiguous()
    rows, channels, height, width = x.shape
    pixels, out = height * width, torch.empty_like(x)
    mean, rstd = torch.empty(2, rows * groups, device=x.device).unbind(0)
    moments_of_groups[(rows * groups,)](x, mean, rstd, channels // groups * pixels, eps, block=BLOCK)
    grid = (rows * channels, triton.cdiv(pixels, BLOCK))
    sizes = (channels, channels // groups, pixels)
    apply_and_activate[grid](x, out, mean, rstd, weight, bias, scale, shift, *sizes, block=BLOCK)
    return out
