"""Group norm of [u_k ; m_k * skip] with modulation and SiLU, forward and backward, for all branches k at once.

    mean, rstd over the channels of a group and all pixels, pixels weighted by 1 or (``weighted``) by w = m_k + floor
    y = SiLU(slope * z + offset), slope = weight (1 + scale) rstd, offset = bias (1 + scale) + shift - mean * slope

The bias of the convolution that made u is added wherever u is loaded; its gradient comes from the backward's sums.
A norm without a skip is the case C_s = 0; a plain U-Net's skip is the case without masks (K = 1). Four steps forward
(partial sums of u, of the skip, their finalisation, one elementwise pass), and four more backward. Sums and gradients
of the concatenation are in :mod:`factorkit.kernels.branches`, of the affine part in :mod:`factorkit.kernels.affine`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from factorkit.kernels import tiles
from factorkit.kernels.affine import Affine, Statistics, gradient_sums, modulation
from factorkit.kernels.branches import Branches, channel_moments, feature_gradients
from factorkit.kernels.tiles import (
    contiguous,
    empty_features,
    kernel,
    launch,
    load,
    load_biased,
    pixel_strides,
    scratch,
    sigmoid,
    silu_slope,
    span,
)
from torch import Tensor

# --- statistics from the sums over pixels ---


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

    if partial_u is None:
        mean = load(means + row * groups + g, g < groups)
        rstd = load(rstds + row * groups + g, g < groups)
    else:
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
            tl.store(mass + row * groups + g, tl.zeros([BLOCK_G], tl.float32) + total, mask=g < groups)
        count = total * size
        mean = tl.sum(first, 1) / count
        rstd = 1.0 / tl.sqrt(tl.maximum(tl.sum(second, 1) / count - mean * mean, 0.0) + eps)
        tl.store(means + row * groups + g, mean, mask=g < groups)
        tl.store(rstds + row * groups + g, rstd, mask=g < groups)

    gain, shifted = modulation(weight, bias, scale, shift, row, c, channels, inside)
    a = gain * rstd[:, None]
    tl.store(slope + row * channels + c, a, mask=inside)
    tl.store(offset + row * channels + c, shifted - mean[:, None] * a, mask=inside)


def statistics(
    x: Branches, affine: Affine, groups: int, weighted: bool, eps: float, floor: float, moments: Tensor | None = None
) -> Statistics:
    """Compute the statistics of every branch; the skip, and u where it is shared, are read once for all of them.

    With the ``moments`` of a forward pass neither is read.
    """
    partial_u = partial_s = mass_parts = None
    chunks = (1, 1, 1)
    if moments is None:
        rows_as_images = weighted and not x.shared
        masks_u = x.masks.reshape(x.rows, 1, *x.masks.shape[2:]) if rows_as_images else x.masks
        partial_u, mass_parts = channel_moments(x.u, masks_u, x.input_bias, weighted=weighted, floor=floor)
        if x.skip is not None:
            masked = x.masks is not None
            partial_s, _ = channel_moments(x.skip, x.masks, weighted=weighted, times_mask=masked, floor=floor)
        chunks = tuple(1 if part is None else part.shape[1] for part in (partial_u, partial_s, mass_parts))
        moments = scratch(3 if weighted else 2, x.rows, groups, like=x.u)

    size = x.channels // groups
    block_g, block_d = tiles.group_tile(groups, size)
    blocks_g = tiles.ceil_div(groups, block_g)
    slope, offset = scratch(x.rows, x.channels, like=x.u), scratch(x.rows, x.channels, like=x.u)
    stats = Statistics(slope, offset, moments)
    mass = None if mass_parts is None else stats.mass
    tensors = (partial_u, partial_s, mass_parts, *affine, slope, offset, *moments[:2], mass)
    share_u = 1 if partial_u is None else x.rows // partial_u.shape[0]
    sizes = (x.channels_u, x.channels_s, *chunks, share_u, groups, size, blocks_g, x.pixels, eps)
    launch(statistics_kernel, x.rows * blocks_g, *tensors, *sizes, BLOCK_G=block_g, BLOCK_D=block_d, warps=2)
    return stats


# --- forward ---


@kernel
def branch_pass_kernel(
    u,
    skip,
    masks,
    bias,
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
            z = load_biased(u + (image * pixels + p)[:, None] * channels_u + c[None, :], bias, c, channels_u, inside)
            for k in tl.static_range(K):
                row = image * K + k
                write_branch(z, slope, offset, out, row, p, c, pixels, channels, inside, c < channels_u, ACTIVATE)
        else:
            for k in tl.static_range(K):
                row = image * K + k
                z = load_biased(u + (row * pixels + p)[:, None] * channels_u + c[None, :], bias, c, channels_u, inside)
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
    affine: Affine,
    input_bias: Tensor | None,
    groups: int,
    weighted: bool,
    activate: bool,
    eps: float,
    floor: float,
) -> tuple[Tensor, Tensor]:
    """Compute SiLU(norm([u_k ; m_k * skip]) * (1 + scale) + shift), statistics over groups of channels and all pixels.

    Args:
        u: [B*K, C_u, H, W], or [B, C_u, H, W] shared by the branches.
        skip: [B, C_s, H, W] or None.
        masks: [B, K, H, W] or None.
        affine: weight, bias [C]; scale, shift [B*K, C], both or neither.
        input_bias: [C], added to u; None with a skip.
        groups: number of groups; divides C.
        weighted: weight the moments by masks + ``floor``.
        activate: apply the SiLU.
        eps, floor: added to the variance, and to the masks where they are weights.

    Returns:
        [B*K, C, H, W] channels last, in the dtype of u, and the moments [2 or 3, B*K, groups]: mean, 1/std and, if
        ``weighted``, the sum of the weights.
    """
    x = Branches(u, skip, masks, input_bias)
    affine = tuple(contiguous(v) for v in affine)
    stats = statistics(x, affine, groups, weighted, eps, floor)
    out = empty_features(x.rows, x.channels, x.u)
    block_p, block_c = x.tile()
    blocks_u = tiles.ceil_div(x.channels_u, block_c)
    blocks_c = blocks_u + tiles.ceil_div(x.channels_s, block_c)
    blocks_p = tiles.ceil_div(x.pixels, block_p)
    tensors = (x.u, x.skip, x.skip_masks, x.input_bias, stats.slope, stats.offset, out)
    sizes = (x.pixels, x.channels_u, x.channels_s, blocks_u, blocks_c, blocks_p)
    constants = {"K": x.regions, "SHARED": x.shared, "ACTIVATE": activate, "BLOCK_P": block_p, "BLOCK_C": block_c}
    launch(branch_pass_kernel, x.batch * blocks_p * blocks_c, *tensors, *sizes, **constants, warps=4)
    return out, stats.moments


# --- backward ---


@triton.jit
def sum_half(
    grad,  # tiles of grad and x start at their row and half, mask at its branch
    x,
    mask,  # z = mask * x or, with a bias, z = x + bias and w = mask + floor, or 1 without a mask
    floor,
    bias,  # [channels of the half], added to x, or None
    slope,  # as bias, and so is offset
    offset,
    partial,  # sums, each `channels` further: of d_pre, of d_pre * z and, with a bias, of w * z
    bounds,  # first pixel, the one after the last, and their number in the image
    columns,  # of the block, their number in the half, and that in both halves
    strides,  # of grad, from pixel to pixel and channel to channel
    ACTIVATE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum a block of channels of one half."""
    c, width, channels = columns
    column = c < width
    a = load(slope + c, column)
    b = load(offset + c, column)
    plain = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    times = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    values = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for p0 in tl.range(bounds[0], bounds[1], BLOCK_P):
        p = span(p0, BLOCK_P)
        inside = (p < bounds[2])[:, None] & column[None, :]
        z = load_biased(x + p[:, None] * width + c[None, :], bias, c, width, inside)
        w = tl.full([BLOCK_P], 1.0, tl.float32)
        if mask is not None:
            m = load(mask + p, p < bounds[2])
            if bias is None:
                z = z * m[:, None]
            else:
                w = m + floor
        d = load(grad + p[:, None] * strides[0] + c[None, :] * strides[1], inside)
        if ACTIVATE:
            d = d * silu_slope(a[None, :] * z + b[None, :])
        plain += d
        times += d * z
        if bias is not None:
            values += z * w[:, None]
    tl.store(partial + c, tl.sum(plain, 0), mask=column)
    tl.store(partial + channels + c, tl.sum(times, 0), mask=column)
    if bias is not None:
        tl.store(partial + 2 * channels + c, tl.sum(values, 0), mask=column)


@kernel
def sums_kernel(
    grad,
    u,
    skip,
    masks,
    bias,
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
    floor,
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
    partial += (row * chunks + chunk_index) * (2 if bias is None else 3) * channels
    bounds = (begin, end, pixels)
    strides = (stride_p, stride_c)
    if block < blocks_u:
        c = span(block * BLOCK_C, BLOCK_C)
        u += (image if SHARED else row) * pixels * channels_u
        w = None if bias is None or masks is None else masks + row * pixels
        at_u = (c, channels_u, channels)
        sum_half(grad, u, w, floor, bias, slope, offset, partial, bounds, at_u, strides, ACTIVATE, BLOCK_P, BLOCK_C)
    elif skip is not None:
        c = span((block - blocks_u) * BLOCK_C, BLOCK_C)
        skip += image * pixels * channels_s
        grad += channels_u * stride_c
        slope += channels_u
        offset += channels_u
        partial += channels_u
        m = None if masks is None else masks + row * pixels
        at_s = (c, channels_s, channels)
        sum_half(grad, skip, m, floor, None, slope, offset, partial, bounds, at_s, strides, ACTIVATE, BLOCK_P, BLOCK_C)


def norm_backward(
    grad: Tensor,
    moments: Tensor,
    u: Tensor,
    skip: Tensor | None,
    masks: Tensor | None,
    affine: Affine,
    input_bias: Tensor | None,
    activate: bool,
    eps: float,
    floor: float,
    others: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of :func:`norm_forward` for u, skip, masks (fp32), those of ``affine`` and input_bias.

    ``grad`` is [B*K, C, H, W], ``moments`` are those of :func:`norm_forward`, as are the other arguments; ``others``
    are gradients of u and the skip from elsewhere, to be added. The gradient of None is None.
    """
    x = Branches(u, skip, masks, input_bias)
    affine = tuple(contiguous(v) for v in affine)
    groups, weighted = moments.shape[2], len(moments) == 3
    stats = statistics(x, affine, groups, weighted, eps, floor, moments)
    grad, *strides = pixel_strides(grad)
    block_p, block_c = x.tile(1024)
    blocks_u, blocks_s = tiles.ceil_div(x.channels_u, block_c), tiles.ceil_div(x.channels_s, block_c)
    blocks_c = blocks_u + blocks_s
    chunk = tiles.pixels_per_program(x.pixels, block_p, x.rows * blocks_c)
    chunks = tiles.ceil_div(x.pixels, chunk)
    partial = scratch(x.rows, chunks, 2 if input_bias is None else 3, x.channels, like=u)
    masks = x.skip_masks if input_bias is None or not weighted else x.masks
    tensors = (grad, x.u, x.skip, masks, x.input_bias, stats.slope, stats.offset, partial)
    sizes = (x.pixels, x.channels_u, x.channels_s, *strides, x.regions, blocks_u, blocks_c, chunk, chunks, floor)
    constants = {"SHARED": x.shared, "ACTIVATE": activate, "BLOCK_P": block_p, "BLOCK_C": block_c}
    launch(sums_kernel, x.rows * blocks_c * chunks, *tensors, *sizes, **constants, warps=4)
    sums = gradient_sums(partial, x.pixels, affine, input_bias, groups, eps, stats)
    settings = {"activate": activate, "at_skip": x.channels_u, "floor": floor, "others": others}
    return *feature_gradients(grad, x, stats, sums, **settings), *sums.affine
