"""Region tokens sum_p m_k f / (sum_p m_k + floor) for all k in one read of the features; both gradients in one pass."""

from __future__ import annotations

import torch
import triton.language as tl
from factorkit.kernels import tiles
from factorkit.kernels.branches import channel_moments, flat_masks
from factorkit.kernels.tiles import channels_last, kernel, launch, load, scratch, span
from torch import Tensor


@kernel
def tokens_kernel(
    partial, masks, tokens, channels, chunks, pixels, floor, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    area = tl.zeros([BLOCK_P], tl.float32)
    for p0 in range(0, pixels, BLOCK_P):
        p = span(p0, BLOCK_P)
        area += load(masks + row * pixels + p, p < pixels)
    total = tl.sum(area, 0) + floor
    for c0 in range(0, channels, BLOCK_C):
        c = span(c0, BLOCK_C)
        gathered = tl.zeros([BLOCK_C], tl.float32)
        for i in range(chunks):
            gathered += load(partial + (row * chunks + i) * channels + c, c < channels)
        tl.store(tokens + row * channels + c, gathered / total, mask=c < channels)


def pool(features: Tensor, masks: Tensor, floor: float) -> Tensor:
    """Compute tokens [B, K, C] fp32 of features [B, C, H, W] and masks [B, K, H, W]."""
    features, masks = channels_last(features), flat_masks(masks)
    batch, channels = features.shape[:2]
    regions, pixels = masks.shape[1], masks.shape[2] * masks.shape[3]
    partial, _ = channel_moments(features, masks, weighted=False, times_mask=True, floor=0.0, second=False)
    tokens = scratch(batch, regions, channels, like=features)
    sizes = (channels, partial.shape[1], pixels, floor)
    blocks = {"BLOCK_C": min(256, tiles.power_of_two(channels)), "BLOCK_P": 1024}
    launch(tokens_kernel, batch * regions, partial, masks, tokens, *sizes, **blocks, warps=4)
    return tokens


@kernel
def pool_backward_kernel(
    grad,
    features,
    masks,
    tokens,
    areas,
    d_features,
    d_masks,
    pixels,
    channels,
    stride_b,
    stride_k,
    stride_c,
    blocks_p,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    p = span(pid % blocks_p * BLOCK_P, BLOCK_P)
    image = (pid // blocks_p).to(tl.int64)
    here = p < pixels
    branch = tl.arange(0, K_PAD)[None, :]
    on_masks = tl.zeros([BLOCK_P, K_PAD], tl.float32)
    for c0 in range(0, channels, BLOCK_C):
        c = span(c0, BLOCK_C)
        column = c < channels
        inside = here[:, None] & column[None, :]
        at = (image * pixels + p)[:, None] * channels + c[None, :]
        f = load(features + at, inside)
        total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for k in tl.static_range(K):
            row = image * K + k
            g = load(grad + image * stride_b + k * stride_k + c * stride_c, column) / tl.load(areas + row)
            token = load(tokens + row * channels + c, column)
            total += load(masks + row * pixels + p, here)[:, None] * g[None, :]
            on_masks += tl.where(branch == k, tl.sum(g[None, :] * (f - token[None, :]), 1)[:, None], 0.0)
        tl.store(d_features + at, total, mask=inside)
    tl.store(d_masks + (image * K + branch) * pixels + p[:, None], on_masks, mask=here[:, None] & (branch < K))


def pool_backward(grad: Tensor, features: Tensor, masks: Tensor, tokens: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Compute the gradients of :func:`pool` for features and masks (fp32); grad [B, K, C] may have any strides."""
    features, masks = channels_last(features), flat_masks(masks)
    areas = masks.sum((2, 3)) + floor
    batch, channels = features.shape[:2]
    regions, pixels = masks.shape[1], masks.shape[2] * masks.shape[3]
    d_features, d_masks = torch.empty_like(features), torch.empty_like(masks)
    block_p, block_c = tiles.pixel_channel_tile(pixels, channels, features.element_size(), 1024)
    blocks_p = tiles.ceil_div(pixels, block_p)
    tensors = (grad, features, masks, tokens.contiguous(), areas, d_features, d_masks)
    constants = {"K": regions, "K_PAD": tiles.power_of_two(regions), "BLOCK_P": block_p, "BLOCK_C": block_c}
    sizes = (pixels, channels, *grad.stride(), blocks_p)
    launch(pool_backward_kernel, batch * blocks_p, *tensors, *sizes, **constants, warps=4)
    return d_features, d_masks
