"""Ops on the region masks themselves: their pyramid, the tokens they pool, the blend of the branches."""

from __future__ import annotations

import torch
from torch import Tensor

from factorkit.ops import reference
from factorkit.ops.constants import POOL_FLOOR
from factorkit.ops.dispatch import dense_format, full_precision, use_reference


def mask_pyramid(masks: Tensor, levels: int) -> list[Tensor]:
    """The masks and their area averages at 1/2 ... 1/2^levels of the resolution.

    Args:
        masks: [B, K, H, W]; H and W divisible by 2^levels.

    Returns:
        ``levels + 1`` tensors, the given masks first; each sums to one over K wherever the given one does.

    Raises:
        ValueError: a size that cannot be halved so often.
    """
    height, width = masks.shape[2:]
    if height % 2**levels or width % 2**levels:
        raise ValueError(f"masks of {height}x{width} pixels cannot be halved {levels} times")
    if levels == 0:
        return [masks]
    run = reference.mask_pyramid if use_reference() else torch.ops.factorkit.mask_pyramid
    return [masks, *run(masks, levels)]


def region_pool(features: Tensor, masks: Tensor) -> Tensor:
    """Region tokens c_k = sum_p m_k f / (sum_p m_k + 1/2) of all K regions: [B, K, C], fp32.

    Args:
        features: [B, C, H, W].
        masks: [B, K, H, W].

    Raises:
        ValueError: features and masks of different sizes.
    """
    if features.shape[2:] != masks.shape[2:]:
        raise ValueError(f"features are {tuple(features.shape[2:])} pixels but masks {tuple(masks.shape[2:])}")
    run = reference.region_pool if use_reference() else torch.ops.factorkit.region_pool
    return run(features, masks)


def region_blend(logits: Tensor, branches: Tensor) -> tuple[Tensor, Tensor]:
    """Masks m = softmax_K(logits) and the blended prediction sum_k m_k * branch_k (thesis eq. 2.7).

    Args:
        logits: [B, K, H, W], fp32 (or fp64).
        branches: [B*K, C, H, W], any float dtype.

    Returns:
        masks [B, K, H, W] and prediction [B, C, H, W], both in the dtype of ``logits``.
    """
    run = reference.region_blend if use_reference() else torch.ops.factorkit.region_blend
    return run(logits, branches)


def region_blend_mse(logits: Tensor, branches: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of every image's blend against its target, with neither masks nor prediction stored.

    Args:
        logits, branches: as for :func:`region_blend`.
        target: [B, C, H, W]; no gradient flows into it.

    Returns:
        [B], in the dtype of ``logits``: each image's error, its mean over channels and pixels.

    Raises:
        ValueError: a target of another shape than the blend.
    """
    shape = (logits.shape[0], branches.shape[1], *logits.shape[2:])
    if target.shape != shape:
        raise ValueError(f"target is {tuple(target.shape)} but the blend of the branches is {shape}")
    run = reference.region_blend_mse if use_reference() else torch.ops.factorkit.region_blend_mse
    return run(logits, branches, target.detach())


# --- registration ---


@torch.library.custom_op("factorkit::mask_pyramid", mutates_args=())
def _pyramid(masks: Tensor, levels: int) -> list[Tensor]:
    return reference.mask_pyramid(masks.contiguous(), levels)


@_pyramid.register_fake
def _(masks, levels):
    b, k, h, w = masks.shape
    return [masks.new_empty(b, k, h >> i, w >> i) for i in range(1, levels + 1)]


@torch.library.custom_op("factorkit::mask_pyramid_backward", mutates_args=())
def _pyramid_backward(grads: list[Tensor]) -> Tensor:
    # From the coarsest level up: every fine pixel receives a quarter of what its parent gathered.
    total = grads[-1]
    for grad in (*reversed(grads[:-1]), None):
        total = total.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3) * 0.25
        total = total if grad is None else total + grad
    return total.contiguous()


@_pyramid_backward.register_fake
def _(grads):
    b, k, h, w = grads[0].shape
    return grads[0].new_empty(b, k, 2 * h, 2 * w)


def _pyramid_setup(ctx, inputs, output):
    ctx.save_for_backward(*output)


def _pyramid_autograd(ctx, grads):
    filled = [torch.zeros_like(like) if g is None else g for g, like in zip(grads, ctx.saved_tensors, strict=True)]
    return torch.ops.factorkit.mask_pyramid_backward(filled), None


_pyramid.register_autograd(_pyramid_autograd, setup_context=_pyramid_setup)


@torch.library.custom_op("factorkit::region_pool", mutates_args=())
def _pool(features: Tensor, masks: Tensor) -> Tensor:
    return reference.region_pool(features, masks)


@_pool.register_fake
def _(features, masks):
    dtype = torch.promote_types(features.dtype, torch.float32)
    return features.new_empty(masks.shape[0], masks.shape[1], features.shape[1], dtype=dtype)


@torch.library.custom_op("factorkit::region_pool_backward", mutates_args=())
@full_precision
def _pool_backward(grad: Tensor, features: Tensor, masks: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    values, flat = features.to(grad.dtype).flatten(2), masks.to(grad.dtype).flatten(2)
    total = flat.sum(-1, keepdim=True) + POOL_FLOOR
    d_features = grad.transpose(1, 2) @ (flat / total)
    d_masks = (grad @ values - (grad * tokens).sum(-1, keepdim=True)) / total
    out = torch.empty_like(features, memory_format=dense_format(features)).copy_(d_features.reshape(features.shape))
    return out, d_masks.reshape(masks.shape).to(masks.dtype)


@_pool_backward.register_fake
def _(grad, features, masks, tokens):
    return torch.empty_like(features, memory_format=dense_format(features)), _contiguous_like(masks)


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _pool_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output)


def _pool_autograd(ctx, grad):
    return torch.ops.factorkit.region_pool_backward(grad, *ctx.saved_tensors)


_pool.register_autograd(_pool_autograd, setup_context=_pool_setup)


@torch.library.custom_op("factorkit::region_blend", mutates_args=())
def _blend(logits: Tensor, branches: Tensor) -> tuple[Tensor, Tensor]:
    masks, prediction = reference.region_blend(logits, branches)
    return masks.contiguous(), prediction.contiguous()


@_blend.register_fake
def _(logits, branches):
    b, _, h, w = logits.shape
    return _contiguous_like(logits), logits.new_empty(b, branches.shape[1], h, w)


@torch.library.custom_op("factorkit::region_blend_backward", mutates_args=())
def _blend_backward(d_masks: Tensor, d_prediction: Tensor, logits: Tensor, branches: Tensor) -> tuple[Tensor, Tensor]:
    masks = logits.softmax(dim=1)
    outputs = branches.to(masks.dtype).unflatten(0, masks.shape[:2])
    d_outputs = masks[:, :, None] * d_prediction[:, None]
    d_masks = d_masks + (outputs * d_prediction[:, None]).sum(2)
    d_logits = masks * (d_masks - (d_masks * masks).sum(1, keepdim=True))
    return d_logits.contiguous(), _settled(d_outputs, branches)


def _settled(d_outputs: Tensor, branches: Tensor) -> Tensor:
    """[B, K, C, H, W] as a gradient for the branches, in their dtype and layout."""
    return torch.empty_like(branches, memory_format=dense_format(branches)).copy_(d_outputs.flatten(0, 1))


@_blend_backward.register_fake
def _(d_masks, d_prediction, logits, branches):
    return _contiguous_like(logits), torch.empty_like(branches, memory_format=dense_format(branches))


def _blend_autograd(ctx, d_masks, d_prediction):
    return torch.ops.factorkit.region_blend_backward(d_masks, d_prediction, *ctx.saved_tensors)


_blend.register_autograd(_blend_autograd, setup_context=_save_inputs)


@torch.library.custom_op("factorkit::region_blend_mse", mutates_args=())
def _mse(logits: Tensor, branches: Tensor, target: Tensor) -> Tensor:
    return reference.region_blend_mse(logits, branches, target)


@_mse.register_fake
def _(logits, branches, target):
    return logits.new_empty(logits.shape[0])


@torch.library.custom_op("factorkit::region_blend_mse_backward", mutates_args=())
def _mse_backward(grad: Tensor, logits: Tensor, branches: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    masks, prediction = reference.region_blend(logits, branches)
    share = grad * (2.0 / max(1, prediction.shape[1:].numel()))
    d_prediction = (prediction - target.to(prediction.dtype)) * share[:, None, None, None]
    return _blend_backward._init_fn(torch.zeros_like(masks), d_prediction, logits, branches)


@_mse_backward.register_fake
def _(grad, logits, branches, target):
    return _contiguous_like(logits), torch.empty_like(branches, memory_format=dense_format(branches))


def _mse_autograd(ctx, grad):
    return *torch.ops.factorkit.region_blend_mse_backward(grad, *ctx.saved_tensors), None


_mse.register_autograd(_mse_autograd, setup_context=_save_inputs)
