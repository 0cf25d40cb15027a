"""SiLU(norm([u_k ; m_k * skip])) and the bare concatenation: one elementwise pass, never stored unnormed.

A plain norm is the case without a skip, a plain U-Net's the case without masks (K = 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from factorkit.kernels import heuristics
from factorkit.kernels.finalise import Statistics, statistics
from factorkit.kernels.moments import channel_moments, flat
from factorkit.kernels.tiles import dense, empty, kernel, last, launch, load, sigmoid, span
from torch import Tensor


@dataclass
class Branches:
    """The concatenation [u_k ; m_k * skip] as the kernels see it: tensors channels last, and its sizes."""

    u: Tensor  # [B, C_u, H, W] shared by the branches, or [B*K, C_u, H, W]
    skip: Tensor | None  # [B, C_s, H, W]
    masks: Tensor | None  # [B, K, H, W] fp32

    def __init__(self, u: Tensor, skip: Tensor | None, masks: Tensor | None):
        self.u, self.skip = last(u), None if skip is None else last(skip)
        self.masks = None if masks is None else flat(masks)
        self.regions = 1 if masks is None else masks.shape[1]
        self.batch = u.shape[0] if masks is None else masks.shape[0]
        self.rows = self.batch * self.regions
        self.shared = u.shape[0] != self.rows
        self.channels_u = u.shape[1]
        self.channels_s = 0 if skip is None else skip.shape[1]
        self.channels = self.channels_u + self.channels_s
        self.pixels = u.shape[2] * u.shape[3]


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
    if slope is not None:
        a = load(slope + row * channels + c, column)
        b = load(offset + row * channels + c, column)
        z = a[None, :] * z + b[None, :]
    if ACTIVATE:
        z = z * sigmoid(z)
    tl.store(out + (row * pixels + p)[:, None] * channels + c[None, :], z, mask=inside)


def branch_pass(x: Branches, known: Statistics | None, activate: bool) -> Tensor:
    """Rows of the concatenation, normalised by ``known`` (as they are without it): [B*K, C_u + C_s, H, W]."""
    out = empty(x.rows, x.channels, x.u)
    block_p, block_c = heuristics.tile(x.pixels, max(x.channels_u, x.channels_s), x.u.element_size())
    blocks_u = heuristics.ceil_div(x.channels_u, block_c)
    blocks_c = blocks_u + heuristics.ceil_div(x.channels_s, block_c)
    blocks_p = heuristics.ceil_div(x.pixels, block_p)
    launch(
        branch_pass_kernel,
        x.batch * blocks_p * blocks_c,
        x.u,
        x.skip,
        x.masks if x.skip is not None else None,
        *(known.slope, known.offset) if known else (None, None),
        out,
        x.pixels,
        x.channels_u,
        x.channels_s,
        blocks_u,
        blocks_c,
        blocks_p,
        K=x.regions,
        SHARED=x.shared,
        ACTIVATE=activate,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        warps=4,
    )
    return out


def branch_statistics(x: Branches, weight, bias, scale, shift, groups: int, weighted: bool, eps, floor) -> Statistics:
    """Statistics of every branch; the skip, and u where it is shared, are read once for all of them."""
    rows_as_images = weighted and not x.shared
    masks_u = x.masks.reshape(x.rows, 1, *x.masks.shape[2:]) if rows_as_images else x.masks
    parts_u = channel_moments(x.u, masks_u, weighted=weighted, times_mask=False, floor=floor)
    parts_s = None
    if x.skip is not None:
        masked = x.masks is not None
        parts_s, _ = channel_moments(x.skip, x.masks, weighted=weighted, times_mask=masked, floor=floor)
    return statistics(parts_u, parts_s, x.rows, x.pixels, weight, bias, scale, shift, groups, eps)


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
    """SiLU(norm([u_k ; m_k * skip]) * (1 + scale) + shift) with statistics over groups of channels and all pixels.

    Args:
        u: [B*K, C_u, H, W], or [B, C_u, H, W] shared by the branches. skip: [B, C_s, H, W] or None.
        masks: [B, K, H, W] or None. weight, bias: [C]. scale, shift: [B*K, C], both or neither.
        weighted: moments weighted by masks + ``floor``. eps: added to the variance.

    Returns:
        [B*K, C, H, W] channels last, in the dtype of u.
    """
    x = Branches(u, skip, masks)
    affine = tuple(dense(v) for v in (weight, bias, scale, shift))
    known = branch_statistics(x, *affine, groups, weighted, eps, floor)
    return branch_pass(x, known, activate)


def concat(u: Tensor, skip: Tensor, masks: Tensor | None) -> Tensor:
    """[u_k ; m_k * skip]: [B*K, C_u + C_s, H, W] channels last, in the dtype of u."""
    return branch_pass(Branches(u, skip, masks), None, activate=False)
