"""Samples along rays where the occupancy grid is not empty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from factorkit.ops import reference_rendering as reference
from factorkit.ops.checks import check_alike, check_box, check_rays, check_seed, check_values
from factorkit.ops.launch import call, plain


class Samples(NamedTuple):
    """Packed samples of N rays, ray after ray and in order along each."""

    t_start: Tensor  #: [M], in units of the directions' length
    t_end: Tensor  #: [M]
    ray_offsets: Tensor  #: [N + 1] int64: ray r owns the samples from ray_offsets[r] to ray_offsets[r + 1]
    ray: Tensor  #: [M] int64: the ray of each sample
    wanted: Tensor  #: int64 scalar on the device: how many samples there are without a capacity


def march_rays(
    origins: Tensor,
    directions: Tensor,
    near: Tensor,
    far: Tensor,
    occupancy: Tensor,
    lower: Sequence[float],
    upper: Sequence[float],
    *,
    step: float,
    max_step: float = math.inf,
    cone_angle: float = 0.0,
    seed: int | None = None,
    first_ray: int = 0,
    capacity: int | None = None,
) -> Samples:
    """The steps of each ray whose midpoint lies in an occupied cell.

    Steps tile [near, far] whatever the grid says: edges t_0 = near, t_{k+1} = t_k + clamp(cone_angle * t_k, step,
    max_step), the last one far. A step asks the finest level whose box holds its midpoint and whose cells are not
    shorter than the step (shortest side). Nothing is differentiable here: positions ``o + (t_start + t_end) / 2 * d``
    are computed outside.

    Args:
        origins, directions: [N, 3], fp32 or fp64; directions of any length but zero.
        near, far: [N], as :func:`intersect_box` answers; far may be infinite. No samples where far <= near.
        occupancy: uint8 [levels, R**3 / 8], R a power of two from 8 on: bit i of byte j is cell 8*j + i, x slowest,
            z fastest. Level l is the box scaled by 2**l about its centre, the inner part included.
        lower, upper: the corners of level 0's box, three floats each.
        step, max_step: least and greatest step, in units of t. Without cone_angle every step is ``step``.
        cone_angle: growth of the step with t.
        seed: moves each inner edge at random by up to half a step either way, a function of (seed, ray, step) alone,
            the same on CPU and CUDA; None leaves the edges where they are.
        first_ray: the number of the first ray: rays in parts move as they do in one.
        capacity: None finds the exact number of samples, which waits once for the device. A number makes room for that
            many and never waits: rays that do not fit are cut off, the last entries may be empty (zero length, ray 0).

    Raises:
        ValueError: wrong shapes, dtypes or devices, steps that are not 0 < step <= max_step, a negative cone_angle or
            capacity, a seed outside [0, 2^63), NaN in rays, near or far (looked for on the CPU only).
    """
    check_rays(origins, directions)
    for name, x in (("near", near), ("far", far)):
        check_alike(name, x, "origins", origins, origins.shape[:1])
        check_values(name, x, infinite=name == "far")
    lower, upper = check_box(lower, upper)
    check_seed(seed)
    _check_occupancy(occupancy, origins)
    if not (0 < step < math.inf and step <= max_step) or not 0 <= cone_angle < math.inf:
        raise ValueError(f"need 0 < step <= max_step and cone_angle >= 0; got {step}, {max_step} and {cone_angle}")
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity={capacity}; it must be 0 or more, or None for as many as there are")
    given = tuple(x.detach() for x in (origins, directions, near, far, occupancy))
    if seed is not None and first_ray and len(origins):  # kernels number rays from 0: some without samples go before
        given = (*(torch.cat([x[:1].expand(first_ray, *x.shape[1:]), x]) for x in given[:3]), given[3], given[4])
        far = torch.cat([near.new_full((first_ray,), -math.inf), given[3]])
        found = march_rays(  # type: ignore[misc]
            *given[:3],
            far,
            occupancy,
            lower,
            upper,
            step=step,
            max_step=max_step,
            cone_angle=cone_angle,
            seed=seed,
            capacity=capacity,
        )
        return found._replace(ray_offsets=found.ray_offsets[first_ray:], ray=(found.ray - first_ray).clamp_min(0))
    settings = (lower, upper, float(step), float(max_step), float(cone_angle), seed)
    if plain(origins):
        return _cut(*reference.march_rays(*given, *settings), capacity)  # type: ignore[call-arg]
    given = (*given, _blocks(occupancy))
    counts = torch.ops.factorkit.march_count(*given, *settings)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    wanted = offsets[-1].clone()
    size = int(wanted.item()) if capacity is None else capacity
    if capacity is not None:
        offsets = offsets.clamp_max(capacity)
    t_start, t_end, ray = torch.ops.factorkit.march_write(*given, *settings, offsets, size)
    return Samples(t_start, t_end, offsets, ray, wanted)


def _check_occupancy(occupancy: Tensor, origins: Tensor) -> None:
    if occupancy.dim() != 2 or occupancy.dtype != torch.uint8 or occupancy.device != origins.device:
        found = f"{occupancy.dtype} {tuple(occupancy.shape)} on {occupancy.device}"
        raise ValueError(f"occupancy must be uint8 [levels, R**3 / 8] on {origins.device}; got {found}")
    levels, size = occupancy.shape
    resolution = grid_resolution(size)
    if not 1 <= levels <= 16 or resolution**3 != 8 * size or resolution < 8 or resolution & (resolution - 1):
        raise ValueError(
            f"occupancy {tuple(occupancy.shape)} is not 1 to 16 levels of R**3 / 8 bytes, R = 8, 16, 32, ..."
        )


def grid_resolution(size: int) -> int:
    """Cells along each axis of a level of so many bytes."""
    return round((8 * size) ** (1 / 3))


def _blocks(occupancy: Tensor) -> Tensor:
    """uint8 [levels, R/8, R/8, R/8], zero where 8^3 cells are empty (8 cells along z share a byte); empty below R =
    32."""
    levels, size = occupancy.shape
    resolution = grid_resolution(size)
    if resolution < 32:
        return occupancy.new_empty(0)
    side = resolution // 8
    return occupancy.reshape(levels, side, 8, side, 8, side).amax(2).amax(3)  # ten times as fast as both at once


def _cut(t_start: Tensor, t_end: Tensor, offsets: Tensor, ray: Tensor, capacity: int | None) -> Samples:
    """The reference's answer in the capacity form."""
    wanted = offsets[-1].clone()
    if capacity is not None:
        fit = lambda x: torch.cat([x[:capacity], x.new_zeros(max(0, capacity - x.shape[0]))])  # noqa: E731
        t_start, t_end, ray, offsets = fit(t_start), fit(t_end), fit(ray), offsets.clamp_max(capacity)
    return Samples(t_start, t_end, offsets, ray, wanted)


def _problem(origins, directions, near, far, occupancy, blocks, lower, upper, step, max_step, cone_angle, seed):
    """The numbers of March in csrc/march.h, as csrc/bindings_rendering.cpp takes them; keeps contiguous tensors
    alive."""
    tensors = tuple(x.contiguous() for x in (origins, directions, near, far, occupancy, blocks))
    centre = [(a + b) / 2 for a, b in zip(lower, upper, strict=True)]
    half = [(b - a) / 2 for a, b in zip(lower, upper, strict=True)]
    sizes = (origins.shape[0], occupancy.shape[0], grid_resolution(occupancy.shape[1]))
    return tensors, sizes, centre, half, [step, max_step, cone_angle], seed is not None, seed or 0


@torch.library.custom_op("factorkit::march_count", mutates_args=(), device_types=("cpu", "cuda"))
def _count(
    origins: Tensor,
    directions: Tensor,
    near: Tensor,
    far: Tensor,
    occupancy: Tensor,
    blocks: Tensor,
    lower: list[float],
    upper: list[float],
    step: float,
    max_step: float,
    cone_angle: float,
    seed: int | None,
) -> Tensor:
    problem = _problem(
        origins, directions, near, far, occupancy, blocks, lower, upper, step, max_step, cone_angle, seed
    )
    counts = origins.new_empty(origins.shape[0], dtype=torch.int64)
    call("march_count", origins, *problem, counts)
    return counts


@_count.register_fake
def _(origins, *_):
    return origins.new_empty(origins.shape[0], dtype=torch.int64)


@torch.library.custom_op("factorkit::march_write", mutates_args=(), device_types=("cpu", "cuda"))
def _write(
    origins: Tensor,
    directions: Tensor,
    near: Tensor,
    far: Tensor,
    occupancy: Tensor,
    blocks: Tensor,
    lower: list[float],
    upper: list[float],
    step: float,
    max_step: float,
    cone_angle: float,
    seed: int | None,
    offsets: Tensor,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = _problem(
        origins, directions, near, far, occupancy, blocks, lower, upper, step, max_step, cone_angle, seed
    )
    t_start, t_end = origins.new_empty(size), origins.new_empty(size)
    ray = origins.new_empty(size, dtype=torch.int64)
    call("march_write", origins, *problem, (offsets.contiguous(), t_start, t_end, ray), size)
    return t_start, t_end, ray


@_write.register_fake
def _(origins, *rest):
    size = rest[-1]
    return origins.new_empty(size), origins.new_empty(size), origins.new_empty(size, dtype=torch.int64)
