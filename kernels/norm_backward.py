"""Gradients of the norms over groups and of the bare concatenation.

Two passes over features and upstream gradient: sums over pixels, then d_z for every branch, of which d_u, d_skip (a sum
over branches) and d_masks (a sum over channels) are made in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from factorkit.kernels import heuristics
from factorkit.kernels.finalise import GradientSums, Statistics, gradient_sums
from factorkit.kernels.norm import Branches, branch_statistics
from factorkit.kernels.tiles import buffer, dense, empty, kernel, launch, load, pixel_strides, silu_slope, span
from torch import Tensor


@triton.jit
def sum_half(
    grad,
    x,
    mask,
    slope,
    offset,
    partial,
    begin,
    end,
    pixels,
    channels_x,
    at,
    c,
    row,
    part,
    channels,
    stride_p,
    stride_c,
    ACTIVATE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One block of channels of one half: grad and x at their row, mask at its branch or None; c in x is at + c in z."""
    column = c < channels_x
    a = load(slope + row * channels + at + c, column)
    b = load(offset + row * channels + at + c, column)
    plain = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    times = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for p0 in tl.range(begin, end, BLOCK_P):
        p = span(p0, BLOCK_P)
        inside = (p < pixels)[:, None] & column[None, :]
        z = load(x + p[:, None] * channels_x + c[None, :], inside)
        if mask is not None:
            z = z * load(mask + p, p < pixels)[:, None]
        d = load(grad + p[:, None] * stride_p + (at + c)[None, :] * stride_c, inside)
        if ACTIVATE:
            d = d * silu_slope(a[None, :] * z + b[None, :])
        plain += d
        times += d * z
    to = partial + part * 2 * channels + at + c
    tl.store(to, tl.sum(plain, 0), mask=column)
    tl.store(to + channels, tl.sum(times, 0), mask=column)


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
    k = pid % regions  # fastest: the branches read the same skip side by side
    block = pid // regions % blocks_c
    chunk_index = pid // regions // blocks_c % chunks
    image = (pid // regions // blocks_c // chunks).to(tl.int64)
    row = image * regions + k
    part = row * chunks + chunk_index
    channels = channels_u + channels_s
    begin = chunk_index.to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, pixels)
    source = grad + row * stride_n
    if block < blocks_u:
        c = span(block * BLOCK_C, BLOCK_C)
        from_u = u + (image if SHARED else row) * pixels * channels_u
        sum_half(
            source,
            from_u,
            None,
            slope,
            offset,
            partial,
            begin,
            end,
            pixels,
            channels_u,
            0,
            c,
            row,
            part,
            channels,
            stride_p,
            stride_c,
            ACTIVATE,
            BLOCK_P,
            BLOCK_C,
        )
    else:
        if skip is not None:
            c = span((block - blocks_u) * BLOCK_C, BLOCK_C)
            from_s = skip + image * pixels * channels_s
            mask = None if masks is None else masks + row * pixels
            sum_half(
                source,
                from_s,
                mask,
                slope,
                offset,
                partial,
                begin,
                end,
                pixels,
                channels_s,
                channels_u,
                c,
                row,
                part,
                channels,
                stride_p,
                stride_c,
                ACTIVATE,
                BLOCK_P,
                BLOCK_C,
            )


@triton.jit
def d_branch(
    grad,
    z,
    weight,
    slope,
    offset,
    on_value,
    on_square,
    row,
    p,
    c,
    channels,
    stride_n,
    stride_p,
    stride_c,
    inside,
    column,
    ACTIVATE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """d_z of a tile, and the gradient for the pixel's weight summed over the tile's channels."""
    d = load(grad + row * stride_n + p[:, None] * stride_p + c[None, :] * stride_c, inside)
    on_weight = tl.zeros([BLOCK_P], tl.float32)
    if slope is not None:
        a = load(slope + row * channels + c, column)[None, :]
        q1 = load(on_value + row * channels + c, column)[None, :]
        q2 = load(on_square + row * channels + c, column)[None, :]
        if ACTIVATE:
            d = d * silu_slope(a * z + load(offset + row * channels + c, column)[None, :])
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
                d, on_weight = d_branch(
                    grad,
                    z,
                    weight,
                    slope,
                    offset,
                    on_value,
                    on_square,
                    row,
                    p,
                    c,
                    channels,
                    stride_n,
                    stride_p,
                    stride_c,
                    inside,
                    column,
                    ACTIVATE,
                    BLOCK_P,
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
                d, on_weight = d_branch(
                    grad,
                    z,
                    weight,
                    slope,
                    offset,
                    on_value,
                    on_square,
                    row,
                    p,
                    at_skip + c,
                    channels,
                    stride_n,
                    stride_p,
                    stride_c,
                    inside,
                    column,
                    ACTIVATE,
                    BLOCK_P,
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


def spread_gradients(
    grad: Tensor,
    x: Branches,
    known: Statistics | None,
    sums: GradientSums | None,
    *,
    activate: bool,
    at_skip: int,
    with_u: bool = True,
    floor: float = 0.0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d_u, d_skip and d_masks (fp32) of the concatenation (``known`` None) or of its norm, from grad [B*K, C, H, W].

    ``at_skip`` is the channel of grad at which the skip's half begins.
    """
    weighted = known is not None and known.mass is not None
    grad, stride_n, stride_p, stride_c = pixel_strides(grad)
    d_u = empty(x.u.shape[0], x.channels_u, x.u) if with_u else None
    d_skip = None if x.skip is None else empty(x.batch, x.channels_s, x.skip)
    d_masks = torch.empty_like(x.masks) if x.masks is not None and (weighted or x.skip is not None) else None
    width = max(x.channels_u, x.channels_s)
    block_p, block_c = heuristics.tile(x.pixels, width, x.u.element_size(), 1024)
    blocks_p, blocks_c = heuristics.ceil_div(x.pixels, block_p), heuristics.ceil_div(width, block_c)
    terms = sums.mask_terms.shape[1] if sums is not None and sums.mask_terms is not None else 1
    parts = blocks_c if d_masks is None else 1  # the masks' gradient is a sum over all channels
    launch(
        branch_gradients_kernel,
        x.batch * blocks_p * parts,
        grad,
        x.u if known else None,
        x.skip,
        x.masks if d_masks is not None else None,
        *(known.slope, known.offset, sums.on_value, sums.on_square, sums.mask_terms) if known else (None,) * 5,
        d_u,
        d_skip,
        d_masks,
        x.pixels,
        x.channels_u,
        x.channels_s,
        at_skip,
        stride_n,
        stride_p,
        stride_c,
        blocks_p,
        blocks_c,
        parts,
        terms,
        floor,
        K=x.regions,
        K_PAD=heuristics.power_of_two(x.regions),
        T_PAD=heuristics.power_of_two(terms),
        SHARED=x.shared,
        ACTIVATE=activate,
        WEIGHTED=weighted,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
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
    """Gradients of :func:`norm_forward` for u, skip, masks (fp32), weight, bias, scale and shift; None for none given.

    Args:
        grad: [B*K, C, H, W], any strides. The others as for :func:`norm_forward`.
    """
    x = Branches(u, skip, masks)
    affine = tuple(dense(v) for v in (weight, bias, scale, shift))
    known = branch_statistics(x, *affine, groups, weighted, eps, floor)
    grad, stride_n, stride_p, stride_c = pixel_strides(grad)
    block_p, block_c = heuristics.tile(x.pixels, max(x.channels_u, x.channels_s), x.u.element_size(), 1024)
    blocks_u = heuristics.ceil_div(x.channels_u, block_c)
    blocks_c = blocks_u + heuristics.ceil_div(x.channels_s, block_c)
    chunk = heuristics.chunk_of(x.pixels, block_p, x.rows * blocks_c)
    chunks = heuristics.ceil_div(x.pixels, chunk)
    partial = buffer(x.rows, chunks, 2, x.channels, like=u)
    launch(
        sums_kernel,
        x.rows * blocks_c * chunks,
        grad,
        x.u,
        x.skip,
        x.masks if x.skip is not None else None,
        known.slope,
        known.offset,
        partial,
        x.pixels,
        x.channels_u,
        x.channels_s,
        stride_n,
        stride_p,
        stride_c,
        x.regions,
        blocks_u,
        blocks_c,
        chunk,
        chunks,
        SHARED=x.shared,
        ACTIVATE=activate,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        warps=4,
    )
    sums = gradient_sums(partial, x.pixels, *affine, groups, eps, known)
    found = spread_gradients(grad, x, known, sums, activate=activate, at_skip=x.channels_u, floor=floor)
    return *found, *sums.affine


def concat_backward(grad: Tensor, u: Tensor, skip: Tensor, masks: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of :func:`factorkit.kernels.norm.concat` for u, skip and masks (fp32)."""
    return spread_gradients(grad, Branches(u, skip, masks), None, None, activate=False, at_skip=u.shape[1])
