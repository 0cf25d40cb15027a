"""Normalisation, modulation and SiLU in one op, with its gradient written out: the most frequent op of both models.

With per-channel coefficients a = weight*(1+scale) and the moments mu, 1/std =: r of a group, every norm here is
``y = silu(a*(x-mu)*r + b)``; ``masked_group`` only changes the weights under the moments from 1/(HW) to m/sum(m).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from factorkit.ops import compiled, reference
from factorkit.ops.constants import GROUP_EPS, MASK_FLOOR, MASKED_GROUP_EPS, PIXEL_EPS
from factorkit.ops.dispatch import dense_format, full_precision, use_reference

NORMS = ("group", "masked_group", "pixel")


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    groups: int,
    norm: str = "group",
    masks: Tensor | None = None,
    activate: bool = True,
) -> Tensor:
    """SiLU(norm(x) * (1 + scale) + shift).

    Args:
        x: [N, C, H, W], any float dtype; the answer has its dtype and layout. Statistics are fp32 (fp64 for fp64).
        weight, bias: [C], the norm's affine part.
        scale, shift: [N, C] modulation by the time embedding, both or neither.
        groups: number of groups; divides C. Ignored by ``norm="pixel"``.
        norm: ``"group"`` | ``"masked_group"`` | ``"pixel"`` (see :mod:`factorkit.ops.reference`).
        masks: [B, K, H, W] with B*K = N, needed by ``"masked_group"`` and only there; gradients flow into it.
        activate: False leaves out the SiLU.

    Raises:
        ValueError: an unknown norm, groups that do not divide C, or a mask missing or of another shape.
    """
    _check(x.shape, weight, groups, norm, masks, x.shape[0])
    if norm != "masked_group":
        masks = None
    run = reference.group_norm_silu if use_reference() else torch.ops.factorkit.group_norm_silu
    return run(x, weight, bias, scale, shift, masks, groups, norm, activate)


def _check(shape, weight: Tensor, groups: int, norm: str, masks: Tensor | None, count: int) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown; choose one of {', '.join(NORMS)}")
    channels = weight.shape[0]
    if norm != "pixel" and channels % groups:
        raise ValueError(f"{groups} groups do not divide {channels} channels")
    if norm == "masked_group" and (masks is None or masks.shape[0] * masks.shape[1] != count):
        found = None if masks is None else tuple(masks.shape)
        raise ValueError(f"norm='masked_group' needs masks [B, K, H, W] with B*K = {count}; got {found}")
    if norm == "masked_group" and masks.shape[2:] != shape[2:]:
        raise ValueError(f"masks are {tuple(masks.shape[2:])} pixels but the features are {tuple(shape[2:])}")


@torch.library.custom_op("factorkit::group_norm_silu", mutates_args=())
def _group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    masks: Tensor | None,
    groups: int,
    norm: str,
    activate: bool,
) -> Tensor:
    values, pre, _ = _normalised(x, weight, bias, scale, shift, masks, groups, norm)
    out = F.silu(pre, inplace=True) if activate else pre
    return out.to(x.dtype).reshape(x.shape).contiguous(memory_format=dense_format(x))


@_group_norm_silu.register_fake
def _(x, weight, bias, scale, shift, masks, groups, norm, activate):
    return torch.empty_like(x, memory_format=dense_format(x))


@torch.library.custom_op("factorkit::group_norm_silu_backward", mutates_args=())
def _group_norm_silu_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    masks: Tensor | None,
    groups: int,
    norm: str,
    activate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    g, d_weight, d_bias, d_scale, d_shift, d_masks = norm_silu_vjp(
        grad, x, weight, bias, scale, shift, masks, groups, norm, activate
    )
    g = g.to(x.dtype).reshape(x.shape).contiguous(memory_format=dense_format(x))
    return tuple(x.new_empty(0) if d is None else d for d in (g, d_weight, d_bias, d_scale, d_shift, d_masks))  # type: ignore[return-value]


@_group_norm_silu_backward.register_fake
def _(grad, x, weight, bias, scale, shift, masks, groups, norm, activate):
    none = x.new_empty(0)
    like = lambda v: none.clone() if v is None else torch.empty_like(v, memory_format=torch.contiguous_format)  # noqa: E731
    g = torch.empty_like(x, memory_format=dense_format(x))
    return g, like(weight), like(bias), like(scale), like(shift), like(masks)


def _setup(ctx, inputs, output):
    x, weight, bias, scale, shift, masks, ctx.groups, ctx.norm, ctx.activate = inputs
    ctx.save_for_backward(x, weight, bias, scale, shift, masks)


def _backward(ctx, grad):
    x, weight, bias, scale, shift, masks = ctx.saved_tensors
    g, d_weight, d_bias, d_scale, d_shift, d_masks = torch.ops.factorkit.group_norm_silu_backward(
        grad, x, weight, bias, scale, shift, masks, ctx.groups, ctx.norm, ctx.activate
    )
    keep = lambda value, given: None if given is None else value  # noqa: E731
    return g, d_weight, d_bias, keep(d_scale, scale), keep(d_shift, shift), keep(d_masks, masks), None, None, None


@_group_norm_silu.register_kernel("cpu")
def _(x, weight, bias, scale, shift, masks, groups, norm, activate):
    given = (weight, bias, scale, shift)
    out = compiled.norm_forward(x, None, masks, *given, groups, norm, activate)
    return _group_norm_silu._init_fn(x, *given, masks, groups, norm, activate) if out is None else out


@_group_norm_silu_backward.register_kernel("cpu")
def _(grad, x, weight, bias, scale, shift, masks, groups, norm, activate):
    given = (weight, bias, scale, shift)
    found = compiled.norm_backward(grad, x, None, masks, *given, groups, norm, activate)
    if found is None:
        return _group_norm_silu_backward._init_fn(grad, x, *given, masks, groups, norm, activate)
    g, _, d_masks, d_weight, d_bias, d_scale, d_shift = found
    return tuple(x.new_empty(0) if d is None else d for d in (g, d_weight, d_bias, d_scale, d_shift, d_masks))


_group_norm_silu.register_autograd(_backward, setup_context=_setup)


# --- the arithmetic, on [N, C, P] with P = H*W ---


def _normalised(x, weight, bias, scale, shift, masks, groups, norm):
    """Values, the pre-activation a*x + b as a fresh tensor, and what the backward pass wants to know again."""
    values = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32))
    gain, offset = weight.to(values.dtype).expand(x.shape[0], -1), bias.to(values.dtype).expand(x.shape[0], -1)
    if scale is not None:
        gain, offset = gain * (1 + scale), torch.addcmul(shift, offset, 1 + scale)
    if norm == "pixel":
        rstd = torch.rsqrt(values.square().mean(1, keepdim=True) + PIXEL_EPS)
        pre = (values * rstd).mul_(gain[:, :, None]).add_(offset[:, :, None])
        return values, pre, (gain, None, rstd, None, None)
    weights, total, mean, rstd = _moments(values, masks, groups, norm)
    slope = gain * rstd
    pre = torch.addcmul((offset - mean * slope)[:, :, None], values, slope[:, :, None])
    return values, pre, (gain, mean, rstd, weights, total)


@full_precision
def _moments(values: Tensor, masks: Tensor | None, groups: int, norm: str):
    """Mean and 1/std of each channel's group, repeated to [N, C]; the pixel weights [N, P, 1] behind them."""
    n, c, p = values.shape
    if norm == "masked_group":
        weights = masks.to(values.dtype).reshape(n, p, 1) + MASK_FLOOR
        total = weights.sum(1, keepdim=True)
        weights = weights / total
        first, second = (values @ weights)[:, :, 0], (values.square() @ weights)[:, :, 0]
        eps = MASKED_GROUP_EPS
    else:
        weights = total = None
        first, second = values.mean(2), values.square().mean(2)
        eps = GROUP_EPS
    mean = first.reshape(n, groups, c // groups).mean(2, keepdim=True)
    variance = (second.reshape(n, groups, c // groups).mean(2, keepdim=True) - mean.square()).clamp_min_(0)
    spread = lambda v: v.expand(n, groups, c // groups).reshape(n, c)  # noqa: E731
    return weights, total, spread(mean), spread(torch.rsqrt(variance + eps))


@full_precision
def norm_silu_vjp(grad, x, weight, bias, scale, shift, masks, groups, norm, activate):
    """Gradients of :func:`group_norm_silu` for x ([N, C, P], at least fp32), weight, bias, scale, shift and masks."""
    values, pre, (gain, mean, rstd, weights, total) = _normalised(x, weight, bias, scale, shift, masks, groups, norm)
    d_pre = grad.flatten(2).to(values.dtype)
    if activate:
        d_pre = torch.ops.aten.silu_backward(d_pre, pre)
    if norm == "pixel":
        normal = values * rstd
        summed, moment = d_pre.sum(2), (d_pre * normal).sum(2)
        d_normal = d_pre * gain[:, :, None]
        d_x = rstd * (d_normal - normal * (d_normal * normal).mean(1, keepdim=True))
        d_masks = None
    else:
        n, c, p = values.shape
        summed = d_pre.sum(2)
        moment = ((d_pre * values).sum(2) - mean * summed) * rstd  # sum over pixels of d_pre * normal
        per_group = lambda v: (  # noqa: E731
            v.reshape(n, groups, c // groups).sum(2, keepdim=True).expand(n, groups, c // groups).reshape(n, c)
        )
        d1, d2 = per_group(gain * summed), per_group(gain * moment)
        # dL/d(first moment) and 2*dL/d(second moment), divided among the group's channels
        size = c // groups
        on_first = (rstd * mean * d2 - d1) * rstd / size
        on_second = -(rstd.square()) * d2 / size
        spread = torch.addcmul(on_first[:, :, None], values, on_second[:, :, None])
        spread = spread.mul_(1.0 / p) if weights is None else spread.mul_(weights.transpose(1, 2))
        d_x = spread.addcmul_(d_pre, (gain * rstd)[:, :, None])
        d_masks = None
        if weights is not None:
            d_weights = on_first[:, None] @ values + (0.5 * on_second)[:, None] @ values.square()
            d_weights = d_weights - d_weights @ weights
            d_masks = (d_weights / total).reshape(masks.shape).to(masks.dtype)
    return d_x, *compiled.affine_gradients(summed, moment, weight, bias, scale, shift), d_masks
