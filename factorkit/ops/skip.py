"""The factorized decoder's skip connections: what branch k sees is [u_k ; m_k * skip] (thesis eq. 2.6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from factorkit.ops import compiled, reference
from factorkit.ops.dispatch import dense_format, use_reference
from factorkit.ops.norm import _check, norm_silu_vjp


def _branches(u: Tensor, masks: Tensor | None) -> int:
    """Number of rows of the answer; raises where u is neither shared nor one per branch."""
    if masks is None:
        return u.shape[0]
    batch, regions = masks.shape[:2]
    if u.shape[0] not in (batch, batch * regions):
        wanted = f"{batch} (shared) or {batch * regions}"
        raise ValueError(f"u has {u.shape[0]} rows; masks {tuple(masks.shape)} ask for {wanted}")
    return batch * regions


def masked_skip_concat(u: Tensor, skip: Tensor, masks: Tensor | None) -> Tensor:
    """[u_k ; m_k * skip], [B*K, C_u + C_s, H, W].

    Args:
        u: [B*K, C_u, H, W], or [B, C_u, H, W] shared by the branches.
        skip: [B, C_s, H, W].
        masks: [B, K, H, W], or None for the plain concatenation [u ; skip].

    Raises:
        ValueError: u has neither B nor B*K rows.
    """
    _branches(u, masks)
    run = reference.masked_skip_concat if use_reference() else torch.ops.factorkit.masked_skip_concat
    return run(u, skip, masks)


def masked_skip_norm_silu(
    u: Tensor,
    skip: Tensor,
    masks: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    groups: int,
    norm: str = "group",
) -> Tensor:
    """SiLU(norm([u_k ; m_k * skip]) * (1 + scale_k) + shift_k) for all branches, [B*K, C_u + C_s, H, W].

    Args: as :func:`masked_skip_concat` and :func:`factorkit.ops.group_norm_silu`; ``scale`` and ``shift`` are [B*K, C].
    Groups may straddle the boundary between u and the skip.

    Raises:
        ValueError: shapes that do not fit, an unknown norm, groups that do not divide C_u + C_s.
    """
    count = _branches(u, masks)
    _check(u.shape, weight, groups, norm, masks, count)
    run = reference.masked_skip_norm_silu if use_reference() else torch.ops.factorkit.masked_skip_norm_silu
    return run(u, skip, masks, weight, bias, scale, shift, groups, norm)


def masked_skip_projection(u: Tensor, skip: Tensor, masks: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """The 1x1 shortcut W [u_k ; m_k * skip] + b = (W_u u_k + b) + m_k * (W_s skip): the second product once for all K.

    Args: as :func:`masked_skip_concat`; ``weight`` [C_out, C_u + C_s, 1, 1], ``bias`` [C_out].
    Returns [B*K, C_out, H, W].
    """
    _branches(u, masks)
    split = u.shape[1]
    base = F.conv2d(u, weight[:, :split], bias)
    extra = F.conv2d(skip, weight[:, split:])
    run = reference.masked_skip_add if use_reference() else torch.ops.factorkit.masked_skip_add
    return run(base, extra, masks)


# --- concat ---


@torch.library.custom_op("factorkit::masked_skip_concat", mutates_args=())
def _concat(u: Tensor, skip: Tensor, masks: Tensor | None) -> Tensor:
    return reference.masked_skip_concat(u, skip, masks).contiguous(memory_format=dense_format(u))


@_concat.register_fake
def _(u, skip, masks):
    shape = (_branches(u, masks), u.shape[1] + skip.shape[1], *u.shape[2:])
    return torch.empty(shape, dtype=u.dtype, device=u.device).contiguous(memory_format=dense_format(u))


@torch.library.custom_op("factorkit::masked_skip_concat_backward", mutates_args=())
def _concat_backward(grad: Tensor, u: Tensor, skip: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    d_u, d_skip, d_masks = concat_vjp(grad, u, skip, masks)
    return d_u, d_skip, u.new_empty(0) if d_masks is None else d_masks


@_concat_backward.register_fake
def _(grad, u, skip, masks):
    d_masks = u.new_empty(0) if masks is None else torch.empty_like(masks, memory_format=torch.contiguous_format)
    return _empty(u), _empty(skip), d_masks


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=dense_format(x))


def concat_vjp(grad: Tensor, u: Tensor, skip: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the concatenation for u, skip and masks."""
    split = u.shape[1]
    return _shared_vjp(grad[:, :split], u, masks), *_masked_vjp(grad[:, split:], skip, masks)


def _shared_vjp(grad: Tensor, u: Tensor, masks: Tensor | None) -> Tensor:
    """Gradient for u: summed over the branches where they share it."""
    if u.shape[0] != grad.shape[0]:
        grad = grad.unflatten(0, masks.shape[:2]).sum(1)
    return _settle(grad, u)


def _masked_vjp(grad: Tensor, skip: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of m_k * skip: sum_k m_k g_k for the skip, sum_c s_c g_kc for the masks."""
    if masks is None:
        return _settle(grad, skip), None
    grad = grad.unflatten(0, masks.shape[:2])
    d_skip = (grad * masks[:, :, None].to(grad.dtype)).sum(1)
    d_masks = (grad * skip[:, None].to(grad.dtype)).sum(2)
    return _settle(d_skip, skip), d_masks.to(masks.dtype).contiguous()


def _settle(grad: Tensor, like: Tensor) -> Tensor:
    """A tensor of its own with the dtype and layout of ``like``: an op may not answer with a view of its input."""
    return torch.empty_like(like, memory_format=dense_format(like)).copy_(grad)


def _concat_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _concat_autograd(ctx, grad):
    u, skip, masks = ctx.saved_tensors
    d_u, d_skip, d_masks = torch.ops.factorkit.masked_skip_concat_backward(grad, u, skip, masks)
    return d_u, d_skip, None if masks is None else d_masks


_concat.register_autograd(_concat_autograd, setup_context=_concat_setup)


# --- norm of the concatenation ---


@torch.library.custom_op("factorkit::masked_skip_norm_silu", mutates_args=())
def _norm(
    u: Tensor,
    skip: Tensor,
    masks: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    norm: str,
) -> Tensor:
    z = reference.masked_skip_concat(u, skip, masks)
    weights = _statistics(masks, norm)
    out = torch.ops.factorkit.group_norm_silu(z, weight, bias, scale, shift, weights, groups, norm, True)
    return out.contiguous(memory_format=dense_format(u))


def _statistics(masks: Tensor | None, norm: str) -> Tensor | None:
    return masks if norm == "masked_group" else None


@_norm.register_fake
def _(u, skip, masks, weight, bias, scale, shift, groups, norm):
    shape = (_branches(u, masks), u.shape[1] + skip.shape[1], *u.shape[2:])
    return torch.empty(shape, dtype=u.dtype, device=u.device).contiguous(memory_format=dense_format(u))


@torch.library.custom_op("factorkit::masked_skip_norm_silu_backward", mutates_args=())
def _norm_backward(
    grad: Tensor,
    u: Tensor,
    skip: Tensor,
    masks: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    # The concatenation is formed again rather than kept: it is K times the skip, the largest tensor of the decoder.
    z = reference.masked_skip_concat(u, skip, masks)
    d_z, d_weight, d_bias, d_scale, d_shift, d_moments = norm_silu_vjp(
        grad, z, weight, bias, scale, shift, _statistics(masks, norm), groups, norm, True
    )
    d_u, d_skip, d_masks = concat_vjp(d_z.reshape(z.shape), u, skip, masks)
    if d_masks is not None and d_moments is not None:
        d_masks = d_masks + d_moments
    found = (d_u, d_skip, d_masks, d_weight, d_bias, d_scale, d_shift)
    return tuple(u.new_empty(0) if d is None else d for d in found)  # type: ignore[return-value]


@_norm_backward.register_fake
def _(grad, u, skip, masks, weight, bias, scale, shift, groups, norm):
    none = u.new_empty(0)
    like = lambda v: none.clone() if v is None else torch.empty_like(v, memory_format=torch.contiguous_format)  # noqa: E731
    return _empty(u), _empty(skip), like(masks), like(weight), like(bias), like(scale), like(shift)


def _norm_setup(ctx, inputs, output):
    *tensors, ctx.groups, ctx.norm = inputs
    ctx.save_for_backward(*tensors)


def _norm_autograd(ctx, grad):
    saved = ctx.saved_tensors
    grads = torch.ops.factorkit.masked_skip_norm_silu_backward(grad, *saved, ctx.groups, ctx.norm)
    return *(None if x is None else g for g, x in zip(grads, saved, strict=True)), None, None


@_norm.register_kernel("cpu")
def _(u, skip, masks, weight, bias, scale, shift, groups, norm):
    given = (u, skip, masks, weight, bias, scale, shift, groups, norm)
    out = compiled.norm_forward(*given, True)
    return _norm._init_fn(*given) if out is None else out


@_norm_backward.register_kernel("cpu")
def _(grad, u, skip, masks, weight, bias, scale, shift, groups, norm):
    given = (grad, u, skip, masks, weight, bias, scale, shift, groups, norm)
    found = compiled.norm_backward(*given, True)
    if found is None:
        return _norm_backward._init_fn(*given)
    return tuple(u.new_empty(0) if d is None else d for d in found)


_norm.register_autograd(_norm_autograd, setup_context=_norm_setup)


# --- shortcut ---


@torch.library.custom_op("factorkit::masked_skip_add", mutates_args=())
def _add(base: Tensor, skip: Tensor, masks: Tensor | None) -> Tensor:
    return reference.masked_skip_add(base, skip, masks).contiguous(memory_format=dense_format(base))


@_add.register_fake
def _(base, skip, masks):
    shape = (_branches(base, masks), *base.shape[1:])
    return torch.empty(shape, dtype=base.dtype, device=base.device).contiguous(memory_format=dense_format(base))


@torch.library.custom_op("factorkit::masked_skip_add_backward", mutates_args=())
def _add_backward(grad: Tensor, base: Tensor, skip: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d_base = _shared_vjp(grad, base, masks) if _shares(base, masks) else base.new_empty(0)
    return d_base, *_masked_vjp(grad, skip, masks)


@_add_backward.register_fake
def _(grad, base, skip, masks):
    d_base = _empty(base) if _shares(base, masks) else base.new_empty(0)
    return d_base, _empty(skip), torch.empty_like(masks, memory_format=torch.contiguous_format)


def _shares(u: Tensor, masks: Tensor) -> bool:
    """Whether the branches share u."""
    return u.shape[0] != masks.shape[0] * masks.shape[1]


def _add_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _add_autograd(ctx, grad):
    base, skip, masks = ctx.saved_tensors
    if masks is None:
        return grad.to(base.dtype), grad.to(skip.dtype), None
    d_base, d_skip, d_masks = torch.ops.factorkit.masked_skip_add_backward(grad, base, skip, masks)
    # A branch's own base receives the upstream gradient as it is; only a shared one costs a sum.
    return d_base if _shares(base, masks) else grad.to(base.dtype), d_skip, d_masks


_add.register_autograd(_add_autograd, setup_context=_add_setup)
