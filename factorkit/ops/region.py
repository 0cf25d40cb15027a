"""Ops on the region masks: their pyramid, the tokens they pool, the blend of the branches.

B images, K regions, C channels, H x W pixels. Each family reads: reference, public function, implementations.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from factorkit.ops.dispatch import (
    CPP_DTYPES,
    CPP_MIN_CHANNELS,
    EXTENSION,
    addresses,
    dense_format,
    empty_like,
    full_precision,
    has_extension,
    kernels,
    reference_gradients,
    register,
    select,
    with_layout_of,
)

POOL_FLOOR = 0.5  # half a pixel: the token of an empty region tends to zero instead of to noise
LEVELS_PER_CALL = 5  # of the op: as many as a launch of kernels/mask_pyramid.py computes


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _cpp_takes(*tensors: Tensor) -> bool:
    return all(x.dtype in CPP_DTYPES and x.numel() > 0 for x in tensors) and has_extension("cpu")


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
    run = select("mask_pyramid", average_masks, masks)
    pyramid = [masks]
    while len(pyramid) <= levels:
        count = min(levels + 1 - len(pyramid), LEVELS_PER_CALL)
        pyramid += run(pyramid[-1], count)[:count]
    return pyramid


FiveTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # a list would cost autograd longer than the averages take


def _pad(levels: list[Tensor]) -> FiveTensors:
    """Append empty tensors: an op has the same number of outputs whatever its arguments."""
    missing = LEVELS_PER_CALL - len(levels)
    return cast(FiveTensors, (*levels, *(levels[0].new_empty(0) for _ in range(missing))))


def _pyramid(masks: Tensor, levels: int) -> FiveTensors:
    return _pad(average_masks(masks.contiguous(), levels))


def _allocate_levels(masks: Tensor, levels: int) -> list[Tensor]:
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


def _pyramid_cpp(masks: Tensor, levels: int) -> FiveTensors | None:
    if not _cpp_takes(masks):
        return None
    out = _allocate_levels(masks, levels)
    _call_pyramid("mask_pyramid_forward", [_with_dense_planes(masks), *out])
    return _pad(out)


def _pyramid_backward_cpp(grads: list[Tensor]) -> Tensor | None:
    if not _cpp_takes(*grads):
        return None
    out = _pyramid_backward_fake(grads)
    _call_pyramid("mask_pyramid_backward", [out, *map(_with_dense_planes, grads)])
    return out


def _with_dense_planes(x: Tensor) -> Tensor:
    return x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous()


def _call_pyramid(name: str, levels: list[Tensor]) -> None:
    planes = [(x.data_ptr(), *x.stride()[:2]) for x in levels]
    getattr(EXTENSION, name)(levels[0].shape, levels[0].dtype == torch.bfloat16, planes, torch.get_num_threads())


def _pyramid_setup_context(ctx: Any, inputs: tuple, output: FiveTensors) -> None:
    ctx.shape, ctx.levels = inputs[0].shape, inputs[1]
    ctx.mark_non_differentiable(*output[ctx.levels :])
    ctx.set_materialize_grads(False)


def _pyramid_autograd(ctx: Any, *grads: Tensor | None) -> tuple:
    b, k, h, w = ctx.shape
    present = next((g for g in grads if g is not None), None)
    if present is None:
        return None, None
    filled = [present.new_zeros(b, k, h >> i, w >> i) if g is None else g for i, g in enumerate(grads[: ctx.levels], 1)]
    if torch.is_grad_enabled():  # linear: its own gradient is differentiable
        return _pyramid_backward(filled), None
    return torch.ops.factorkit.mask_pyramid_backward(filled), None


register(
    "mask_pyramid",
    _pyramid,
    lambda masks, levels: _pad(_allocate_levels(masks, levels)),
    cpp=_pyramid_cpp,
    triton=lambda masks, levels: _pad(kernels.mask_pyramid.pyramid(masks, levels)),
    autograd=(_pyramid_setup_context, _pyramid_autograd),
)
register(
    "mask_pyramid_backward",
    _pyramid_backward,
    _pyramid_backward_fake,
    cpp=_pyramid_backward_cpp,
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


def _pool_cpp(features: Tensor, masks: Tensor) -> Tensor | None:
    if not _cpp_pools(features, masks):
        return None
    masks, tokens = masks.contiguous(), _pool_fake(features, masks)
    problem = _pool_problem(features, masks)
    EXTENSION.region_pool_forward(*problem, tokens.data_ptr(), torch.get_num_threads())
    return tokens


def _pool_backward_cpp(grad: Tensor, features: Tensor, masks: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor] | None:
    if grad.dtype != torch.float32 or not _cpp_pools(features, masks):
        return None
    masks, grad = masks.contiguous(), grad.contiguous()
    d_features, d_masks = torch.empty_like(features), torch.empty_like(masks)
    where = addresses(tokens, grad, d_features, d_masks)
    EXTENSION.region_pool_backward(*_pool_problem(features, masks), where, torch.get_num_threads())
    return d_features, d_masks


def _cpp_pools(features: Tensor, masks: Tensor) -> bool:
    if masks.dtype != torch.float32 or features.shape[1] < CPP_MIN_CHANNELS:
        return False
    if features.shape[:1] + features.shape[2:] != masks.shape[:1] + masks.shape[2:]:
        return False
    return dense_format(features) == torch.channels_last and _cpp_takes(features, masks)


def _pool_problem(features: Tensor, masks: Tensor) -> tuple:
    """Return the arguments of csrc/region_pool.h that the tensors are."""
    sizes = [*masks.shape[:2], features.shape[1], features.shape[2] * features.shape[3]]
    return addresses(features, masks), sizes, features.dtype == torch.bfloat16, POOL_FLOOR


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
    cpp=_pool_cpp,
    triton=lambda features, masks: kernels.region_pool.pool(features, masks, POOL_FLOOR),
    autograd=(_pool_setup_context, _pool_autograd),
)
register(
    "region_pool_backward", _pool_backward, _pool_backward_fake, cpp=_pool_backward_cpp, triton=_pool_backward_triton
)


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

    Raises:
        ValueError: branches that are not B*K images of the logits' size.
    """
    batch, regions, *size = logits.shape
    if branches.shape[0] != batch * regions or list(branches.shape[2:]) != size:
        raise ValueError(f"branches {tuple(branches.shape)} must be [B*K, C, H, W] of logits {tuple(logits.shape)}")
    return select("region_blend", blend_branches, logits)(logits, branches)


def _blend(logits: Tensor, branches: Tensor) -> tuple[Tensor, Tensor]:
    masks, prediction = blend_branches(logits, branches)
    return masks.contiguous(), prediction.contiguous()


def _blend_fake(logits: Tensor, branches: Tensor) -> tuple[Tensor, Tensor]:
    return _contiguous_like(logits), logits.new_empty(logits.shape[0], branches.shape[1], *logits.shape[2:])


def _blend_backward(
    d_masks: Tensor | None, d_prediction: Tensor, masks: Tensor, logits: Tensor, branches: Tensor
) -> tuple[Tensor, Tensor]:
    outputs = branches.to(masks.dtype).unflatten(0, masks.shape[:2])
    d_outputs = masks[:, :, None] * d_prediction[:, None]
    on_masks = (outputs * d_prediction[:, None]).sum(2)
    on_masks = on_masks if d_masks is None else on_masks + d_masks
    d_logits = masks * (on_masks - (on_masks * masks).sum(1, keepdim=True))
    return d_logits.contiguous(), empty_like(branches).copy_(d_outputs.flatten(0, 1))


def _blend_backward_fake(
    d_masks: Tensor | None, d_prediction: Tensor, masks: Tensor, logits: Tensor, branches: Tensor
) -> tuple[Tensor, Tensor]:
    return _contiguous_like(logits), empty_like(branches)


def _blend_cpp(logits: Tensor, branches: Tensor) -> tuple[Tensor, Tensor] | None:
    if not _cpp_takes(logits, branches):
        return None
    values, branches, problem = _blend_problem(logits, branches)
    masks, prediction = _blend_fake(values, branches)
    EXTENSION.region_blend_forward(*problem, masks.data_ptr(), prediction.data_ptr(), torch.get_num_threads())
    return masks.to(logits.dtype), prediction.to(logits.dtype)


def _blend_backward_cpp(
    d_masks: Tensor | None, d_prediction: Tensor, masks: Tensor, logits: Tensor, branches: Tensor
) -> tuple[Tensor, Tensor] | None:
    if not _cpp_takes(logits, branches):
        return None
    values, branches, problem = _blend_problem(logits, branches)
    if masks.dtype != torch.float32:
        masks = values.softmax(1)  # rounded masks do not sum to one, on which the gradient of the logits relies
    given = [None if x is None else x.float().contiguous() for x in (masks, d_masks, d_prediction)]
    d_logits, d_branches = torch.empty_like(values), torch.empty_like(branches)
    where = addresses(*given, d_logits, d_branches)
    EXTENSION.region_blend_backward(*problem, where, torch.get_num_threads())
    return d_logits.to(logits.dtype), d_branches


def _blend_problem(logits: Tensor, branches: Tensor) -> tuple[Tensor, Tensor, tuple]:
    """Return the logits in fp32 and the branches, both dense, and the arguments of csrc/region.h that they are."""
    layout = dense_format(branches)
    logits, branches = logits.float().contiguous(), branches.contiguous(memory_format=layout)
    batch, regions, height, width = logits.shape
    sizes = [batch, regions, branches.shape[1], height * width]
    flags = [layout == torch.channels_last, branches.dtype == torch.bfloat16]
    return logits, branches, (addresses(logits, branches), sizes, flags)


def _blend_setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[0], *inputs)
    ctx.set_materialize_grads(False)


def _blend_autograd(ctx: Any, d_masks: Tensor | None, d_prediction: Tensor | None) -> tuple:
    masks, logits, branches = ctx.saved_tensors
    if torch.is_grad_enabled():
        return reference_gradients(blend_branches, (logits, branches), (d_masks, d_prediction))
    if d_prediction is None:
        d_prediction = torch.zeros_like(_blend_fake(logits, branches)[1])
    return torch.ops.factorkit.region_blend_backward(d_masks, d_prediction, masks, logits, branches)


register(
    "region_blend",
    _blend,
    _blend_fake,
    cpp=_blend_cpp,
    triton=lambda logits, branches: kernels.region_blend.blend(logits, branches),
    autograd=(_blend_setup_context, _blend_autograd),
)
register(
    "region_blend_backward",
    _blend_backward,
    _blend_backward_fake,
    cpp=_blend_backward_cpp,
    triton=lambda d_masks, d_prediction, masks, *inputs: kernels.region_blend.blend_backward(
        torch.zeros_like(masks) if d_masks is None else d_masks, d_prediction, *inputs
    ),
)
