"""The affine part of both norms: the modulation by the time embedding, and the gradients of its tensors.

Equation: y = gain * normal + offset with gain = weight (1 + scale), offset = bias (1 + scale) + shift.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from factorkit.kernels import tiles
from factorkit.kernels.tiles import kernel, launch, load, scratch, span
from torch import Tensor

Affine = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # weight, bias [C], scale, shift [rows, C]


@dataclass
class Statistics:
    """Statistics of a group norm: y = slope * z + offset for each (row, channel), and the moments behind it."""

    slope: Tensor  # [rows, C]
    offset: Tensor  # [rows, C]
    moments: Tensor  # [2 or 3, rows, groups]: mean, 1/std and, for the masked norm, the sum over pixels of m + floor

    @property
    def mass(self) -> Tensor | None:
        """The sums of the weights, for the masked norm."""
        return self.moments[2] if len(self.moments) == 3 else None


@triton.jit
def modulation(weight, bias, scale, shift, row, c, channels, inside):
    """Return gain and offset of y = gain * normal + offset, with the time embedding folded in."""
    gain = load(weight + c, inside)
    offset = load(bias + c, inside)
    if scale is not None:
        factor = 1.0 + load(scale + row * channels + c, inside)
        gain = gain * factor
        offset = offset * factor + load(shift + row * channels + c, inside)
    return gain, offset


@kernel
def gradient_sums_kernel(
    partial,
    weight,
    bias,
    scale,
    shift,
    means,
    rstds,
    mass,
    summed,
    moment,
    on_value,
    on_square,
    mask_terms,
    d_scale,
    d_shift,
    on_input,
    channels,
    chunks,
    groups,
    size,
    blocks_g,
    pixels,
    eps,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // blocks_g).to(tl.int64)
    g = span(pid % blocks_g * BLOCK_G, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    c = g[:, None] * size + d[None, :]
    inside = (g < groups)[:, None] & (d < size)[None, :]

    plain = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)  # sum over pixels of d_pre
    times = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)  # and of d_pre * z
    on_z = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)  # and of w * z or, without moments, of d_z
    kinds: tl.constexpr = 2 if on_input is None else 3
    for i in range(chunks):
        at = partial + (row * chunks + i) * kinds * channels + c
        plain += load(at, inside)
        times += load(at + channels, inside)
        if on_input is not None:
            on_z += load(at + 2 * channels, inside)
    if means is not None:
        mean = load(means + row * groups + g, g < groups)
        rstd = tl.load(rstds + row * groups + g, mask=g < groups, other=1.0)
        times = (times - mean[:, None] * plain) * rstd[:, None]  # d_pre * normalised z
        gain, _ = modulation(weight, bias, scale, shift, row, c, channels, inside)
        d1 = tl.sum(gain * plain, 1)
        d2 = tl.sum(gain * times, 1)
        total = tl.zeros([BLOCK_G], tl.float32) + pixels
        if mass is not None:
            total = tl.load(mass + row * groups + g, mask=g < groups, other=1.0)
        value = (rstd * mean * d2 - d1) * rstd / (size * total)
        square = -rstd * rstd * d2 / (size * total)
        from_mean = square[:, None] * (on_z - (mean * total)[:, None])
        on_z = rstd[:, None] * (gain * plain - d1[:, None] / size) + from_mean  # sum of d_z
        tl.store(on_value + row * channels + c, tl.broadcast_to(value[:, None], [BLOCK_G, BLOCK_D]), mask=inside)
        tl.store(on_square + row * channels + c, tl.broadcast_to(square[:, None], [BLOCK_G, BLOCK_D]), mask=inside)
        if mask_terms is not None:
            # The masks' normalisation subtracts the weighted mean over pixels of the weights' gradient.
            second = 1.0 / (rstd * rstd) - eps + mean * mean
            term = tl.where(g < groups, size * (value * mean + 0.5 * square * second), 0.0)
            tl.store(mask_terms + row * blocks_g + pid % blocks_g, tl.sum(term, 0))
    tl.store(summed + row * channels + c, plain, mask=inside)
    tl.store(moment + row * channels + c, times, mask=inside)
    if d_scale is not None:
        on_scale = times * load(weight + c, inside) + plain * load(bias + c, inside)
        tl.store(d_scale + row * channels + c, on_scale, mask=inside)
        tl.store(d_shift + row * channels + c, plain, mask=inside)
    if on_input is not None:
        tl.store(on_input + row * channels + c, on_z, mask=inside)


@kernel
def affine_kernel(
    summed,
    moment,
    on_input,
    scale,
    d_weight,
    d_bias,
    d_input,
    rows,
    channels,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = span(tl.program_id(0) * BLOCK_C, BLOCK_C)
    on_weight = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    on_bias = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    on_z = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for r0 in range(0, rows, BLOCK_R):
        row = span(r0, BLOCK_R)
        inside = (row < rows)[:, None] & (c < channels)[None, :]
        at = row[:, None] * channels + c[None, :]
        factor = 1.0
        if scale is not None:
            factor = 1.0 + load(scale + at, inside)
        on_weight += load(moment + at, inside) * factor
        on_bias += load(summed + at, inside) * factor
        if on_input is not None:
            on_z += load(on_input + at, inside)
    tl.store(d_weight + c, tl.sum(on_weight, 0), mask=c < channels)
    tl.store(d_bias + c, tl.sum(on_bias, 0), mask=c < channels)
    if on_input is not None:
        tl.store(d_input + c, tl.sum(on_z, 0), mask=c < channels)


@dataclass
class GradientSums:
    """Terms of d_z = d_pre * slope + w * (on_value + on_square * z), w the pixel's weight, and the affine gradients."""

    on_value: Tensor | None  # [rows, C]
    on_square: Tensor | None  # [rows, C]
    mask_terms: Tensor | None  # [rows, parts], to be summed
    affine: tuple[Tensor | None, ...]  # gradients for weight, bias, scale, shift and input_bias


def gradient_sums(
    partial: Tensor,
    pixels: int,
    affine: Affine,
    input_bias: Tensor | None,
    groups: int,
    eps: float,
    stats: Statistics | None,
) -> GradientSums:
    """Finalise partial sums [rows, chunks, 2, C] of d_pre and d_pre * z (d_pre * normal if ``stats`` is None).

    With an ``input_bias`` there are 3: the last are those of w * z (d_z if ``stats`` is None).
    """
    weight, bias, scale, shift = affine
    rows, chunks, _, channels = partial.shape
    size = channels // groups
    block_g, block_d = tiles.group_tile(groups, size)
    blocks_g = tiles.ceil_div(groups, block_g)
    summed, moment = scratch(rows, channels, like=partial), scratch(rows, channels, like=partial)
    on_value = on_square = mask_terms = d_scale = d_shift = on_input = d_input = None
    if stats is not None:
        on_value, on_square = scratch(rows, channels, like=partial), scratch(rows, channels, like=partial)
        mask_terms = None if stats.mass is None else scratch(rows, blocks_g, like=partial)
    if scale is not None:
        d_scale, d_shift = scale.new_empty(scale.shape), shift.new_empty(shift.shape)
    if input_bias is not None:
        on_input, d_input = scratch(rows, channels, like=partial), input_bias.new_empty(input_bias.shape)
    moments = (None, None, None) if stats is None else (*stats.moments[:2], stats.mass)
    outputs = (summed, moment, on_value, on_square, mask_terms, d_scale, d_shift, on_input)
    sizes = (channels, chunks, groups, size, blocks_g, pixels, eps)
    blocks = {"BLOCK_G": block_g, "BLOCK_D": block_d}
    launch(gradient_sums_kernel, rows * blocks_g, partial, *affine, *moments, *outputs, *sizes, **blocks, warps=2)
    d_weight, d_bias = weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    tensors = (summed, moment, on_input, scale, d_weight, d_bias, d_input)
    launch(affine_kernel, tiles.ceil_div(channels, 16), *tensors, rows, channels, BLOCK_R=64, BLOCK_C=16, warps=4)
    return GradientSums(on_value, on_square, mask_terms, (d_weight, d_bias, d_scale, d_shift, d_input))
