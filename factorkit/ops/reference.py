"""What every op means, in plain differentiable PyTorch: the equation, for reading and for checking kernels against.

Shapes used throughout the package::

    B images, K regions, C channels, H x W pixels, G groups
    u      [B, C_u, H, W]     shared by all branches, or [B*K, C_u, H, W] one per branch (branch index fastest)
    skip   [B, C_s, H, W]     the encoder's feature, the same for every branch
    masks  [B, K, H, W]       region masks at the resolution of u and skip

Nothing here is called by the models unless FACTORKIT_REFERENCE=1 is set.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from factorkit.ops.constants import GROUP_EPS, MASK_FLOOR, MASKED_GROUP_EPS, PIXEL_EPS, POOL_FLOOR
from factorkit.ops.dispatch import full_precision


def masked_skip_concat(u: Tensor, skip: Tensor, masks: Tensor | None) -> Tensor:
    """[u_k ; m_k * skip] for every branch k: [B*K, C_u + C_s, H, W] (thesis eq. 2.6). ``masks=None``: [u ; skip]."""
    if masks is None:
        return torch.cat([u, skip.to(u.dtype)], dim=1)
    regions = masks.shape[1]
    masked = (skip[:, None] * masks[:, :, None].to(skip.dtype)).flatten(0, 1)
    if u.shape[0] != masked.shape[0]:
        u = u.repeat_interleave(regions, dim=0)
    return torch.cat([u, masked.to(u.dtype)], dim=1)


def masked_skip_add(base: Tensor, skip: Tensor, masks: Tensor | None) -> Tensor:
    """base_k + m_k * skip: the epilogue of the 1x1 shortcut, which commutes with the mask. [B*K, C, H, W]."""
    if masks is None:
        return base + skip
    regions = masks.shape[1]
    masked = (skip[:, None] * masks[:, :, None].to(skip.dtype)).flatten(0, 1)
    if base.shape[0] != masked.shape[0]:
        base = base.repeat_interleave(regions, dim=0)
    return base + masked


def group_norm_silu(
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
    """SiLU(norm(x) * (1 + scale) + shift), statistics in at least fp32.

    ``norm="group"``: GroupNorm (Wu & He 2018). ``"masked_group"``: its moments weighted by the branch's mask, so
    that they do not depend on the region's area. ``"pixel"``: root mean square over channels at each pixel.
    """
    n, c = x.shape[:2]
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm == "pixel":
        normal = values * torch.rsqrt(values.square().mean(1, keepdim=True) + PIXEL_EPS)
    else:
        grouped = values.reshape(n, groups, c // groups, -1)
        if norm == "masked_group":
            weights = masks.to(values.dtype).reshape(n, 1, 1, -1) + MASK_FLOOR
            eps = MASKED_GROUP_EPS
        else:
            weights, eps = torch.ones_like(grouped[:, :1, :1]), GROUP_EPS
        weights = weights / (weights.sum(-1, keepdim=True) * (c // groups))
        mean = (grouped * weights).sum((2, 3), keepdim=True)
        variance = ((grouped - mean).square() * weights).sum((2, 3), keepdim=True)
        normal = ((grouped - mean) * torch.rsqrt(variance + eps)).reshape(values.shape)
    out = normal * weight.to(values.dtype)[:, None, None] + bias.to(values.dtype)[:, None, None]
    if scale is not None:
        out = out * (1 + scale.to(values.dtype)[:, :, None, None]) + shift.to(values.dtype)[:, :, None, None]
    return (F.silu(out) if activate else out).to(x.dtype)


def masked_skip_norm_silu(
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
    """SiLU(norm([u_k ; m_k * skip]) * (1 + scale_k) + shift_k): the first half of a branch decoder's residual block."""
    z = masked_skip_concat(u, skip, masks)
    return group_norm_silu(z, weight, bias, scale, shift, masks, groups, norm, True)


def mask_pyramid(masks: Tensor, levels: int) -> list[Tensor]:
    """Area averages of the masks at 1/2, 1/4 ... 1/2^levels: they still sum to one over K at every resolution."""
    out = []
    for _ in range(levels):
        masks = F.avg_pool2d(masks, 2)
        out.append(masks)
    return out


@full_precision
def region_pool(features: Tensor, masks: Tensor) -> Tensor:
    """Region tokens c_k = sum_p m_k f / (sum_p m_k + 1/2): each region's mean feature, [B, K, C] fp32."""
    values = features.to(torch.promote_types(features.dtype, torch.float32)).flatten(2)
    weights = masks.to(values.dtype).flatten(2)
    weights = weights / (weights.sum(-1, keepdim=True) + POOL_FLOOR)
    return weights @ values.transpose(1, 2)


def region_blend(logits: Tensor, branches: Tensor) -> tuple[Tensor, Tensor]:
    """Masks m = softmax over K of the logits [B, K, H, W] and the prediction sum_k m_k * branch_k (eq. 2.7).

    branches: [B*K, C, H, W].
    """
    masks = logits.softmax(dim=1)
    outputs = branches.to(masks.dtype).unflatten(0, masks.shape[:2])
    return masks, (outputs * masks[:, :, None]).sum(1)


def region_blend_mse(logits: Tensor, branches: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of each image's blend, over channels and pixels: [B]."""
    _, prediction = region_blend(logits, branches)
    return (prediction - target.to(prediction.dtype)).square().flatten(1).mean(1)
