"""The factorized decoder's skip connections: branch k sees [u_k ; m_k * skip] (thesis eq. 2.6).

Shapes here and in :mod:`factorkit.ops.norm`, for B images, K regions, C channels and H x W pixels::

    u      [B, C_u, H, W]     shared by all branches, or [B*K, C_u, H, W] one per branch (branch index fastest)
    skip   [B, C_s, H, W]     the encoder's feature, the same for every branch
    masks  [B, K, H, W]       region masks at the resolution of u and skip; None for a plain U-Net
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from factorkit.ops.dispatch import (
    CPP_DTYPES,
    CPP_MIN_CHANNELS,
    EXTENSION,
    addresses,
    dense_format,
    empty_like,
    has_extension,
    kernels,
    reference_gradients,
    register,
    with_layout_of,
)


def concatenate_masked_skip(u: Tensor, skip: Tensor, masks: Tensor | None) -> Tensor:
    """Return [u_k ; m_k * skip] for every branch k: [B*K, C_u + C_s, H, W]; [u ; skip] without masks."""
    if masks is not None:
        skip = _mask_skip(skip, masks)
        u = _repeat_shared(u, skip, masks)
    return torch.cat([u, skip.to(u.dtype)], dim=1)


def _mask_skip(skip: Tensor, masks: Tensor) -> Tensor:
    return (skip[:, None] * masks[:, :, None].to(skip.dtype)).flatten(0, 1)


def _repeat_shared(u: Tensor, rows: Tensor, masks: Tensor) -> Tensor:
    return u if u.shape[0] == rows.shape[0] else u.repeat_interleave(masks.shape[1], dim=0)


def count_branches(u: Tensor, masks: Tensor | None) -> int:
    """Return B*K, or u's rows without masks.

    Raises:
        ValueError: u has neither B nor B*K rows.
    """
    if masks is None:
        return u.shape[0]
    batch, regions = masks.shape[:2]
    if u.shape[0] not in (batch, batch * regions):
        raise ValueError(
            f"u has {u.shape[0]} rows; masks of shape {tuple(masks.shape)} need {batch} (shared by the branches) "
            f"or {batch * regions}"
        )
    return batch * regions


def add_masked_skip(
    base: Tensor, skip: Tensor, masks: Tensor | None, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Return base_k + m_k * skip + bias + residual_k, [B*K, C, H, W]: the last step of the shortcut."""
    if masks is None:
        out = base + skip
    else:
        own = base[:, None] if _is_shared(base, masks) else base.unflatten(0, masks.shape[:2])
        out = torch.addcmul(own, skip[:, None].to(base.dtype), masks[:, :, None].to(base.dtype)).flatten(0, 1)
    if bias is not None:
        out = out + bias.to(out.dtype)[:, None, None]
    return out if residual is None else out + residual.to(out.dtype)


# --- implementations ---


def _add(base: Tensor, skip: Tensor, masks: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    return with_layout_of(add_masked_skip(base, skip, masks, bias, residual), base)


def _add_fake(base: Tensor, skip: Tensor, masks: Tensor | None, *rest: Tensor | None) -> Tensor:
    return with_layout_of(base.new_empty(count_branches(base, masks), *base.shape[1:]), base)


def _add_triton(base: Tensor, skip: Tensor, masks: Tensor | None, *rest: Tensor | None) -> Tensor:
    return with_layout_of(kernels.masked_add.masked_add(base, skip, masks, *rest), base)


def _add_backward(grad: Tensor, base: Tensor | None, skip: Tensor, masks: Tensor) -> list[Tensor]:
    """Return the gradients of base, which is None unless the branches share it, of skip and of masks."""
    d_base = [] if base is None else [shared_gradient(grad, base, masks)]
    return [*d_base, *masked_skip_gradients(grad, skip, masks)]


def _add_backward_fake(grad: Tensor, base: Tensor | None, skip: Tensor, masks: Tensor) -> list[Tensor]:
    d_masks = torch.empty_like(masks, memory_format=torch.contiguous_format)
    return [*([] if base is None else [empty_like(base)]), empty_like(skip), d_masks]


def _add_backward_triton(grad: Tensor, base: Tensor | None, skip: Tensor, masks: Tensor) -> list[Tensor]:
    d_base, d_skip, d_masks = kernels.masked_add.masked_add_backward(grad, base, skip, masks)
    found = [] if base is None else [with_layout_of(d_base, base)]
    return [*found, with_layout_of(d_skip, skip), d_masks.to(masks.dtype)]


def _is_shared(u: Tensor, masks: Tensor) -> bool:
    return u.shape[0] != masks.shape[0] * masks.shape[1]


def shared_gradient(grad: Tensor, u: Tensor, masks: Tensor | None) -> Tensor:
    """Return the gradient of u, summed over the branches where they share it."""
    if masks is not None and u.shape[0] != grad.shape[0]:
        grad = grad.unflatten(0, masks.shape[:2]).sum(1)
    return empty_like(u).copy_(grad)  # a copy, because an op may not return a view of its input


def masked_skip_gradients(grad: Tensor, skip: Tensor, masks: Tensor | None) -> list[Tensor]:
    """Return the gradients of m_k * skip: sum_k m_k g_k for the skip and, given masks, sum_c s_c g_kc for them."""
    if masks is None:
        return [empty_like(skip).copy_(grad)]
    grad = grad.unflatten(0, masks.shape[:2])
    d_skip = (grad * masks[:, :, None].to(grad.dtype)).sum(1)
    d_masks = (grad * skip[:, None].to(grad.dtype)).sum(2)
    return [empty_like(skip).copy_(d_skip), d_masks.to(masks.dtype).contiguous()]


# C++ (csrc/skip_cpu.cpp): channels_last, fp32 or bf16, at least 8 channels, masks in fp32


def _add_cpp(
    base: Tensor, skip: Tensor, masks: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor | None:
    if masks is None or not _cpp_takes(base, skip, masks):
        return None
    shape = (masks.shape[0] * masks.shape[1], *base.shape[1:])
    if base.shape[0] not in (masks.shape[0], shape[0]):
        return None
    out = torch.empty(shape, dtype=base.dtype, memory_format=torch.channels_last)
    if residual is not None and (residual.dtype != base.dtype or residual.shape != out.shape):
        return None
    if bias is not None and bias.shape != base.shape[1:2]:
        return None
    residual = None if residual is None else with_layout_of(residual, out)
    bias = None if bias is None else bias.float().contiguous()
    masks = masks.contiguous()
    problem = _cpp_problem(base, skip, masks, bias, residual)
    EXTENSION.masked_skip_add_forward(*problem, out.data_ptr(), torch.get_num_threads())
    return out


def _add_backward_cpp(grad: Tensor, base: Tensor | None, skip: Tensor, masks: Tensor) -> list[Tensor] | None:
    fits = grad.shape == (masks.shape[0] * masks.shape[1], *skip.shape[1:]) and grad.dtype == skip.dtype
    if not fits or not _cpp_takes(skip if base is None else base, skip, masks):
        return None
    gradients = _add_backward_fake(grad, base, skip, masks)
    grad, masks = with_layout_of(grad, skip), masks.contiguous()
    where = addresses(grad, *([] if base is not None else [None]), *gradients)
    EXTENSION.masked_skip_add_backward(*_cpp_problem(base, skip, masks), where, torch.get_num_threads())
    return gradients


def _cpp_takes(base: Tensor, skip: Tensor, masks: Tensor) -> bool:
    one_dtype = base.dtype in CPP_DTYPES and skip.dtype == base.dtype
    if not one_dtype or masks.dtype != torch.float32 or base.shape[1] < CPP_MIN_CHANNELS or base.numel() == 0:
        return False
    if base.shape[1:] != skip.shape[1:] or skip.shape[:1] + skip.shape[2:] != masks.shape[:1] + masks.shape[2:]:
        return False
    return dense_format(base) == dense_format(skip) == torch.channels_last and has_extension("cpu")


def _cpp_problem(base: Tensor | None, skip: Tensor, masks: Tensor, *rest: Tensor | None) -> tuple:
    """Return the arguments of csrc/skip.h that the tensors are."""
    where = addresses(base, skip, masks, *(rest or (None, None)))
    sizes = [*masks.shape[:2], skip.shape[1], skip.shape[2] * skip.shape[3]]
    return where, sizes, [base is not None and _is_shared(base, masks), skip.dtype == torch.bfloat16]


# gradient and registration


def _add_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    base, skip, masks, bias, residual = inputs
    # Of the tensors as large as the output, no gradient needs the values.
    shared = masks is not None and _is_shared(base, masks)
    ctx.save_for_backward(base if shared else None, skip, masks)
    ctx.dtypes = [None if x is None else x.dtype for x in (base, bias, residual)]


def _add_autograd(ctx: Any, grad: Tensor) -> tuple:
    base, skip, masks = ctx.saved_tensors
    d_base = grad.to(ctx.dtypes[0])
    d_bias = None if ctx.dtypes[1] is None else grad.sum((0, 2, 3), dtype=ctx.dtypes[1])
    rest = (d_bias, None if ctx.dtypes[2] is None else grad.to(ctx.dtypes[2]))
    if masks is None:
        return d_base, grad.to(skip.dtype), None, *rest
    if torch.is_grad_enabled():
        own, *others = reference_gradients(add_masked_skip, (d_base if base is None else base, skip, masks), (grad,))
        return d_base if base is None else own, *others, *rest
    *own, d_skip, d_masks = torch.ops.factorkit.masked_skip_add_backward(grad, base, skip, masks)
    # A branch's own base receives the upstream gradient unchanged; only a shared one needs a sum.
    return own[0] if own else d_base, d_skip, d_masks, *rest


register(
    "masked_skip_add", _add, _add_fake, cpp=_add_cpp, triton=_add_triton, autograd=(_add_setup_context, _add_autograd)
)
register(
    "masked_skip_add_backward", _add_backward, _add_backward_fake, cpp=_add_backward_cpp, triton=_add_backward_triton
)
