"""From partial sums over pixels to numbers for each (row, channel): the small step between two passes."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from factorkit.kernels import heuristics
from factorkit.kernels.tiles import buffer, kernel, launch, load, span
from torch import Tensor


@dataclass
class Statistics:
    """Of a group norm: y = slope * z + offset for each (row, channel), and the moments behind it."""

    slope: Tensor  # [rows, C]
    offset: Tensor  # [rows, C]
    mean: Tensor  # [rows, groups]
    rstd: Tensor  # [rows, groups]
    mass: Tensor | None  # [rows]: sum over pixels of m + floor, for the masked norm


@triton.jit
def modulation(weight, bias, scale, shift, row, c, channels, inside):
    """Gain and offset of y = gain * normal + offset, with the time embedding folded in."""
    gain = load(weight + c, inside)
    offset = load(bias + c, inside)
    if scale is not None:
        factor = 1.0 + load(scale + row * channels + c, inside)
        gain = gain * factor
        offset = offset * factor + load(shift + row * channels + c, inside)
    return gain, offset


@kernel
def statistics_kernel(
    partial_u,
    partial_s,
    mass_parts,
    weight,
    bias,
    scale,
    shift,
    slope,
    offset,
    means,
    rstds,
    mass,
    channels_u,
    channels_s,
    chunks_u,
    chunks_s,
    chunks_mass,
    share_u,
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
    channels = channels_u + channels_s
    inside = (g < groups)[:, None] & (d < size)[None, :]

    first = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    second = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    in_u = inside & (c < channels_u)
    for i in range(chunks_u):
        at = partial_u + ((row // share_u) * chunks_u + i) * 2 * channels_u + c
        first += load(at, in_u)
        second += load(at + channels_u, in_u)
    if partial_s is not None:
        in_s = inside & (c >= channels_u)
        for i in range(chunks_s):
            at = partial_s + (row * chunks_s + i) * 2 * channels_s + (c - channels_u)
            first += load(at, in_s)
            second += load(at + channels_s, in_s)
    total = pixels * 1.0
    if mass_parts is not None:
        total = 0.0
        for i in range(chunks_mass):
            total += tl.load(mass_parts + row * chunks_mass + i)
        tl.store(mass + row, total)

    count = total * size
    mean = tl.sum(first, 1) / count
    variance = tl.maximum(tl.sum(second, 1) / count - mean * mean, 0.0)
    rstd = 1.0 / tl.sqrt(variance + eps)
    gain, shifted = modulation(weight, bias, scale, shift, row, c, channels, inside)
    a = gain * rstd[:, None]
    tl.store(slope + row * channels + c, a, mask=inside)
    tl.store(offset + row * channels + c, shifted - mean[:, None] * a, mask=inside)
    tl.store(means + row * groups + g, mean, mask=g < groups)
    tl.store(rstds + row * groups + g, rstd, mask=g < groups)


def statistics(
    parts_u: tuple[Tensor, Tensor | None],
    parts_s: Tensor | None,
    rows: int,
    pixels: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
) -> Statistics:
    """Statistics from the partial sums of u (with those of the weights, for the masked norm) and of the masked skip."""
    partial_u, mass_parts = parts_u
    channels = weight.shape[0]
    block_g, block_d = heuristics.group_tile(groups, channels // groups)
    blocks_g = heuristics.ceil_div(groups, block_g)
    slope, offset = buffer(rows, channels, like=partial_u), buffer(rows, channels, like=partial_u)
    mean, rstd = buffer(rows, groups, like=partial_u), buffer(rows, groups, like=partial_u)
    mass = None if mass_parts is None else buffer(rows, like=partial_u)
    launch(
        statistics_kernel,
        rows * blocks_g,
        partial_u,
        parts_s,
        mass_parts,
        weight,
        bias,
        scale,
        shift,
        slope,
        offset,
        mean,
        rstd,
        mass,
        partial_u.shape[-1],
        0 if parts_s is None else parts_s.shape[-1],
        partial_u.shape[1],
        0 if parts_s is None else parts_s.shape[1],
        0 if mass_parts is None else mass_parts.shape[1],
        rows // partial_u.shape[0],
        groups,
        channels // groups,
        blocks_g,
        pixels,
        eps,
        BLOCK_G=block_g,
        BLOCK_D=block_d,
        warps=2,
    )
    return Statistics(slope, offset, mean, rstd, mass)


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
    for i in range(chunks):
        at = partial + (row * chunks + i) * 2 * channels + c
        plain += load(at, inside)
        times += load(at + channels, inside)
    if means is not None:
        mean = load(means + row * groups + g, g < groups)
        rstd = tl.load(rstds + row * groups + g, mask=g < groups, other=1.0)
        times = (times - mean[:, None] * plain) * rstd[:, None]  # d_pre * normalised z
        gain, _ = modulation(weight, bias, scale, shift, row, c, channels, inside)
        d1 = tl.sum(gain * plain, 1)
        d2 = tl.sum(gain * times, 1)
        total = pixels * 1.0 if mass is None else tl.load(mass + row)
        value = (rstd * mean * d2 - d1) * rstd / (size * total)
        square = -rstd * rstd * d2 / (size * total)
        tl.store(on_value + row * channels + c, tl.broadcast_to(value[:, None], [BLOCK_G, BLOCK_D]), mask=inside)
        tl.store(on_square + row * channels + c, tl.broadcast_to(square[:, None], [BLOCK_G, BLOCK_D]), mask=inside)
        if mask_terms is not None:
            # What the masks' normalisation takes off: the weighted mean over pixels of the gradient for the weights.
            second = 1.0 / (rstd * rstd) - eps + mean * mean
            term = tl.where(g < groups, size * (value * mean + 0.5 * square * second), 0.0)
            tl.store(mask_terms + row * blocks_g + pid % blocks_g, tl.sum(term, 0))
    tl.store(summed + row * channels + c, plain, mask=inside)
    tl.store(moment + row * channels + c, times, mask=inside)
    if d_scale is not None:
        on_scale = times * load(weight + c, inside) + plain * load(bias + c, inside)
        tl.store(d_scale + row * channels + c, on_scale, mask=inside)
        tl.store(d_shift + row * channels + c, plain, mask=inside)


@kernel
def affine_kernel(
    summed, moment, scale, d_weight, d_bias, rows, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    c = span(tl.program_id(0) * BLOCK_C, BLOCK_C)
    on_weight = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    on_bias = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for r0 in range(0, rows, BLOCK_R):
        row = span(r0, BLOCK_R)
        inside = (row < rows)[:, None] & (c < channels)[None, :]
        at = row[:, None] * channels + c[None, :]
        factor = 1.0
        if scale is not None:
            factor = 1.0 + load(scale + at, inside)
        on_weight += load(moment + at, inside) * factor
        on_bias += load(summed + at, inside) * factor
    tl.store(d_weight + c, tl.sum(on_weight, 0), mask=c < channels)
    tl.store(d_bias + c, tl.sum(on_bias, 0), mask=c < channels)


@dataclass
class GradientSums:
    """What the last backward pass needs: d_z = d_pre * slope + w * (on_value + on_square * z), w the pixel's weight."""

    on_value: Tensor | None  # [rows, C]
    on_square: Tensor | None  # [rows, C]
    mask_terms: Tensor | None  # [rows, parts], to be summed
    affine: tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # gradients for weight, bias, scale, shift


def gradient_sums(
    partial: Tensor,
    pixels: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    known: Statistics | None,
) -> GradientSums:
    """From partial [rows, chunks, 2, C]: sums of d_pre and of d_pre * z, of d_pre * normal if ``known`` is None."""
    rows, chunks, _, channels = partial.shape
    block_g, block_d = heuristics.group_tile(groups, channels // groups)
    blocks_g = heuristics.ceil_div(groups, block_g)
    new = lambda: buffer(rows, channels, like=partial)  # noqa: E731
    summed, moment = new(), new()
    on_value, on_square = (None, None) if known is None else (new(), new())
    masked = known is not None and known.mass is not None
    mask_terms = buffer(rows, blocks_g, like=partial) if masked else None
    d_scale, d_shift = (None, None) if scale is None else (scale.new_empty(scale.shape), shift.new_empty(shift.shape))
    launch(
        gradient_sums_kernel,
        rows * blocks_g,
        partial,
        weight,
        bias,
        scale,
        shift,
        *((None,) * 3 if known is None else (known.mean, known.rstd, known.mass)),
        summed,
        moment,
        on_value,
        on_square,
        mask_terms,
        d_scale,
        d_shift,
        channels,
        chunks,
        groups,
        channels // groups,
        blocks_g,
        pixels,
        eps,
        BLOCK_G=block_g,
        BLOCK_D=block_d,
        warps=2,
    )
    d_weight, d_bias = weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    launch(
        affine_kernel,
        heuristics.ceil_div(channels, 16),
        summed,
        moment,
        scale,
        d_weight,
        d_bias,
        rows,
        channels,
        BLOCK_R=64,
        BLOCK_C=16,
        warps=4,
    )
    return GradientSums(on_value, on_square, mask_terms, (d_weight, d_bias, d_scale, d_shift))
