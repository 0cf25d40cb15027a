"""Normalisation, modulation and SiLU in one op: the most frequent op of both models.

    z = [u_k ; m_k * skip] for every branch k (thesis eq. 2.6), or z = u without a skip
    y = SiLU(a * (z - mean) / std + b),  a = weight * (1 + scale),  b = bias * (1 + scale) + shift

``"group"`` is GroupNorm (Wu & He 2018). ``"masked_group"`` weights its moments by m_k / sum(m_k) instead of 1 / (H*W),
independent of the region's area. ``"pixel"`` divides by the root mean square over channels at each pixel. An input bias
is added to u first, without a pass of its own on CUDA; it comes without a skip.
Shapes are those of :mod:`factorkit.ops.skip`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from factorkit.ops import norm_cpp
from factorkit.ops.dispatch import (
    OPS,
    empty_like,
    kernels,
    reference_gradients,
    register,
    select,
    use_reference,
    with_layout_of,
)
from factorkit.ops.norm_pytorch import (
    EPS,
    MASK_FLOOR,
    NORMS,
    PIXEL_EPS,
    Affine,
    compute_moments,
    norm_gradients,
    normalise,
    shape_of_moments,
    widen,
)
from factorkit.ops.skip import concatenate_masked_skip, count_branches, masked_skip_gradients, shared_gradient


def norm_silu(
    u: Tensor,
    skip: Tensor | None,
    masks: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    input_bias: Tensor | None,
    groups: int,
    norm: str,
    activate: bool = True,
) -> Tensor:
    """Compute the equations of this module in plain differentiable PyTorch: the reference of the op."""
    x = u if skip is None else concatenate_masked_skip(u, skip, masks)
    n, c = x.shape[:2]
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    if input_bias is not None:
        values = values + input_bias.to(values.dtype)[:, None, None]
    if norm == "pixel":
        normal = values * torch.rsqrt(values.square().mean(1, keepdim=True) + PIXEL_EPS)
    else:
        grouped = values.reshape(n, groups, c // groups, -1)
        weights = torch.ones_like(grouped[:, :1, :1])
        if norm == "masked_group" and masks is not None:
            weights = masks.to(values.dtype).reshape(n, 1, 1, -1) + MASK_FLOOR
        weights = weights / (weights.sum(-1, keepdim=True) * (c // groups))
        mean = (grouped * weights).sum((2, 3), keepdim=True)
        variance = ((grouped - mean).square() * weights).sum((2, 3), keepdim=True)
        normal = ((grouped - mean) * torch.rsqrt(variance + EPS[norm])).reshape(values.shape)
    out = normal * weight.to(values.dtype)[:, None, None] + bias.to(values.dtype)[:, None, None]
    if scale is not None and shift is not None:
        out = out * (1 + scale.to(values.dtype)[:, :, None, None]) + shift.to(values.dtype)[:, :, None, None]
    return (F.silu(out) if activate else out).to(x.dtype)


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
    input_bias: Tensor | None = None,
) -> Tensor:
    """Compute SiLU(norm(x + input_bias) * (1 + scale) + shift).

    Args:
        x: [N, C, H, W], any float dtype. Statistics are fp32 (fp64 for fp64).
        weight, bias: [C].
        scale, shift: [N, C], the modulation by the time embedding; both or None.
        groups: number of groups; divides C. Ignored by ``norm="pixel"``.
        norm: ``"group"``, ``"masked_group"`` or ``"pixel"`` (see :mod:`factorkit.ops.norm`).
        masks: [B, K, H, W] with B*K = N, used by ``"masked_group"`` only; gradients flow into it.
        activate: False omits the SiLU.
        input_bias: [C], the bias of the convolution whose output without it is x; None adds nothing.

    Returns:
        [N, C, H, W] in the dtype and layout of x.

    Raises:
        ValueError: shapes that do not fit, an unknown norm, groups that do not divide C, or masks missing.
    """
    masks = _check(x, None, masks, (weight, bias, scale, shift), groups, norm)
    return _run(x, None, masks, weight, bias, scale, shift, input_bias, groups, norm, activate)


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
    """Compute SiLU(norm([u_k ; m_k * skip]) * (1 + scale_k) + shift_k) for all branches, [B*K, C_u + C_s, H, W].

    ``u``, ``skip`` and ``masks`` are those of :func:`factorkit.ops.masked_skip_projection`; the others those of
    :func:`factorkit.ops.group_norm_silu` with ``scale`` and ``shift`` [B*K, C]. A group may hold channels of both u
    and the skip.

    Raises:
        ValueError: shapes that do not fit, an unknown norm, groups that do not divide C_u + C_s.
    """
    masks = _check(u, skip, masks, (weight, bias, scale, shift), groups, norm)
    return _run(u, skip, masks, weight, bias, scale, shift, None, groups, norm, True)


def norm_silu_with_inputs(
    u: Tensor,
    skip: Tensor | None,
    masks: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    groups: int,
    norm: str = "group",
    activate: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute as the functions above do, without a skip or with one, and return u and the skip again.

    What else reads u and the skip, a shortcut, should read those: its gradients are then added in the pass that writes
    the norm's own, and not in one of their own. Arguments and errors are those of the functions above.

    Returns:
        the output, u and the skip.
    """
    masks = _check(u, skip, masks, (weight, bias, scale, shift), groups, norm)
    arguments = (u, skip, masks, weight, bias, scale, shift, None, groups, norm, activate)
    with_inputs = OPS["norm_silu"].with_inputs
    eager = not (use_reference() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
    if with_inputs is None or not (eager and torch.is_grad_enabled() and u.requires_grad):
        return _run(*arguments), u, skip
    out, _, u, skip = with_inputs(*arguments)
    return out, u, skip


def _run(u: Tensor, *rest: Any) -> Tensor:
    result: Tensor | tuple[Tensor, Tensor] = select("norm_silu", norm_silu, u)(u, *rest)
    return result if isinstance(result, Tensor) else result[0]


def _check(
    u: Tensor, skip: Tensor | None, masks: Tensor | None, affine: Affine, groups: int, norm: str
) -> Tensor | None:
    """Raise ValueError for shapes that do not fit; return the masks if they are used."""
    rows, channels, shape = u.shape[0], u.shape[1], u.shape[2:]
    if skip is not None:
        rows, channels = count_branches(u, masks), channels + skip.shape[1]
        if skip.shape[0] != (rows if masks is None else masks.shape[0]) or skip.shape[2:] != shape:
            raise ValueError(
                f"the skip is {tuple(skip.shape)}; it must have u's {tuple(shape)} pixels, one for each image"
            )
        if masks is not None and masks.shape[2:] != shape:
            raise ValueError(f"masks are {tuple(masks.shape[2:])} pixels but the features are {tuple(shape)}")
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown; choose one of {', '.join(NORMS)}")
    weight, bias, scale, shift = (None if v is None else tuple(v.shape) for v in affine)
    if weight != (channels,) or bias != (channels,):
        raise ValueError(f"weight {weight} and bias {bias} must have the features' {channels} channels")
    if (scale, shift) != (None, None) and not scale == shift == (rows, channels):
        raise ValueError(f"scale {scale} and shift {shift} must be {(rows, channels)}")
    if norm != "pixel" and channels % groups:
        raise ValueError(f"{groups} groups do not divide {channels} channels")
    if norm != "masked_group":
        return None if skip is None else masks
    if masks is None or masks.shape[0] * masks.shape[1] != rows:
        found = None if masks is None else tuple(masks.shape)
        raise ValueError(f"norm='masked_group' needs masks [B, K, H, W] with B*K = {rows}; got {found}")
    if masks.shape[2:] != shape:
        raise ValueError(f"masks are {tuple(masks.shape[2:])} pixels but the features are {tuple(shape)}")
    return masks


# --- PyTorch implementation ---

ARGUMENTS = (
    "Tensor u, Tensor? skip, Tensor? masks, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, "
    "Tensor? input_bias, int groups, str norm, bool activate"
)


def _forward(u: Tensor, skip: Tensor | None, masks: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """Return the output and the moments, in the shape of :func:`factorkit.ops.norm_pytorch.shape_of_moments`."""
    *affine, input_bias, groups, norm, activate = rest
    z = u if skip is None else concatenate_masked_skip(u, skip, masks)
    values = widen(z, input_bias)
    moments = compute_moments(values, masks if norm == "masked_group" else None, groups, norm)
    pre = normalise(values, tuple(affine), moments)[0]
    out = F.silu(pre, inplace=True) if activate else pre
    if moments is None:
        moments = values.new_empty(shape_of_moments(len(out), groups, norm))
    return with_layout_of(out.to(u.dtype).reshape(z.shape), u), moments


def _fake(u: Tensor, skip: Tensor | None, masks: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    rows, groups, norm = u.shape[0] if skip is None else count_branches(u, masks), *rest[-3:-1]
    dtype = torch.promote_types(u.dtype, torch.float32)
    moments = u.new_empty(shape_of_moments(rows, groups, norm), dtype=dtype)
    if skip is None:
        return empty_like(u), moments
    return with_layout_of(u.new_empty(rows, u.shape[1] + skip.shape[1], *u.shape[2:]), u), moments


def _backward(
    grad: Tensor,
    moments: Tensor | None,
    others: tuple[Tensor | None, Tensor | None],
    u: Tensor,
    skip: Tensor | None,
    masks: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    """Return the gradients of those tensors of ``ARGUMENTS`` that are not None, in their order.

    ``others`` are gradients of u and of the skip from elsewhere, which are added.
    """
    # The concatenation is computed again rather than stored: it is K times the skip, the decoder's largest tensor.
    *affine, input_bias, _, norm, activate = rest
    z = u if skip is None else concatenate_masked_skip(u, skip, masks)
    weights = masks if norm == "masked_group" else None
    d_z, d_weights, d_affine = norm_gradients(grad, widen(z, input_bias), tuple(affine), weights, moments, activate)
    if input_bias is not None:
        d_affine.append(d_z.sum((0, 2)).to(input_bias.dtype))
    d_z = d_z.reshape(z.shape)
    if skip is None:
        features = [with_layout_of(d_z.to(u.dtype), u), *([] if d_weights is None else [d_weights])]
    else:
        split = u.shape[1]
        features = [shared_gradient(d_z[:, :split], u, masks), *masked_skip_gradients(d_z[:, split:], skip, masks)]
        if d_weights is not None:
            features[2] = features[2] + d_weights
    for i, other in enumerate(others):
        if other is not None:
            features[i] = features[i].add_(other)
    return [*features, *d_affine]


def _backward_fake(
    grad: Tensor, moments: Tensor | None, others: Any, u: Tensor, skip: Tensor | None, *rest: Any
) -> list[Tensor]:
    dense = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in rest if isinstance(x, Tensor)]
    return [empty_like(u), *([] if skip is None else [empty_like(skip)]), *dense]


# --- Triton (kernels/group_norm.py, kernels/pixel_norm.py) ---


def _forward_triton(u: Tensor, skip: Tensor | None, masks: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    *affine, input_bias, groups, norm, activate = rest
    if norm == "pixel":
        out = kernels.pixel_norm.pixel_forward(u, skip, masks, affine, input_bias, activate, PIXEL_EPS)
        return with_layout_of(out, u), out.new_empty(shape_of_moments(len(out), groups, norm), dtype=torch.float32)
    settings = (groups, norm == "masked_group", activate, EPS[norm], MASK_FLOOR)
    out, moments = kernels.group_norm.norm_forward(u, skip, masks, affine, input_bias, *settings)
    return with_layout_of(out, u), moments


def _backward_triton(
    grad: Tensor,
    moments: Tensor | None,
    others: tuple[Tensor | None, Tensor | None],
    u: Tensor,
    skip: Tensor | None,
    masks: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    *affine, input_bias, _, norm, activate = rest
    if norm == "pixel":
        arguments = (grad, u, skip, masks, affine, input_bias, activate, PIXEL_EPS, others)
        gradients = kernels.pixel_norm.pixel_backward(*arguments)
    else:
        settings = (input_bias, activate, EPS[norm], MASK_FLOOR, others)
        gradients = kernels.group_norm.norm_backward(grad, moments, u, skip, masks, affine, *settings)
    d_u, d_skip, d_masks, *d_affine = gradients
    d_skip = None if skip is None else with_layout_of(d_skip, skip)
    d_masks = None if masks is None or d_masks is None else d_masks.to(masks.dtype)
    return [x for x in (with_layout_of(d_u, u), d_skip, d_masks, *d_affine) if x is not None]


# --- gradient and registration ---


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.groups, ctx.norm, ctx.activate = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(
    ctx: Any, grad: Tensor | None, _: Tensor | None, other_u: Tensor | None = None, other_skip: Tensor | None = None
) -> tuple:
    moments, u, skip, *saved = ctx.saved_tensors
    settings = (ctx.groups, ctx.norm, ctx.activate)
    if grad is None:
        return other_u, other_skip, *(None for _ in (*saved, *settings))
    if torch.is_grad_enabled():
        d_u, d_skip, *rest = reference_gradients(norm_silu, (u, skip, *saved, *settings), (grad,))
        return _sum(d_u, other_u), _sum(d_skip, other_skip), *rest
    moments = None if ctx.norm == "pixel" else moments
    others = (other_u, other_skip)
    gradients = iter(torch.ops.factorkit.norm_silu_backward(grad, moments, others, u, skip, *saved, *settings))
    return *(None if x is None else next(gradients) for x in (u, skip, *saved)), None, None, None


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return y if x is None else x if y is None else x + y


register(
    "norm_silu",
    _forward,
    _fake,
    cpp=norm_cpp.forward,
    triton=_forward_triton,
    autograd=(_setup_context, _autograd),
    schema=f"({ARGUMENTS}) -> (Tensor, Tensor)",
    returned_inputs=2,
)
register(
    "norm_silu_backward",
    _backward,
    _backward_fake,
    cpp=norm_cpp.backward,
    triton=_backward_triton,
    schema=f"(Tensor grad, Tensor? moments, Tensor?[] others, {ARGUMENTS}) -> Tensor[]",
)
