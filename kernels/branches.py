"""The concatenation [u_k ; m_k * skip] of all branches: sums over its pixels, and gradients of its parts.

It is never stored, and one read of the skip serves all branches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from factorkit.kernels import tiles
from factorkit.kernels.affine import GradientSums, Statistics
from factorkit.kernels.tiles import (
    channels_last,
    contiguous,
    empty_features,
    kernel,
    launch,
    load,
    load_biased,
    pixel_strides,
    scratch,
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
    input_bias: Tensor | None  # [C_u], added to u wherever it is loaded
    skip: Tensor | None  # [B, C_s, H, W]
    masks: Tensor | None  # [B, K, H, W] fp32

    def __init__(self, u: Tensor, skip: Tensor | None, masks: Tensor | None, input_bias: Tensor | None = None):
        self.u, self.skip = channels_last(u), None if skip is None else channels_last(skip)
        self.input_bias = contiguous(input_bias)
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
    bias,  # [channels], added to x, or None
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
        value = load_biased(x + (source * pixels + p)[:, None] * channels + c[None, :], bias, c, channels, inside)
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
    x: Tensor,
    masks: Tensor | None,
    bias: Tensor | None = None,
    *,
    weighted: bool,
    times_mask: bool = False,
    floor: float,
    second: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Sum every channel of x over pixels, for all branches in one read of x.

        first[k, c] = sum_p a_kp x_pc        second[k, c] = sum_p b_kp x_pc^2

    with (a, b) = (1, 1) for a plain norm, (w, w) with w = m + floor if ``weighted``, and (m, m^2) or (w m, w m^2) if
    ``times_mask``, for the half of the concatenation that is m_k * skip.

    Args:
        x: [R, C, H, W], channels last.
        masks: [R, K, H, W] fp32, needed by ``weighted`` and ``times_mask``.
        bias: [C], added to x.
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
    launch(moments_kernel, programs, x, masks, bias, partial, mass, *sizes, **flags, **blocks, warps=4)
    return partial, mass


# --- gradients of u, the skip and the masks ---


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
    bias,
    slope,
    offset,
    on_value,
    on_square,
    mask_terms,
    other_u,  # added to d_u: the gradient of u from elsewhere, or None
    other_skip,
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
            if SHARED and other_u is not None:
                total = load(other_u + (image * pixels + p)[:, None] * channels_u + c[None, :], inside)
            for k in range(K):
                row = image * K + k
                z = total
                if slope is not None:
                    source = image if SHARED else row
                    z = u + (source * pixels + p)[:, None] * channels_u + c[None, :]
                    z = load_biased(z, bias, c, channels_u, inside)
                weight = load(masks + row * pixels + p, here) + floor if WEIGHTED else None
                at = row * channels + c
                d = load(grad + row * stride_n + from_p + c[None, :] * stride_c, inside)
                d, on_weight = d_branch(
                    d, z, weight, slope, offset, on_value, on_square, at, inside, column, ACTIVATE, BLOCK_P
                )
                if SHARED:
                    total += d
                else:
                    if other_u is not None:
                        d += load(other_u + (row * pixels + p)[:, None] * channels_u + c[None, :], inside)
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
            if other_skip is not None:
                total = load(other_skip + (image * pixels + p)[:, None] * channels_s + c[None, :], inside)
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
    others: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute d_u, d_skip and d_masks (fp32) of the norm, or of the bare concatenation if ``stats`` is None.

    ``grad`` is [B*K, C, H, W]; ``at_skip`` is its channel at which the skip's half begins; ``others`` are gradients of
    u and of the skip from elsewhere, which are added.
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
    tensors = (None if stats is None else x.u, x.skip, None if d_masks is None else x.masks, x.input_bias, *norm)
    sizes = (x.pixels, x.channels_u, x.channels_s, at_skip, *strides, blocks_p, blocks_c, parts, terms, floor)
    padded = {"K_PAD": tiles.power_of_two(x.regions), "T_PAD": tiles.power_of_two(terms)}
    launch(
        branch_gradients_kernel,
        x.batch * blocks_p * parts,
        *(grad, *tensors, *(None if x is None else channels_last(x) for x in others), d_u, d_skip, d_masks, *sizes),
        **{"K": x.regions, **padded, "SHARED": x.shared, "ACTIVATE": activate, "WEIGHTED": weighted},
        **{"BLOCK_P": block_p, "BLOCK_C": block_c},
        warps=4,
    )
    return d_u, d_skip, d_masks
