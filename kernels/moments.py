"""Weighted sums over pixels, for every channel and for all branches at once: one read of the features.

    first[k, c] = sum_p a_kp x_pc        second[k, c] = sum_p b_kp x_pc^2

with (a, b) = (1, 1) for a plain norm, (w, w) with w = m + floor for the masked one, (m, m^2) and (w m, w m^2) for the
half of the concatenation that is m_k * skip.
"""

from __future__ import annotations

import torch
import triton.language as tl
from factorkit.kernels import heuristics
from factorkit.kernels.tiles import buffer, kernel, launch, load, span
from torch import Tensor


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
    first_k = pid % blocks_k * K  # fastest: those who share a tile of x run side by side
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
            if WEIGHTED or TIMES_MASK:
                k = first_k + i
                m = load(masks + (source * regions + k) * pixels + p, p < tl.where(k < regions, pixels, 0))
                w = tl.where(p < pixels, m + floor, 0.0) if WEIGHTED else tl.full([BLOCK_P], 1.0, tl.float32)
                z = value * m[:, None] if TIMES_MASK else value
                more_first = more_first + (first[i] + w[:, None] * z,)
                more_second = more_second + (second[i] + w[:, None] * z * z,)
                more_weight = more_weight + (weight_sum[i] + w,)
            else:
                more_first = more_first + (first[i] + value,)
                more_second = more_second + (second[i] + value * value,)
                more_weight = more_weight + (weight_sum[i],)
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
    """Partial sums [R*K, chunks, 2, C] (only the first moment without ``second``) and, if ``weighted``, of the weights.

    Args:
        x: [R, C, H, W], channels last.
        masks: [R, K, H, W] fp32, needed by ``weighted`` (weights m + floor, not 1) and ``times_mask`` (m x for x).
    """
    sources, channels = x.shape[:2]
    pixels = x.shape[2] * x.shape[3]
    regions = masks.shape[1] if weighted or times_mask else 1
    block_k = heuristics.branch_block(regions)
    blocks_k = heuristics.ceil_div(regions, block_k)
    block_p, block_c = heuristics.tile(pixels, channels, x.element_size(), 2048 if block_k < 3 else 1024)
    blocks_c = heuristics.ceil_div(channels, block_c)
    chunk = heuristics.chunk_of(pixels, block_p, sources * blocks_c * blocks_k)
    chunks = heuristics.ceil_div(pixels, chunk)
    partial = buffer(sources * regions, chunks, 2 if second else 1, channels, like=x)
    mass = buffer(sources * regions, chunks, like=x) if weighted else None
    launch(
        moments_kernel,
        sources * chunks * blocks_c * blocks_k,
        x,
        masks if weighted or times_mask else None,
        partial,
        mass,
        pixels,
        channels,
        regions,
        chunk,
        chunks,
        blocks_c,
        blocks_k,
        floor,
        K=block_k,
        WEIGHTED=weighted,
        TIMES_MASK=times_mask,
        SECOND=second,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        warps=4,
    )
    return partial, mass


def flat(masks: Tensor) -> Tensor:
    """Masks as the kernels take them: fp32, regions x pixels dense."""
    return masks.to(torch.float32).contiguous()
