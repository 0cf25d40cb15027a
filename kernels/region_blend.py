"""Softmax over the K regions and the mask-weighted sum of the branches, one pass in each direction."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from factorkit.kernels import tiles
from factorkit.kernels.tiles import kernel, launch, load, pixel_strides, span
from torch import Tensor

MAX_BLOCK_P = 256  # pixels of a program for up to 8 regions


@triton.jit
def region_softmax(logits, image, p, pixels, K: tl.constexpr, K_PAD: tl.constexpr):
    """Return masks [K_PAD, BLOCK_P] of the pixels p, zero in rows from K on, and their offsets in the logits."""
    k = tl.arange(0, K_PAD)[:, None]
    at = (image * K + k) * pixels + p[None, :]
    inside = (k < K) & (p < pixels)[None, :]
    x = tl.where(k < K, load(logits + at, inside), float("-inf"))
    e = tl.exp(x - tl.max(x, 0)[None, :])
    return e / tl.sum(e, 0)[None, :], at, inside


@kernel
def blend_kernel(
    logits,
    branches,
    masks,
    prediction,
    pixels,
    channels,
    stride_n,
    stride_p,
    stride_c,
    blocks_p,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    pid = tl.program_id(0)
    p = span(pid % blocks_p * BLOCK_P, BLOCK_P)
    image = (pid // blocks_p).to(tl.int64)
    m, at, inside = region_softmax(logits, image, p, pixels, K, K_PAD)
    tl.store(masks + at, m, mask=inside)
    k = tl.arange(0, K_PAD)[:, None]
    for c0 in range(channels):
        c = tl.cast(c0, tl.int64)
        value = load(branches + (image * K + k) * stride_n + p[None, :] * stride_p + c * stride_c, inside)
        tl.store(prediction + (image * channels + c) * pixels + p, tl.sum(m * value, 0), mask=p < pixels)


@kernel
def blend_backward_kernel(
    logits,
    branches,
    d_masks,
    d_prediction,
    d_logits,
    d_branches,
    pixels,
    channels,
    stride_n,
    stride_p,
    stride_c,
    on_masks_n,
    on_masks_p,
    on_masks_c,
    on_pred_n,
    on_pred_p,
    on_pred_c,
    out_n,
    out_p,
    out_c,
    blocks_p,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    pid = tl.program_id(0)
    p = span(pid % blocks_p * BLOCK_P, BLOCK_P)
    image = (pid // blocks_p).to(tl.int64)
    m, at, inside = region_softmax(logits, image, p, pixels, K, K_PAD)
    k = tl.arange(0, K_PAD)[:, None]
    on_m = load(d_masks + image * on_masks_n + k * on_masks_c + p[None, :] * on_masks_p, inside)
    for c0 in range(channels):
        c = tl.cast(c0, tl.int64)
        row = image * K + k
        value = load(branches + row * stride_n + p[None, :] * stride_p + c * stride_c, inside)
        d = load(d_prediction + image * on_pred_n + p * on_pred_p + c * on_pred_c, p < pixels)
        on_m += d[None, :] * value
        tl.store(d_branches + row * out_n + p[None, :] * out_p + c * out_c, d[None, :] * m, mask=inside)
    tl.store(d_logits + at, m * (on_m - tl.sum(on_m * m, 0)[None, :]), mask=inside)


def _tile(logits: Tensor) -> tuple[int, int, dict[str, int]]:
    """Return the number of pixels, the number of blocks of pixels, and the kernels' constants."""
    regions, pixels = logits.shape[1], logits.shape[2] * logits.shape[3]
    pad = tiles.power_of_two(regions)
    block = max(1, min(tiles.power_of_two(pixels), MAX_BLOCK_P if pad <= 8 else MAX_BLOCK_P * 8 // pad))
    return pixels, tiles.ceil_div(pixels, block), {"K": regions, "K_PAD": pad, "BLOCK_P": block}


def blend(logits: Tensor, branches: Tensor) -> tuple[Tensor, Tensor]:
    """Compute masks m = softmax_K(logits) and the prediction sum_k m_k branch_k.

    Args:
        logits: [B, K, H, W].
        branches: [B*K, C, H, W], any layout.

    Returns:
        masks [B, K, H, W] and prediction [B, C, H, W] in the dtype of logits, contiguous.
    """
    logits = logits.contiguous()
    branches, *strides = pixel_strides(branches)
    batch, channels = logits.shape[0], branches.shape[1]
    pixels, blocks, constants = _tile(logits)
    masks, prediction = torch.empty_like(logits), logits.new_empty(batch, channels, *logits.shape[2:])
    tensors, sizes = (logits, branches, masks, prediction), (pixels, channels, *strides, blocks)
    launch(blend_kernel, batch * blocks, *tensors, *sizes, **constants, warps=4)
    return masks, prediction


def blend_backward(d_masks: Tensor, d_prediction: Tensor, logits: Tensor, branches: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of :func:`blend` for logits and branches.

    The upstream gradients may have any strides; the branches' gradient has the layout of the branches.
    """
    logits = logits.contiguous()
    d_logits = torch.empty_like(logits)
    d_branches = torch.empty_like(branches)  # dense as branches is, contiguous if it is not
    d_branches, *out_strides = pixel_strides(d_branches)
    branches, *strides = pixel_strides(branches)
    d_masks, *masks_strides = pixel_strides(d_masks)
    d_prediction, *prediction_strides = pixel_strides(d_prediction)
    pixels, blocks, constants = _tile(logits)
    tensors = (logits, branches, d_masks, d_prediction, d_logits, d_branches)
    sizes = (pixels, branches.shape[1], *strides, *masks_strides, *prediction_strides, *out_strides, blocks)
    launch(blend_backward_kernel, logits.shape[0] * blocks, *tensors, *sizes, **constants, warps=4)
    return d_logits, d_branches
