"""The norm of :mod:`factorkit.ops.norm` and its gradients in PyTorch, where no compiled kernel takes the tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from factorkit.ops.dispatch import full_precision

NORMS = ("group", "masked_group", "pixel")  # the order of NormKind in csrc/norm.h

GROUP_EPS = 1e-5  # torch's and guided-diffusion's
MASKED_GROUP_EPS = 1e-4  # a small region's variance averages few pixels: a larger floor bounds 1/std
MASK_FLOOR = 1e-3  # added to the mask before it weights moments: an empty region falls back to the plain average
PIXEL_EPS = 1e-3
Affine = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # weight, bias, scale, shift
EPS = {"group": GROUP_EPS, "masked_group": MASKED_GROUP_EPS, "pixel": PIXEL_EPS}


def shape_of_moments(rows: int, groups: int, norm: str) -> tuple[int, int, int]:
    """Return the shape of what a forward pass stores: mean, 1/std and, for the masked norm, the sum of the weights."""
    return {"group": 2, "masked_group": 3, "pixel": 0}[norm], rows, groups


def widen(x: Tensor, bias: Tensor | None) -> Tensor:
    """Return x [N, C, H, W] plus bias [C] as [N, C, H*W], at least fp32."""
    values = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32))
    return values if bias is None else values + bias.to(values.dtype)[:, None]


@full_precision
def compute_moments(values: Tensor, masks: Tensor | None, groups: int, norm: str) -> Tensor | None:
    """Return the statistics of values [N, C, P] in the shape of :func:`shape_of_moments`; None for the pixel norm."""
    if norm == "pixel":
        return None
    n, c, p = values.shape
    total, weights = [], None
    if masks is not None:
        weights = masks.to(values.dtype).reshape(n, p, 1) + MASK_FLOOR
        total = [weights.sum(1).expand(n, groups)]
        weights = weights / total[0][:, :1, None]

    def average(x: Tensor) -> Tensor:  # over each group
        by_channel = x.mean(2) if weights is None else (x @ weights)[:, :, 0]
        return by_channel.reshape(n, groups, c // groups).mean(2)

    mean = average(values)
    away = values - mean.repeat_interleave(c // groups, dim=1)[:, :, None]  # E[x^2] - E[x]^2 would cancel
    return torch.stack([mean, torch.rsqrt(average(away.square_()) + EPS[norm]), *total])


def normalise(values: Tensor, affine: Affine, moments: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the pre-activation of values [N, C, P] as a new tensor, the gain, 1/std and the mean.

    Gain, 1/std and mean are [N, C]; for the pixel norm, which has no stored moments, 1/std is [N, 1, P], the mean None.
    """
    weight, bias, scale, shift = affine
    n, c, _ = values.shape
    gain, offset = weight.to(values.dtype).expand(n, -1), bias.to(values.dtype).expand(n, -1)
    if scale is not None and shift is not None:
        gain, offset = gain * (1 + scale), torch.addcmul(shift, offset, 1 + scale)
    if moments is None:
        rstd = torch.rsqrt(values.square().mean(1, keepdim=True) + PIXEL_EPS)
        return (values * rstd).mul_(gain[:, :, None]).add_(offset[:, :, None]), gain, rstd, None
    mean, rstd = moments[:2].repeat_interleave(c // moments.shape[2], dim=2)
    slope = gain * rstd
    return torch.addcmul((offset - mean * slope)[:, :, None], values, slope[:, :, None]), gain, rstd, mean


@full_precision
def norm_gradients(
    grad: Tensor, values: Tensor, affine: Affine, masks: Tensor | None, moments: Tensor | None, activate: bool
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Return the gradients of values [N, C, P], of the masks that weighted the moments, and of the affine part."""
    pre, gain, rstd, mean = normalise(values, affine, moments)
    d_pre = grad.flatten(2).to(values.dtype)
    if activate:
        d_pre = torch.ops.aten.silu_backward(d_pre, pre)
    d_masks: Tensor | None = None
    if mean is None or moments is None:
        normal = values * rstd
        summed, moment = d_pre.sum(2), (d_pre * normal).sum(2)
        d_normal = d_pre * gain[:, :, None]
        d_x = rstd * (d_normal - normal * (d_normal * normal).mean(1, keepdim=True))
    else:
        n, c, p = values.shape
        groups = moments.shape[2]
        size = c // groups
        summed = d_pre.sum(2)
        moment = ((d_pre * values).sum(2) - mean * summed) * rstd  # sum over pixels of d_pre * normal
        d1, d2 = (
            v.reshape(n, groups, size).sum(2, keepdim=True).expand(n, groups, size).reshape(n, c)
            for v in (gain * summed, gain * moment)
        )
        # dL/d(first moment) and 2*dL/d(second moment), divided among the group's channels
        on_first = (rstd * mean * d2 - d1) * rstd / size
        on_second = -(rstd.square()) * d2 / size
        spread = torch.addcmul(on_first[:, :, None], values, on_second[:, :, None])
        if masks is None:
            spread = spread.mul_(1.0 / p)
        else:
            total = moments[2, :, :1, None]
            weights = (masks.to(values.dtype).reshape(n, p, 1) + MASK_FLOOR) / total
            spread = spread.mul_(weights.transpose(1, 2))
            d_weights = on_first[:, None] @ values + (0.5 * on_second)[:, None] @ values.square()
            d_weights = d_weights - d_weights @ weights
            d_masks = (d_weights / total).reshape(masks.shape).to(masks.dtype)
        d_x = spread.addcmul_(d_pre, (gain * rstd)[:, :, None])
    return d_x, d_masks, affine_gradients(summed, moment, affine)


def affine_gradients(summed: Tensor, moment: Tensor, affine: Affine) -> list[Tensor]:
    """Return the gradients of weight, bias and, given them, scale and shift.

    ``summed`` [N, C] is the sum over pixels of the pre-activation's gradient, ``moment`` that of its product with the
    normalised value.
    """
    weight, bias, scale, shift = affine
    factor = 1.0 if scale is None else 1 + scale
    gradients = [(moment * factor).sum(0).to(weight.dtype), (summed * factor).sum(0).to(bias.dtype)]
    if scale is None or shift is None:
        return gradients
    return [*gradients, (moment * weight + summed * bias).to(scale.dtype), summed.to(shift.dtype)]
