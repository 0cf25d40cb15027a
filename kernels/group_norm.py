"""Group norm of [u_k ; m_k * skip] with modulation and SiLU, forward and backward, for all branches k at once.

    mean, rstd over the channels of a group and all pixels, pixels weighted by 1 or (``weighted``) by w = m_k + floor
    y = SiLU(slope * z + offset), slope = weight (1 + scale) rstd, offset = bias (1 + scale) + shift - mean * slope

A norm without a skip is the case C_s = 0; a plain U-Net's skip is the case without masks (K = 1). Four steps forward
(partial sums of u, of the skip, their finalisation, one elementwise pass), and four more backward. The concatenation
is never stored, and one read of the skip serves all branches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from factorkit.kernels import tiles
from factorkit.kernels.tiles import (
    channels_last,
    contiguous,
    empty_features,
    kernel,
    launch,
    load,
    pixel_strides,
    scratch,
    sigmoid,
    silu_slope,
    span,
)
from torch import Tensor


def flat_masks(masks: Tensor) -> Tensor:
    """Return masks as the kernels take them: fp32, regions x pixels contiguous."""
    return masks.to(torch.float32).contiguous()


@dataclass(init=False)
class Branches:
    """The concatenation z = [u_k ; m_k * skip] as the kernels see it: tensors channels last, and its sizes."""

    u: Tensor  # [B, C_u, H, W] shared by the branches, or [B*K, C_u, H, W]
    skip: Tensor | None  # [B, C_s, H, W]
    masks: Tensor | None  # [B, K, H, W] fp32

    def __init__(self, u: Tensor, skip: Tensor | None, masks: Tensor | None):
        self.u, self.skip = channels_last(u), None if skip is None else channels_last(skip)
        self.masks = None if masks is None else flat_masks(masks)
        self.skip_masks = None if skip is None else self.masks
        self.regions = 1 if masks is None else masks.shape[1]
        self.batch = u.shape[0] if masks is None else masks.shape[0]
        self.rows = self.batch * self.regions
        self.shared = u.shape[0] != self.rows
        self.channels_u = u.shape[1]
        self.channels_s = 0 if skip is None else skip.shape[1]
        self.channels = self.channels_u + self.channels_s
        self.pixels = u.shape[2] * u.shape[3]

    def tile(self, elements: int = 2048) -> tuple[int, int]:
        """Return pixels and channels of an elementwise tile."""
        width = max(self.channels_u, self.channels_s)
        return tiles.pixel_channel_tile(self.pixels, width, self.u.element_size(), elements)


# --- sums over pixels ---


@kernel
def moments_kernel(
    x,  # [sources, pixels, channels]
    masks,  # [sources, regions, pixels] or None
    partial,  # [sources * regions, chunks, 2 or 1, channels]
    mass,  # [sources * regions, chunks] or None: sum of w
    pixels,
    channels,
    regions,
    chunk,
    chunks,
    blocks_c,
    blocks_k,
    floor,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TIMES_MASK: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    part = (pid // (blocks_k * blocks_c)) % chunks
    source = (pid // (blocks_k * blocks_c) // chunks).to(tl.int64)
    block_c = pid // blocks_k % blocks_c
    first_k = pid % blocks_k * K  # fastest index: programs that share a tile of x run side by side
    c = span(block_c * BLOCK_C, BLOCK_C)
    begin = part.to(tl.int64) * chunk

    first = (tl.zeros([BLOCK_P, BLOCK_C], tl.float32),) * K
    second = (tl.zeros([BLOCK_P, BLOCK_C], tl.float32),) * K
    weight_sum = (tl.zeros([BLOCK_P], tl.float32),) * K
    for p0 in tl.range(begin, tl.minimum(begin + chunk, pixels), BLOCK_P):
        p = span(p0, BLOCK_P)
        inside = (p < pixels)[:, None] & (c < channels)[None, :]
        value = load(x + (source * pixels + p)[:, None] * channels + c[None, :], inside)
        more_first = ()
        more_second = ()
        more_weight = ()
        for i in tl.static_range(K):
            k = first_k + i
            z = value
            if WEIGHTED or TIMES_MASK:
                m = load(masks + (source * regions + k) * pixels + p, p < tl.where(k < regions, pixels, 0))
                z = value * m[:, None] if TIMES_MASK else value
            w = tl.where(p < pixels, m + floor, 0.0) if WEIGHTED else tl.full([BLOCK_P], 1.0, tl.float32)
            weighted = w[:, None] * z if WEIGHTED else z
            more_first = more_first + (first[i] + weighted,)
            more_second = more_second + (second[i] + weighted * z,)
            more_weight = more_weight + (weight_sum[i] + w,)
        first = more_first
        second = more_second
        weight_sum = more_weight

    kinds: tl.constexpr = 2 if SECOND else 1
    for i in tl.static_range(K):
        k = first_k + i
        at = (source * regions + k) * chunks + part
        wanted = c < tl.where(k < regions, channels, 0)
        tl.store(partial + at * kinds * channels + c, tl.sum(first[i], 0), mask=wanted)
        if SECOND:
            tl.store(partial + (at * 2 + 1) * channels + c, tl.sum(second[i], 0), mask=wanted)
        if mass is not None:
            tl.store(mass + at, tl.sum(weight_sum[i], 0), mask=(block_c == 0) & (k < regions))


def channel_moments(
    x: Tensor, masks: Tensor | None, *, weighted: bool, times_mask: bool, floor: float, second: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Sum every channel of x over pixels, for all branches in one read of x.

        first[k, c] = sum_p a_kp x_pc        second[k, c] = sum_p b_kp x_pc^2

    with (a, b) = (1, 1) for a plain norm, (w, w) with w = m + floor if ``weighted``, and (m, m^2) or (w m, w m^2) if
    ``times_mask``, for the half of the concatenation that is m_k * skip.

    Args:
        x: [R, C, H, W], channels last.
        masks: [R, K, H, W] fp32, needed by ``weighted`` and ``times_mask``.
        second: whether to compute the second moment.

    Returns:
        Partial sums [R*K, chunks, 2 or 1, C], and those of w [R*K, chunks] if ``weighted``.
    """
    sources, channels = x.shape[:2]
    pixels = x.shape[2] * x.shape[3]
    masks = masks if weighted or times_mask else None
    regions = 1 if masks is None else masks.shape[1]
    block_k = tiles.branches_per_program(regions)
    blocks_k = tiles.ceil_div(regions, block_k)
    block_p, block_c = tiles.pixel_channel_tile(pixels, channels, x.element_size(), 2048 if block_k < 3 else 1024)
    blocks_c = tiles.ceil_div(channels, block_c)
    chunk = tiles.pixels_per_program(pixels, block_p, sources * blocks_c * blocks_k)
    chunks = tiles.ceil_div(pixels, chunk)
    partial = scratch(sources * regions, chunks, 2 if second else 1, channels, like=x)
    mass = scratch(sources * regions, chunks, like=x) if weighted else None
    sizes = (pixels, channels, regions, chunk, chunks, blocks_c, blocks_k, floor)
    flags = {"WEIGHTED": weighted, "TIMES_MASK": times_mask, "SECOND": second}
    blocks = {"K": block_k, "BLOCK_P": block_p, "BLOCK_C": block_c}
    programs = sources * chunks * blocks_c * blocks_k
    launch(moments_kernel, programs, x, masks, partial, mass, *sizes, **flags, **blocks, warps=4)
    return partial, mass


# --- statistics from the sums ---


@dataclass
class Statistics:
    """Statistics of a group norm: y = slope * z + offset for each (row, channel), and the moments behind it."""

    slope: Tensor  # [rows, C]
    offset: Tensor  # [rows, C]
    mean: Tensor  # [rows, groups]
    rstd: Tensor  # [rows, groups]
    mass: Tensor | None  # [rows]: sum over pixels of m + floor, for the masked norm


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
    x: Branches,
    affine: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    groups: int,
    weighted: bool,
    eps: float,
    floor: float,
) -> Statistics:
    """Compute the statistics of every branch; the skip, and u where it is shared, are read once for all of them."""
    rows_as_images = weighted and not x.shared
    masks_u = x.masks.reshape(x.rows, 1, *x.masks.shape[2:]) if rows_as_images else x.masks
    partial_u, mass_parts = channel_moments(x.u, masks_u, weighted=weighted, times_mask=False, floor=floor)
    partial_s, chunks_s = None, 0
    if x.skip is not None:
        masked = x.masks is not None
        partial_s, _ = channel_moments(x.skip, x.masks, weighted=weighted, times_mask=masked, floor=floor)
        chunks_s = partial_s.shape[1]

    size = x.channels // groups
    block_g, block_d = tiles.group_tile(groups, size)
    blocks_g = tiles.ceil_div(groups, block_g)
    slope, offset = scratch(x.rows, x.channels, like=partial_u), scratch(x.rows, x.channels, like=partial_u)
    mean, rstd = scratch(x.rows, groups, like=partial_u), scratch(x.rows, groups, like=partial_u)
    mass, chunks_mass = (scratch(x.rows, like=partial_u), mass_parts.shape[1]) if weighted else (None, 0)
    tensors = (partial_u, partial_s, mass_parts, *affine, slope, offset, mean, rstd, mass)
    chunks = (partial_u.shape[1], chunks_s, chunks_mass)
    share_u = x.rows // partial_u.shape[0]
    sizes = (x.channels_u, x.channels_s, *chunks, share_u, groups, size, blocks_g, x.pixels, eps)
    launch(statistics_kernel, x.rows * blocks_g, *tensors, *sizes, BLOCK_G=block_g, BLOCK_D=block_d, warps=2)
    return Statistics(slope, offset, mean, rstd, mass)


# --- forward ---


@kernel
def branch_pass_kernel(
    u,
    skip,
    masks,
    slope,
    offset,
    out,
    pixels,
    channels_u,
    channels_s,
    blocks_u,
    blocks_c,
    blocks_p,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    ACTIVATE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    block = pid % blocks_c
    p = span((pid // blocks_c) % blocks_p * BLOCK_P, BLOCK_P)
    image = (pid // blocks_c // blocks_p).to(tl.int64)
    channels = channels_u + channels_s
    if block < blocks_u:
        c = span(block * BLOCK_C, BLOCK_C)
        inside = (p < pixels)[:, None] & (c < channels_u)[None, :]
        if SHARED:
            z = load(u + (image * pixels + p)[:, None] * channels_u + c[None, :], inside)
            for k in tl.static_range(K):
                row = image * K + k
                write_branch(z, slope, offset, out, row, p, c, pixels, channels, inside, c < channels_u, ACTIVATE)
        else:
            for k in tl.static_range(K):
                row = image * K + k
                z = load(u + (row * pixels + p)[:, None] * channels_u + c[None, :], inside)
                write_branch(z, slope, offset, out, row, p, c, pixels, channels, inside, c < channels_u, ACTIVATE)
    else:
        c = span((block - blocks_u) * BLOCK_C, BLOCK_C)
        inside = (p < pixels)[:, None] & (c < channels_s)[None, :]
        if skip is not None:
            s = load(skip + (image * pixels + p)[:, None] * channels_s + c[None, :], inside)
            at = channels_u + c
            for k in tl.static_range(K):
                row = image * K + k
                z = s
                if masks is not None:
                    z = s * load(masks + row * pixels + p, p < pixels)[:, None]
                write_branch(z, slope, offset, out, row, p, at, pixels, channels, inside, c < channels_s, ACTIVATE)


@triton.jit
def write_branch(z, slope, offset, out, row, p, c, pixels, channels, inside, column, ACTIVATE: tl.constexpr):
    a = load(slope + row * channels + c, column)
    b = load(offset + row * channels + c, column)
    z = a[None, :] * z + b[None, :]
    if ACTIVATE:
        z = z * sigmoid(z)
    tl.store(out + (row * pixels + p)[:, None] * channels + c[None, :], z, mask=inside)


def norm_forward(
    u: Tensor,
    skip: Tensor | None,
    masks: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    weighted: bool,
    activate: bool,
    eps: float,
    floor: float,
) -> Tensor:
    """Compute SiLU(norm([u_k ; m_k * skip]) * (1 + scale) + shift), statistics over groups of channels and all pixels.

    Args:
        u: [B*K, C_u, H, W], or [B, C_u, H, W] shared by the branches.
        skip: [B, C_s, H, W] or None.
        masks: [B, K, H, W] or None.
        weight, bias: [C].
        scale, shift: [B*K, C], both or neither.
        groups: number of groups; divides C.
        weighted: weight the moments by masks + ``floor``.
        activate: apply the SiLU.
        eps: added to the variance.
        floor: added to the masks where they are weights.

    Returns:
        [B*K, C, H, W] channels last, in the dtype of u.
    """
    x = Branches(u, skip, masks)
    affine = tuple(contiguous(v) for v in (weight, bias, scale, shift))
    stats = statistics(x, affine, groups, weighted, eps, floor)
    out = empty_features(x.rows, x.channels, x.u)
    block_p, block_c = x.tile()
    blocks_u = tiles.ceil_div(x.channels_u, block_c)
    blocks_c = blocks_u + tiles.ceil_div(x.channels_s, block_c)
    blocks_p = tiles.ceil_div(x.pixels, block_p)
    tensors = (x.u, x.skip, x.skip_masks, stats.slope, stats.offset, out)
    sizes = (x.pixels, x.channels_u, x.channels_s, blocks_u, blocks_c, blocks_p)
    constants = {"K": x.regions, "SHARED": x.shared, "ACTIVATE": activate, "BLOCK_P": block_p, "BLOCK_C": block_c}
    launch(branch_pass_kernel, x.batch * blocks_p * blocks_c, *tensors, *sizes, **constants, warps=4)
    return out


# --- backward: sums over pixels, and the affine part's gradients from them ---


@triton.jit
def sum_half(
    grad,  # tiles of grad and x start at their row and half, mask at its branch
    x,
    mask,
    slope,  # [channels of the half], as offset
    offset,
    partial,  # sums of d_pre, and `channels` further those of d_pre * z
    bounds,  # first pixel, the one after the last, and their number in the image
    c,
    width,
    channels,
    strides,  # of grad, from pixel to pixel and channel to channel
    ACTIVATE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum a block of channels of one half."""
    column = c < width
    a = load(slope + c, column)
    b = load(offset + c, column)
    plain = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    times = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for p0 in tl.range(bounds[0], bounds[1], BLOCK_P):
        p = span(p0, BLOCK_P)
        inside = (p < bounds[2])[:, None] & column[None, :]
        z = load(x + p[:, None] * width + c[None, :], inside)
        if mask is not None:
            z = z * load(mask + p, p < bounds[2])[:, None]
        d = load(grad + p[:, None] * strides[0] + c[None, :] * strides[1], inside)
        if ACTIVATE:
            d = d * silu_slope(a[None, :] * z + b[None, :])
        plain += d
        times += d * z
    tl.store(partial + c, tl.sum(plain, 0), mask=column)
    tl.store(partial + channels + c, tl.sum(times, 0), mask=column)


@kernel
def sums_kernel(
    grad,
    u,
    skip,
    masks,
    slope,
    offset,
    partial,
    pixels,
    channels_u,
    channels_s,
    stride_n,
    stride_p,
    stride_c,
    regions,
    blocks_u,
    blocks_c,
    chunk,
    chunks,
    SHARED: tl.constexpr,
    ACTIVATE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    k = pid % regions  # fastest index: programs of one image read the same skip side by side
    block = pid // regions % blocks_c
    chunk_index = pid // regions // blocks_c % chunks
    image = (pid // regions // blocks_c // chunks).to(tl.int64)
    row = image * regions + k
    channels = channels_u + channels_s
    begin = chunk_index.to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, pixels)
    # where the row's tensors begin
    grad += row * stride_n
    slope += row * channels
    offset += row * channels
    partial += (row * chunks + chunk_index) * 2 * channels
    bounds = (begin, end, pixels)
    strides = (stride_p, stride_c)
    if block < blocks_u:
        c = span(block * BLOCK_C, BLOCK_C)
        u += (image if SHARED else row) * pixels * channels_u
        sum_half(
            grad, u, None, slope, offset, partial, bounds, c, channels_u, channels, strides, ACTIVATE, BLOCK_P, BLOCK_C
        )
    else:
        if skip is not None:
            c = span((block - blocks_u) * BLOCK_C, BLOCK_C)
            skip += image * pixels * channels_s
            grad += channels_u * stride_c
            slope += channels_u
            offset += channels_u
            partial += channels_u
            m = None if masks is None else masks + row * pixels
            sum_half(
                grad,
                skip,
                m,
                slope,
                offset,
                partial,
                bounds,
                c,
                channels_s,
                channels,
                strides,
                ACTIVATE,
                BLOCK_P,
                BLOCK_C,
            )


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
    """Terms of d_z = d_pre * slope + w * (on_value + on_square * z), w the pixel's weight, and the affine gradients."""

    on_value: Tensor | None  # [rows, C]
    on_square: Tensor | None  # [rows, C]
    mask_terms: Tensor | None  # [rows, parts], to be summed
    affine: tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # gradients for weight, bias, scale, shift


def gradient_sums(
    partial: Tensor,
    pixels: int,
    affine: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    groups: int,
    eps: float,
    stats: Statistics | None,
) -> GradientSums:
    """Finalise partial sums [rows, chunks, 2, C] of d_pre and d_pre * z (d_pre * normal if ``stats`` is None)."""
    weight, bias, scale, shift = affine
    rows, chunks, _, channels = partial.shape
    size = channels // groups
    block_g, block_d = tiles.group_tile(groups, size)
    blocks_g = tiles.ceil_div(groups, block_g)
    summed, moment = scratch(rows, channels, like=partial), scratch(rows, channels, like=partial)
    on_value = on_square = mask_terms = d_scale = d_shift = None
    if stats is not None:
        on_value, on_square = scratch(rows, channels, like=partial), scratch(rows, channels, like=partial)
        mask_terms = None if stats.mass is None else scratch(rows, blocks_g, like=partial)
    if scale is not None:
        d_scale, d_shift = scale.new_empty(scale.shape), shift.new_empty(shift.shape)
    moments = (None, None, None) if stats is None else (stats.mean, stats.rstd, stats.mass)
    outputs = (summed, moment, on_value, on_square, mask_terms, d_scale, d_shift)
    sizes = (channels, chunks, groups, size, blocks_g, pixels, eps)
    blocks = {"BLOCK_G": block_g, "BLOCK_D": block_d}
    launch(gradient_sums_kernel, rows * blocks_g, partial, *affine, *moments, *outputs, *sizes, **blocks, warps=2)
    d_weight, d_bias = weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    tensors = (summed, moment, scale, d_weight, d_bias)
    launch(affine_kernel, tiles.ceil_div(channels, 16), *tensors, rows, channels, BLOCK_R=64, BLOCK_C=16, warps=4)
    return GradientSums(on_value, on_square, mask_terms, (d_weight, d_bias, d_scale, d_shift))


# --- backward: gradients of the features ---


@triton.jit
def d_branch(
    d,  # gradient of the output, a tile
    z,
    weight,
    slope,
    offset,
    on_value,
    on_square,
    at,  # of the tile's channels in the four coefficients
    inside,
    column,
    ACTIVATE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Return d_z of a tile, and the gradient of the pixel's weight summed over the tile's channels."""
    on_weight = tl.zeros([BLOCK_P], tl.float32)
    if slope is not None:
        a = load(slope + at, column)[None, :]
        q1 = load(on_value + at, column)[None, :]
        q2 = load(on_square + at, column)[None, :]
        if ACTIVATE:
            d = d * silu_slope(a * z + load(offset + at, column)[None, :])
        spread = q1 + q2 * z
        if weight is not None:
            on_weight = tl.sum(tl.where(inside, z * (q1 + 0.5 * q2 * z), 0.0), 1)
            spread = spread * weight[:, None]
        d = d * a + spread
    return tl.where(inside, d, 0.0), on_weight


@kernel
def branch_gradients_kernel(
    grad,
    u,
    skip,
    masks,
    slope,
    offset,
    on_value,
    on_square,
    mask_terms,
    d_u,
    d_skip,
    d_masks,
    pixels,
    channels_u,
    channels_s,
    at_skip,
    stride_n,
    stride_p,
    stride_c,
    blocks_p,
    blocks_c,
    parts,
    terms,
    floor,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    T_PAD: tl.constexpr,
    SHARED: tl.constexpr,
    ACTIVATE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    first_block = pid % parts  # a program takes every parts-th block of channels
    p = span((pid // parts) % blocks_p * BLOCK_P, BLOCK_P)
    image = (pid // parts // blocks_p).to(tl.int64)
    here = p < pixels
    channels = at_skip + channels_s
    from_p = p[:, None] * stride_p
    branch = tl.arange(0, K_PAD)[None, :]
    on_masks = tl.zeros([BLOCK_P, K_PAD], tl.float32)

    if d_u is not None:
        for block in tl.range(first_block, tl.cdiv(channels_u, BLOCK_C), parts):
            c = span(block * BLOCK_C, BLOCK_C)
            column = c < channels_u
            inside = here[:, None] & column[None, :]
            total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
            for k in range(K):
                row = image * K + k
                z = total
                if slope is not None:
                    source = image if SHARED else row
                    z = load(u + (source * pixels + p)[:, None] * channels_u + c[None, :], inside)
                weight = load(masks + row * pixels + p, here) + floor if WEIGHTED else None
                at = row * channels + c
                d = load(grad + row * stride_n + from_p + c[None, :] * stride_c, inside)
                d, on_weight = d_branch(
                    d, z, weight, slope, offset, on_value, on_square, at, inside, column, ACTIVATE, BLOCK_P
                )
                if SHARED:
                    total += d
                else:
                    tl.store(d_u + (row * pixels + p)[:, None] * channels_u + c[None, :], d, mask=inside)
                if WEIGHTED:
                    on_masks += tl.where(branch == k, on_weight[:, None], 0.0)
            if SHARED:
                tl.store(d_u + (image * pixels + p)[:, None] * channels_u + c[None, :], total, mask=inside)

    if skip is not None:
        for block in tl.range(first_block, tl.cdiv(channels_s, BLOCK_C), parts):
            c = span(block * BLOCK_C, BLOCK_C)
            column = c < channels_s
            inside = here[:, None] & column[None, :]
            s = load(skip + (image * pixels + p)[:, None] * channels_s + c[None, :], inside)
            total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
            for k in range(K):
                row = image * K + k
                z = s
                if masks is not None:
                    m = load(masks + row * pixels + p, here)
                    z = s * m[:, None]
                weight = m + floor if WEIGHTED else None
                at = row * channels + at_skip + c
                d = load(grad + row * stride_n + from_p + (at_skip + c)[None, :] * stride_c, inside)
                d, on_weight = d_branch(
                    d, z, weight, slope, offset, on_value, on_square, at, inside, column, ACTIVATE, BLOCK_P
                )
                if masks is not None:
                    total += d * m[:, None]
                    on_masks += tl.where(branch == k, (tl.sum(d * s, 1) + on_weight)[:, None], 0.0)
                else:
                    total += d
            tl.store(d_skip + (image * pixels + p)[:, None] * channels_s + c[None, :], total, mask=inside)

    if d_masks is not None:
        row = image * K + branch
        wanted = here[:, None] & (branch < K)
        if mask_terms is not None:
            t = tl.arange(0, T_PAD)
            for k in tl.static_range(K):
                term = tl.sum(load(mask_terms + (image * K + k) * terms + t, t < terms), 0)
                on_masks -= tl.where(branch == k, term, 0.0)
        tl.store(d_masks + row * pixels + p[:, None], on_masks, mask=wanted)


def feature_gradients(
    grad: Tensor,
    x: Branches,
    stats: Statistics | None,
    sums: GradientSums | None,
    *,
    activate: bool,
    at_skip: int,
    with_u: bool = True,
    floor: float = 0.0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute d_u, d_skip and d_masks (fp32) of the norm, or of the bare concatenation if ``stats`` is None.

    ``grad`` is [B*K, C, H, W]; ``at_skip`` is its channel at which the skip's half begins.
    """
    weighted = stats is not None and stats.mass is not None
    grad, *strides = pixel_strides(grad)
    d_u = empty_features(x.u.shape[0], x.channels_u, x.u) if with_u else None
    d_skip = None if x.skip is None else empty_features(x.batch, x.channels_s, x.skip)
    d_masks = torch.empty_like(x.masks) if x.masks is not None and (weighted or x.skip is not None) else None
    block_p, block_c = x.tile(1024)
    blocks_p = tiles.ceil_div(x.pixels, block_p)
    blocks_c = tiles.ceil_div(max(x.channels_u, x.channels_s), block_c)
    terms = sums.mask_terms.shape[1] if sums is not None and sums.mask_terms is not None else 1
    parts = blocks_c if d_masks is None else 1  # the masks' gradient is a sum over all channels
    norm = (None,) * 5
    if stats is not None:
        norm = (stats.slope, stats.offset, sums.on_value, sums.on_square, sums.mask_terms)
    tensors = (None if stats is None else x.u, x.skip, None if d_masks is None else x.masks, *norm)
    sizes = (x.pixels, x.channels_u, x.channels_s, at_skip, *strides, blocks_p, blocks_c, parts, terms, floor)
    padded = {"K_PAD": tiles.power_of_two(x.regions), "T_PAD": tiles.power_of_two(terms)}
    launch(
        branch_gradients_kernel,
        x.batch * blocks_p * parts,
        *(grad, *tensors, d_u, d_skip, d_masks, *sizes),
        **{"K": x.regions, **padded, "SHARED": x.shared, "ACTIVATE": activate, "WEIGHTED": weighted},
        **{"BLOCK_P": block_p, "BLOCK_C": block_c},
        warps=4,
    )
    return d_u, d_skip, d_masks


def norm_backward(
    grad: Tensor,
    u: Tensor,
    skip: Tensor | None,
    masks: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    weighted: bool,
    activate: bool,
    eps: float,
    floor: float,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of :func:`norm_forward` for u, skip, masks (fp32), weight, bias, scale and shift.

    ``grad`` is [B*K, C, H, W] with any strides; the other arguments are those of :func:`norm_forward`. The gradient of
    an argument that is None is None.
    """
    x = Branches(u, skip, masks)
    affine = tuple(contiguous(v) for v in (weight, bias, scale, shift))
    stats = statistics(x, affine, groups, weighted, eps, floor)
    grad, *strides = pixel_strides(grad)
    block_p, block_c = x.tile(1024)
    blocks_u = tiles.ceil_div(x.channels_u, block_c)
    blocks_c = blocks_u + tiles.ceil_div(x.channels_s, block_c)
    chunk = tiles.pixels_per_program(x.pixels, block_p, x.rows * blocks_c)
    chunks = tiles.ceil_div(x.pixels, chunk)
    partial = scratch(x.rows, chunks, 2, x.channels, like=u)
    tensors = (grad, x.u, x.skip, x.skip_masks, stats.slope, stats.offset, partial)
    sizes = (x.pixels, x.channels_u, x.channels_s, *strides, x.regions, blocks_u, blocks_c, chunk, chunks)
    constants = {"SHARED": x.shared, "ACTIVATE": activate, "BLOCK_P": block_p, "BLOCK_C": block_c}
    launch(sums_kernel, x.rows * blocks_c * chunks, *tensors, *sizes, **constants, warps=4)
    sums = gradient_sums(partial, x.pixels, affine, groups, eps, stats)
    found = feature_gradients(grad, x, stats, sums, activate=activate, at_skip=x.channels_u, floor=floor)
    return *found, *sums.affine
