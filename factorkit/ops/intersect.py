"""Intervals of rays in a box, near and far, with gradients for the rays (csrc/intersect.h)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from factorkit.ops.dispatch import call_extension, check_box, check_rays, reference_gradients, register, select

FAR_SIDES = 64  # as kFarSides in csrc/intersect.h


def cross_slabs(origins: Tensor, directions: Tensor, lower: list[float], upper: list[float]) -> tuple[Tensor, Tensor]:
    """Intersect by the slab method, in plain differentiable PyTorch: the reference of :func:`intersect_box`.

    A ray parallel to two faces is between them always or never. Single precision is too coarse for origins far away.
    """
    low, high = origins.new_tensor(lower), origins.new_tensor(upper)
    plain = _cross_slabs(origins, directions, low, high)
    if origins.dtype == torch.float64:
        return plain
    reach = FAR_SIDES * (high - low)
    is_far = ((origins < low - reach) | (origins > high + reach)).any(1)
    exact = _cross_slabs(*(x.double() for x in (origins, directions, low, high)))
    near, far = (torch.where(is_far, b.to(a), a) for a, b in zip(plain, exact, strict=True))
    return near, far


def _cross_slabs(origins: Tensor, directions: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    parallel = directions == 0
    safe = torch.where(parallel, 1.0, directions)
    first = torch.where(parallel, -math.inf, (torch.where(directions > 0, low, high) - origins) / safe)
    second = torch.where(parallel, math.inf, (torch.where(directions > 0, high, low) - origins) / safe)
    between = ~parallel | ((origins >= low) & (origins <= high))
    near, far = first.amax(1), second.amin(1)
    hit = between.all(1) & ~parallel.all(1) & (near <= far) & (far >= 0)
    return torch.where(hit, near.clamp_min(0), 0.0), torch.where(hit, far, 0.0)


def intersect_box(
    origins: Tensor, directions: Tensor, lower: Sequence[float], upper: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Compute near and far of rays ``o + t d``, t >= 0, in a box: [N] each, in units of the directions' length.

    A ray that starts inside has near = 0. One that misses has near = far = 0, so ``far > near`` marks the hits. Faces
    belong to the box, also for rays that run along them. Gradients reach origins and directions. Rays from more than 64
    sides away are intersected in double precision; the result has the precision of the origins' dtype.

    Args:
        origins: [N, 3], fp32 or fp64.
        directions: [N, 3], of any length but zero.
        lower: the box's lower corner, three floats.
        upper: the box's upper corner.

    Raises:
        ValueError: wrong shapes or dtypes, NaN in the rays (checked on the CPU only), a box without inside.
    """
    check_rays(origins, directions)
    low, high = check_box(lower, upper)
    return select("intersect_box", cross_slabs, origins)(origins, directions, low, high)


def _forward(origins: Tensor, directions: Tensor, lower: list[float], upper: list[float]) -> tuple[Tensor, Tensor]:
    origins, directions = origins.contiguous(), directions.contiguous()
    near, far = _fake(origins)
    call_extension("intersect", origins, (origins, directions, near, far), origins.shape[0], lower, upper)
    return near, far


def _fake(origins: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return origins.new_empty(origins.shape[0]), origins.new_empty(origins.shape[0])


def _backward(
    d_near: Tensor, d_far: Tensor, origins: Tensor, directions: Tensor, lower: list[float], upper: list[float]
) -> tuple[Tensor, Tensor]:
    tensors = [x.contiguous() for x in (origins, directions, d_near, d_far)]
    gradients = _backward_fake(d_near, d_far, origins, directions)
    call_extension("intersect_backward", origins, (*tensors, *gradients), origins.shape[0], lower, upper)
    return gradients


def _backward_fake(
    d_near: Tensor, d_far: Tensor, origins: Tensor, directions: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return origins.new_empty(origins.shape), directions.new_empty(directions.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    origins, directions, *ctx.box = inputs
    ctx.save_for_backward(origins, directions)


def _autograd(ctx: Any, d_near: Tensor, d_far: Tensor) -> tuple:
    if torch.is_grad_enabled():
        return reference_gradients(cross_slabs, (*ctx.saved_tensors, *ctx.box), (d_near, d_far))
    return *torch.ops.factorkit.intersect_box_backward(d_near, d_far, *ctx.saved_tensors, *ctx.box), None, None


register("intersect_box", _forward, _fake, autograd=(_setup_context, _autograd), needs_extension=True)
register("intersect_box_backward", _backward, _backward_fake, needs_extension=True)
