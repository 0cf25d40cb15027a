"""Softmax over the K regions, the mask-weighted sum of the branches, and its squared error: one pass each way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from factorkit.kernels import heuristics
from factorkit.kernels.tiles import buffer, kernel, launch, load, pixel_strides, span
from torch import Tensor

BLOCK_P = 256


@triton.jit
def region_softmax(logits, image, p, pixels, K: tl.constexpr, K_PAD: tl.constexpr):
    """Masks [K_PAD, BLOCK_P] of the pixels p, zero in rows from K on, and where they lie in a tensor like logits."""
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
    target,
    masks,
    prediction,
    errors,
    pixels,
    channels,
    stride_n,
    stride_p,
    stride_c,
    target_n,
    target_p,
    target_c,
    blocks_p,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    pid = tl.program_id(0)
    p = span(pid % blocks_p * BLOCK_P, BLOCK_P)
    image = (pid // blocks_p).to(tl.int64)
    m, at, inside = region_softmax(logits, image, p, pixels, K, K_PAD)
    if masks is not None:
        tl.store(masks + at, m, mask=inside)
    k = tl.arange(0, K_PAD)[:, None]
    error = tl.zeros([BLOCK_P], tl.float32)
    for c0 in range(channels):
        c = tl.cast(c0, tl.int64)
        value = load(branches + (image * K + k) * stride_n + p[None, :] * stride_p + c * stride_c, inside)
        blended = tl.sum(m * value, 0)
        if prediction is not None:
            tl.store(prediction + (image * channels + c) * pixels + p, blended, mask=p < pixels)
        if target is not None:
            off = blended - load(target + image * target_n + p * target_p + c * target_c, p < pixels)
            error += tl.where(p < pixels, off * off, 0.0)
    if errors is not None:
        tl.store(errors + pid, tl.sum(error, 0))


@kernel
def blend_backward_kernel(
    logits,
    branches,
    target,
    d_masks,
    d_prediction,
    d_errors,
    d_logits,
    d_branches,
    pixels,
    channels,
    stride_n,
    stride_p,
    stride_c,
    target_n,
    target_p,
    target_c,
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
    on_m = tl.zeros([K_PAD, BLOCK_P], tl.float32)
    if d_masks is not None:
        on_m = load(d_masks + image * on_masks_n + k * on_masks_c + p[None, :] * on_masks_p, inside)
    for c0 in range(channels):
        c = tl.cast(c0, tl.int64)
        row = image * K + k
        value = load(branches + row * stride_n + p[None, :] * stride_p + c * stride_c, inside)
        if target is not None:
            off = tl.sum(m * value, 0) - load(target + image * target_n + p * target_p + c * target_c, p < pixels)
            d = off * (2.0 * load(d_errors + image, True) / (channels * 1.0 * pixels))
        else:
            d = load(d_prediction + image * on_pred_n + p * on_pred_p + c * on_pred_c, p < pixels)
        on_m += d[None, :] * value
        tl.store(d_branches + row * out_n + p[None, :] * out_p + c * out_c, d[None, :] * m, mask=inside)
    tl.store(d_logits + at, m * (on_m - tl.sum(on_m * m, 0)[None, :]), mask=inside)


def _sizes(logits: Tensor) -> tuple[int, int, int, int]:
    """Pixels, block of pixels, blocks, and K padded."""
    pixels = logits.shape[2] * logits.shape[3]
    pad = heuristics.power_of_two(logits.shape[1])
    block = max(1, min(heuristics.power_of_two(pixels), BLOCK_P if pad <= 8 else BLOCK_P * 8 // pad))
    return pixels, block, heuristics.ceil_div(pixels, block), pad


def blend(logits: Tensor, branches: Tensor) -> tuple[Tensor, Tensor]:
    """Masks softmax_K(logits) and sum_k m_k branch_k.

    Args:
        logits: [B, K, H, W]. branches: [B*K, C, H, W], any layout.

    Returns:
        masks [B, K, H, W] and prediction [B, C, H, W] in the dtype of logits, contiguous.
    """
    logits = logits.contiguous()
    branches, *strides = pixel_strides(branches)
    pixels, block, blocks, pad = _sizes(logits)
    batch, regions, height, width = logits.shape
    masks = torch.empty_like(logits)
    prediction = logits.new_empty(batch, branches.shape[1], height, width)
    launch(
        blend_kernel,
        batch * blocks,
        logits,
        branches,
        None,
        masks,
        prediction,
        None,
        pixels,
        branches.shape[1],
        *strides,
        0,
        0,
        0,
        blocks,
        K=regions,
        K_PAD=pad,
        BLOCK_P=block,
        warps=4,
    )
    return masks, prediction


def blend_mse(logits: Tensor, branches: Tensor, target: Tensor) -> Tensor:
    """Mean (sum_k m_k branch_k - target)^2, of each image, [B] fp32; nothing else is stored"""
    logits = logits.contiguous()
    branches, *strides = pixel_strides(branches)
    target, *target_strides = pixel_strides(target)
    pixels, block, blocks, pad = _sizes(logits)
    batch, regions = logits.shape[:2]
    errors = buffer(batch, blocks, like=logits)
    launch(
        blend_kernel,
        batch * blocks,
        logits,
        branches,
        target,
        None,
        None,
        errors,
        pixels,
        branches.shape[1],
        *strides,
        *target_strides,
        blocks,
        K=regions,
        K_PAD=pad,
        BLOCK_P=block,
        warps=4,
    )
    return errors.sum(1) / (branches.shape[1] * pixels)


def blend_backward(
    logits: Tensor,
    branches: Tensor,
    *,
    d_masks: Tensor | None = None,
    d_prediction: Tensor | None = None,
    target: Tensor | None = None,
    d_errors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients for logits and branches: of :func:`blend` from ``d_masks`` and ``d_prediction``, of :func:`blend_mse`
    from ``target`` and ``d_errors`` [B]. Upstream gradients have any strides; d_branches has the layout of branches."""
    logits = logits.contiguous()
    d_logits = torch.empty_like(logits)
    d_branches = torch.empty_like(branches)  # dense as branches is, contiguous if it is not
    d_branches, *out_strides = pixel_strides(d_branches)
    branches, *strides = pixel_strides(branches)
    nothing = (None, 0, 0, 0)
    target, *target_strides = nothing if target is None else pixel_strides(target)
    d_masks, *on_masks = nothing if d_masks is None else pixel_strides(d_masks)
    d_prediction, *on_prediction = nothing if d_prediction is None else pixel_strides(d_prediction)
    pixels, block, blocks, pad = _sizes(logits)
    launch(
        blend_backward_kernel,
        logits.shape[0] * blocks,
        logits,
        branches,
        target,
        d_masks,
        d_prediction,
        d_errors if d_errors is None else d_errors.contiguous(),
        d_logits,
        d_branches,
        pixels,
        branches.shape[1],
        *strides,
        *target_strides,
        *on_masks,
        *on_prediction,
        *out_strides,
        blocks,
        K=logits.shape[1],
        K_PAD=pad,
        BLOCK_P=block,
        warps=4,
    )
    return d_logits, d_branches
