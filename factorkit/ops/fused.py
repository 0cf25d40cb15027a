"""The Triton kernels (kernels/) behind the ops on a GPU.

Each function answers None where the kernels do not apply (fp64, an empty tensor, no Triton), and the op goes on with
its PyTorch implementation on the same device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from factorkit import kernels
from factorkit.ops import norm, region, skip
from factorkit.ops.compiled import KINDS
from factorkit.ops.constants import MASK_FLOOR, POOL_FLOOR
from factorkit.ops.dispatch import dense_format

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@lru_cache
def available() -> bool:
    """Whether the kernels can be imported; one warning says what it costs if not, and how to get them."""
    cause = kernels.unavailable()
    if cause is not None:
        warnings.warn(
            f"{cause}: on the GPU the ops run as plain PyTorch, with the same results, slower and with more memory. "
            "Triton comes with a CUDA build of torch on Linux; by itself: pip install 'triton>=3.6'. "
            "`factorkit doctor` tells more",
            stacklevel=2,
        )
    return cause is None


def _apply(*tensors: Tensor | None) -> bool:
    given = [x for x in tensors if x is not None]
    return all(x.dtype in DTYPES and x.numel() > 0 for x in given) and available()


def _like(x: Tensor, given: Tensor | None) -> Tensor:
    """An answer in the dtype and layout of what was given; empty for what was not."""
    return x.contiguous(memory_format=dense_format(given)) if x.dim() == 4 else x


def _norm_forward(u, s, masks, weight, bias, scale, shift, groups, kind, activate) -> Tensor | None:
    if not _apply(u, s, masks, weight, bias, scale, shift):
        return None
    eps = KINDS[kind][1]
    if kind == "pixel":
        out = kernels.pixel_norm.pixel_forward(u, s, masks, weight, bias, scale, shift, activate, eps)
    else:
        weighted = kind == "masked_group"
        given = (u, s, masks, weight, bias, scale, shift, groups, weighted, activate)
        out = kernels.norm.norm_forward(*given, eps, MASK_FLOOR)
    return _like(out, u)


def _norm_backward(grad, u, s, masks, weight, bias, scale, shift, groups, kind, activate) -> list[Tensor] | None:
    """Gradients for u, s, masks, weight, bias, scale and shift; empty for what was not given."""
    if not _apply(grad, u, s, masks, weight, bias, scale, shift):
        return None
    eps = KINDS[kind][1]
    if kind == "pixel":
        found = kernels.pixel_norm.pixel_backward(grad, u, s, masks, weight, bias, scale, shift, activate, eps)
    else:
        weighted = kind == "masked_group"
        given = (grad, u, s, masks, weight, bias, scale, shift, groups, weighted, activate)
        found = kernels.norm_backward.norm_backward(*given, eps, MASK_FLOOR)
    d_u, d_s, d_masks, *affine = found
    d_masks = None if d_masks is None else d_masks.to(masks.dtype)
    found = (_like(d_u, u), None if d_s is None else _like(d_s, s), d_masks, *affine)
    return [u.new_empty(0) if d is None else d for d in found]


def group_norm_silu(x, weight, bias, scale, shift, masks, groups, kind, activate):
    return _norm_forward(x, None, masks, weight, bias, scale, shift, groups, kind, activate)


def group_norm_silu_backward(grad, x, weight, bias, scale, shift, masks, groups, kind, activate):
    found = _norm_backward(grad, x, None, masks, weight, bias, scale, shift, groups, kind, activate)
    if found is None:
        return None
    d_x, _, d_masks, *affine = found
    return d_x, *affine, d_masks


def masked_skip_norm_silu(u, s, masks, weight, bias, scale, shift, groups, kind):
    return _norm_forward(u, s, masks, weight, bias, scale, shift, groups, kind, True)


def masked_skip_norm_silu_backward(grad, u, s, masks, weight, bias, scale, shift, groups, kind):
    found = _norm_backward(grad, u, s, masks, weight, bias, scale, shift, groups, kind, True)
    return None if found is None else tuple(found)


def masked_skip_concat(u, s, masks):
    if not _apply(u, s, masks):
        return None
    return _like(kernels.norm.concat(u, s, masks), u)


def masked_skip_concat_backward(grad, u, s, masks):
    if not _apply(grad, u, s, masks):
        return None
    d_u, d_s, d_masks = kernels.norm_backward.concat_backward(grad, u, s, masks)
    return _like(d_u, u), _like(d_s, s), u.new_empty(0) if masks is None else d_masks.to(masks.dtype)


def masked_skip_add(base, s, masks):
    if not _apply(base, s, masks):
        return None
    return _like(kernels.masked_add.masked_add(base, s, masks), base)


def masked_skip_add_backward(grad, base, s, masks):
    if not _apply(grad, base, s, masks):
        return None
    d_base, d_s, d_masks = kernels.masked_add.masked_add_backward(grad, base, s, masks)
    return base.new_empty(0) if d_base is None else _like(d_base, base), _like(d_s, s), d_masks.to(masks.dtype)


def mask_pyramid(masks, levels):
    if not _apply(masks):
        return None
    return kernels.mask_pyramid.pyramid(masks, levels)


def mask_pyramid_backward(grads):
    if not _apply(*grads):
        return None
    return kernels.mask_pyramid.pyramid_backward(grads)


def region_pool(features, masks):
    if not _apply(features, masks):
        return None
    return kernels.region_pool.pool(features, masks, POOL_FLOOR)


def region_pool_backward(grad, features, masks, tokens):
    if not _apply(grad, features, masks):
        return None
    d_features, d_masks = kernels.region_pool.pool_backward(grad, features, masks, tokens, POOL_FLOOR)
    return _like(d_features, features), d_masks.to(masks.dtype)


def region_blend(logits, branches):
    if not _apply(logits, branches):
        return None
    return kernels.region_blend.blend(logits, branches)


def region_blend_backward(d_masks, d_prediction, logits, branches):
    if not _apply(logits, branches, d_masks, d_prediction):
        return None
    return kernels.region_blend.blend_backward(logits, branches, d_masks=d_masks, d_prediction=d_prediction)


def region_blend_mse(logits, branches, target):
    if not _apply(logits, branches, target):
        return None
    return kernels.region_blend.blend_mse(logits, branches, target).to(logits.dtype)


def region_blend_mse_backward(grad, logits, branches, target):
    if not _apply(grad, logits, branches, target):
        return None
    return kernels.region_blend.blend_backward(logits, branches, target=target, d_errors=grad)


#: which op each function above runs
OPS = {
    norm._group_norm_silu: group_norm_silu,
    norm._group_norm_silu_backward: group_norm_silu_backward,
    skip._norm: masked_skip_norm_silu,
    skip._norm_backward: masked_skip_norm_silu_backward,
    skip._concat: masked_skip_concat,
    skip._concat_backward: masked_skip_concat_backward,
    skip._add: masked_skip_add,
    skip._add_backward: masked_skip_add_backward,
    region._pyramid: mask_pyramid,
    region._pyramid_backward: mask_pyramid_backward,
    region._pool: region_pool,
    region._pool_backward: region_pool_backward,
    region._blend: region_blend,
    region._blend_backward: region_blend_backward,
    region._mse: region_blend_mse,
    region._mse_backward: region_blend_mse_backward,
}


def register(device: str) -> None:
    """Run the kernels behind the ops on a type of device. Tests do so for the CPU, where Triton interprets them."""

    def register_one(op: torch.library.CustomOpDef, fast: Callable) -> None:
        @op.register_kernel(device)
        def _(*args):
            found = fast(*args)
            return op._init_fn(*args) if found is None else found

    for op, fast in OPS.items():
        register_one(op, fast)


register("cuda")
