"""Ops on the region masks: their pyramid, the tokens they pool, the blend of the branches.

B images, K regions, C channels, H x W pixels. Each family reads: reference, public function, implementations.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from factorkit.ops.dispatch import (
    empty_like,
    full_precision,
    kernels,
    reference_gradients,
    register,
    save_inputs,
    select,
    with_layout_of,
)

POOL_FLOOR = 0.5  # half a pixel: the token of an empty region tends to zero instead of to noise


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# --- mask pyramid ---


def average_masks(masks: Tensor, levels: int) -> list[Tensor]:
    """Average the masks over areas, at 1/2, 1/4 ... 1/2^levels of the resolution: the reference."""
    out = []
    for _ in range(levels):
        masks = F.avg_pool2d(masks, 2)
        out.append(masks)
    return out


def mask_pyramid(masks: Tensor, levels: int) -> list[Tensor]:
    """Compute the masks and their area averages at 1/2 ... 1/2^levels of the resolution.

    Args:
        masks: [B, K, H, W]; H and W divisible by 2^levels.
        levels: number of halvings.

    Returns:
        ``levels + 1`` tensors, the given masks first; each sums to one over K wherever the given one does.

    Raises:
        ValueError: H or W is not divisible by 2^levels.
    """
    height, width = masks.shape[2:]
    if height % 2**levels or width % 2**levels:
        raise ValueError(f"masks of {height}x{width} pixels cannot be halved {levels} times")
    if levels == 0:
        return [masks]
    return [masks, *select("mask_pyramid", average_masks, masks)(masks, levels)]


def _pyramid(masks: Tensor, levels: int) -> list[Tensor]:
    return average_masks(masks.contiguous(), levels)


def _pyramid_fake(masks: Tensor, levels: int) -> list[Tensor]:
    b, k, h, w = masks.shape
    return [masks.new_empty(b, k, h >> i, w >> i) for i in range(1, levels + 1)]


def _pyramid_backward(grads: list[Tensor]) -> Tensor:
    # From the coarsest level up: every fine pixel receives a quarter of its parent's total.
    total = grads[-1]
    for grad in (*reversed(grads[:-1]), None):
        total = F.interpolate(total, scale_factor=2.0, mode="nearest") * 0.25
        total = total if grad is None else total + grad
    return total.contiguous()


def _pyramid_backward_fake(grads: list[Tensor]) -> Tensor:
    b, k, h, w = grads[0].shape
    return grads[0].new_empty(b, k, 2 * h, 2 * w)


def _pyramid_setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    ctx.save_for_backward(*output)


def _pyramid_autograd(ctx: Any, grads: list[Tensor | None]) -> tuple:
    filled = [torch.zeros_like(like) if g is None else g for g, like in zip(grads, ctx.saved_tensors, strict=True)]
    if torch.is_grad_enabled():  # linear: its own gradient is differentiable
        return _pyramid_backward(filled), None
    return torch.ops.factorkit.mask_pyramid_backward(filled), None


register(
    "mask_pyramid",
    _pyramid,
    _pyramid_fake,
    triton=lambda masks, levels: kernels.mask_pyramid.pyramid(masks, levels),
    autograd=(_pyramid_setup_context, _pyramid_autograd),
)
register(
    "mask_pyramid_backward",
    _pyramid_backward,
    _pyramid_backward_fake,
    triton=lambda grads: kernels.mask_pyramid.pyramid_backward(grads),
)


# --- region tokens ---


@full_precision
def average_features(features: Tensor, masks: Tensor) -> Tensor:
    """Average the features over each region: the reference of :func:`region_pool`."""
    values = features.to(torch.promote_types(features.dtype, torch.float32)).flatten(2)
    weights = masks.to(values.dtype).flatten(2)
    weights = weights / (weights.sum(-1, keepdim=True) + POOL_FLOOR)
    return weights @ values.transpose(1, 2)


def region_pool(features: Tensor, masks: Tensor) -> Tensor:
    """Compute the region tokens c_k = sum_p m_k f / (sum_p m_k + 1/2) of all K regions: [B, K, C], fp32.

    Args:
        features: [B, C, H, W].
        masks: [B, K, H, W].

    Raises:
        ValueError: features and masks of different sizes.
    """
    if features.shape[2:] != masks.shape[2:]:
        raise ValueError(f"features are {tuple(features.shape[2:])} pixels but masks {tuple(masks.shape[2:])}")
    return select("region_pool", average_features, features)(features, masks)


def _pool(features: Tensor, masks: Tensor) -> Tensor:
    return average_features(features, masks)


def _pool_fake(features: Tensor, masks: Tensor) -> Tensor:
    dtype = torch.promote_types(features.dtype, torch.float32)
    return features.new_empty(masks.shape[0], masks.shape[1], features.shape[1], dtype=dtype)


@full_precision
def _pool_backward(grad: Tensor, features: Tensor, masks: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    values, weights = features.to(grad.dtype).flatten(2), masks.to(grad.dtype).flatten(2)
    total = weights.sum(-1, keepdim=True) + POOL_FLOOR
    d_features = (weights / total).transpose(1, 2) @ grad  # pixels before channels, as features mostly lie
    d_masks = (grad @ values - (grad * tokens).sum(-1, keepdim=True)) / total
    d_features = d_features.transpose(1, 2).reshape(features.shape).to(features.dtype)
    return with_layout_of(d_features, features), d_masks.reshape(masks.shape).to(masks.dtype)


def _pool_backward_fake(grad: Tensor, features: Tensor, masks: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return empty_like(features), _contiguous_like(masks)


def _pool_backward_triton(grad: Tensor, features: Tensor, masks: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    d_features, d_masks = kernels.region_pool.pool_backward(grad, features, masks, tokens, POOL_FLOOR)
    return with_layout_of(d_features, features), d_masks.to(masks.dtype)


def _pool_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _pool_autograd(ctx: Any, grad: Tensor) -> tuple:
    if torch.is_grad_enabled():
        return reference_gradients(average_features, ctx.saved_tensors[:2], (grad,))
    return torch.ops.factorkit.region_pool_backward(grad, *ctx.saved_tensors)


register(
    "region_pool",
    _pool,
    _pool_fake,
    triton=lambda features, masks: kernels.region_pool.pool(features, masks, POOL_FLOOR),
    autograd=(_pool_setup_context, _pool_autograd),
)
register("region_pool_backward", _pool_backward, _pool_backward_fake, triton=_pool_backward_triton)


# --- blend of the branches ---


def blend_branches(logits: Tensor, branches: Tensor) -> tuple[Tensor, Tensor]:
    """Return the masks and the mask-weighted sum of the branches: the reference of :func:`region_blend`."""
    masks = logits.softmax(dim=1)
    outputs = branches.to(masks.dtype).unflatten(0, masks.shape[:2])
    return masks, (outputs * masks[:, :, None]).sum(1)


def region_blend(logits: Tensor, branches: Tensor) -> tuple[Tensor, Tensor]:
    """Compute masks m = softmax_K(logits) and the blended prediction sum_k m_k * branch_k (thesis eq. 2.7).

    Args:
        logits: [B, K, H, W], fp32 (or fp64).
        branches: [B*K, C, H, W], any float dtype.

    Returns:
        masks [B, K, H, W] and prediction [B, C, H, W], both in the dtype of ``logits``.
    """
    return select("region_blend", blend_branches, logits)(logits, branches)


def _blend(logits: Tensor, branches: Tensor) -> tuple[Tensor, Tensor]:
    masks, prediction = blend_branches(logits, branches)
    return masks.contiguous(), prediction.contiguous()


def _blend_fake(logits: Tensor, branches: Tensor) -> tuple[Tensor, Tensor]:
    return _contiguous_like(logits), logits.new_empty(logits.shape[0], branches.shape[1], *logits.shape[2:])


def _blend_backward(d_masks: Tensor, d_prediction: Tensor, logits: Tensor, branches: Tensor) -> tuple[Tensor, Tensor]:
    masks = logits.softmax(dim=1)
    outputs = branches.to(masks.dtype).unflatten(0, masks.shape[:2])
    d_outputs = masks[:, :, None] * d_prediction[:, None]
    d_masks = d_masks + (outputs * d_prediction[:, None]).sum(2)
    d_logits = masks * (d_masks - (d_masks * masks).sum(1, keepdim=True))
    return d_logits.contiguous(), empty_like(branches).copy_(d_outputs.flatten(0, 1))


def _blend_backward_fake(
    d_masks: Tensor, d_prediction: Tensor, logits: Tensor, branches: Tensor
) -> tuple[Tensor, Tensor]:
    return _contiguous_like(logits), empty_like(branches)


def _blend_autograd(ctx: Any, d_masks: Tensor, d_prediction: Tensor) -> tuple:
    if torch.is_grad_enabled():
        return reference_gradients(blend_branches, ctx.saved_tensors, (d_masks, d_prediction))
    return torch.ops.factorkit.region_blend_backward(d_masks, d_prediction, *ctx.saved_tensors)


register(
    "region_blend",
    _blend,
    _blend_fake,
    triton=lambda logits, branches: kernels.region_blend.blend(logits, branches),
    autograd=(save_inputs, _blend_autograd),
)
register(
    "region_blend_backward",
    _blend_backward,
    _blend_backward_fake,
    triton=lambda *grads_and_inputs: kernels.region_blend.blend_backward(*grads_and_inputs),
)
