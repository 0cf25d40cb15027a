"""Where rays enter and leave a box or a sphere: near and far, with gradients for the rays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from factorkit.ops import reference_rendering as reference
from factorkit.ops.checks import check_box, check_rays
from factorkit.ops.launch import call, plain

BOX, SPHERE = 0, 1  # the order of ShapeKind in csrc/intersect.h


def intersect_box(
    origins: Tensor, directions: Tensor, lower: Sequence[float], upper: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Near and far of rays ``o + t d``, t >= 0, in the box: [N] each, in units of the directions' length.

    A ray that starts inside has near = 0; one that misses has near = far = 0, so ``far > near`` tells who hits. Faces
    belong to the box, also for rays that run along them. Gradients reach origins and directions.

    Args:
        origins, directions: [N, 3], fp32 or fp64; directions of any length but zero.
        lower, upper: the box's corners, three floats each.

    Raises:
        ValueError: wrong shapes or dtypes, NaN in the rays (looked for on the CPU only), a box without inside.
    """
    check_rays(origins, directions)
    lower, upper = check_box(lower, upper)
    if plain(origins):
        return reference.intersect_box(origins, directions, lower, upper)
    return torch.ops.factorkit.intersect(origins, directions, BOX, lower, upper)


def intersect_sphere(
    origins: Tensor, directions: Tensor, centre: Sequence[float], radius: float
) -> tuple[Tensor, Tensor]:
    """Near and far of rays in the sphere; all else as :func:`intersect_box`.

    Args:
        centre: three floats.
        radius: positive.

    Raises:
        ValueError: as :func:`intersect_box`, and a radius that is not positive.
    """
    check_rays(origins, directions)
    centre = [float(v) for v in centre]
    if len(centre) != 3 or not 0 < radius < float("inf"):
        raise ValueError(f"a sphere needs a centre of three floats and a positive radius; got {centre} and {radius}")
    if plain(origins):
        return reference.intersect_sphere(origins, directions, centre, float(radius))
    return torch.ops.factorkit.intersect(origins, directions, SPHERE, centre, [float(radius), 0.0, 0.0])


@torch.library.custom_op("factorkit::intersect", mutates_args=(), device_types=("cpu", "cuda"))
def _intersect(
    origins: Tensor, directions: Tensor, kind: int, first: list[float], second: list[float]
) -> tuple[Tensor, Tensor]:
    origins, directions = origins.contiguous(), directions.contiguous()
    near, far = origins.new_empty(origins.shape[0]), origins.new_empty(origins.shape[0])
    call("intersect", origins, (origins, directions, near, far), origins.shape[0], kind, first, second)
    return near, far


@_intersect.register_fake
def _(origins, directions, kind, first, second):
    return origins.new_empty(origins.shape[0]), origins.new_empty(origins.shape[0])


@torch.library.custom_op("factorkit::intersect_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _intersect_backward(
    d_near: Tensor,
    d_far: Tensor,
    origins: Tensor,
    directions: Tensor,
    kind: int,
    first: list[float],
    second: list[float],
) -> tuple[Tensor, Tensor]:
    given = [x.contiguous() for x in (origins, directions, d_near, d_far)]
    found = torch.empty_like(given[0]), torch.empty_like(given[1])
    call("intersect_backward", origins, (*given, *found), origins.shape[0], kind, first, second)
    return found


@_intersect_backward.register_fake
def _(d_near, d_far, origins, directions, kind, first, second):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (origins, directions))


def _setup(ctx, inputs, output):
    origins, directions, *ctx.shape = inputs
    ctx.save_for_backward(origins, directions)


def _autograd(ctx, d_near, d_far):
    found = torch.ops.factorkit.intersect_backward(d_near, d_far, *ctx.saved_tensors, *ctx.shape)
    return *found, None, None, None


_intersect.register_autograd(_autograd, setup_context=_setup)
