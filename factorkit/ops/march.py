"""Samples along rays where the occupancy grid is not empty (csrc/march.h)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from factorkit.ops.dispatch import (
    call_extension,
    check_box,
    check_matches,
    check_rays,
    check_values,
    is_readable,
    register,
    seed_tensor,
    select,
)
from factorkit.ops.intersect import cross_slabs


class Samples(NamedTuple):
    """Packed samples of N rays, ray after ray and in order along each."""

    t_start: Tensor  #: [M], in units of the directions' length
    t_end: Tensor  #: [M]
    ray_offsets: Tensor  #: [N + 1] int64: ray r owns the samples from ray_offsets[r] to ray_offsets[r + 1]
    ray: Tensor  #: [M] int64: the ray of each sample
    wanted: Tensor  #: int64 scalar on the device: the number of samples without a capacity


# --- reference ---


def counter_uniform(seed: int | Tensor, ray: Tensor, step: Tensor) -> Tensor:
    """Hash (ray, step, seed) by pcg4d (Jarzynski & Olano 2020) to fp64 multiples of 2^-24 in [0, 1)."""
    mask = 0xFFFFFFFF  # integers wrap at 2^32
    ray, step = torch.broadcast_tensors(ray, step)
    zero = torch.zeros_like(ray)
    words = [ray & mask, step & mask, zero + (seed & mask), zero + (seed >> 32 & mask)]
    v = [(w * 1664525 + 1013904223) & mask for w in words]
    for mix in (True, False):
        for a, b, c in ((0, 1, 3), (1, 2, 0), (2, 0, 1), (3, 1, 2)):
            v[a] = (v[a] + v[b] * v[c]) & mask
        if mix:
            v = [w ^ (w >> 16) for w in v]
    return (v[0] >> 8).double() * 2.0**-24


def march_all_steps(
    origins: Tensor,
    directions: Tensor,
    near: Tensor,
    far: Tensor,
    occupancy: Tensor,
    lower: list[float],
    upper: list[float],
    step: float,
    max_step: float,
    cone_angle: float,
    seed: int | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return t_start [M], t_end [M], offsets [N + 1] and each sample's ray [M], testing every step of every ray."""
    low, high = origins.new_tensor(lower), origins.new_tensor(upper)
    centre, half = (low + high) / 2, (high - low) / 2
    levels, resolution = occupancy.shape[0], _grid_resolution(occupancy)
    slack = face_slack(centre, half)
    reach = 2 ** (levels - 1) * half * (1 + slack)
    _, leave = cross_slabs(origins, directions, (centre - reach).tolist(), (centre + reach).tolist())
    edges = _step_edges(near, torch.minimum(far, leave), step, max_step, cone_angle)
    size = edges.diff(dim=1)

    moved = edges.clone()
    if seed is not None and edges.shape[1] > 2:
        n, k = edges.shape
        ray, index = (torch.arange(count, device=edges.device) for count in (n, k))
        u = counter_uniform(seed, ray[:, None], index[None, 1:]).to(edges.dtype)
        moved[:, 1:] += (u - 0.5) * size
    moved = torch.where(edges < far[:, None], torch.minimum(moved, far[:, None]), far[:, None])
    start, end = moved[:, :-1], moved[:, 1:]

    points = origins[:, None] + (start + end)[..., None] / 2 * directions[:, None]
    place = (points - centre) / half
    cell_size = (2 * half / resolution).amin()
    length = size * directions.norm(dim=1)[:, None]
    scale = torch.ones_like(length)
    for _ in range(levels - 1):
        coarser = (place.abs().amax(-1) >= scale) | (cell_size * scale < length)
        scale = torch.where(coarser & (scale < 2 ** (levels - 1)), scale * 2, scale)
    cell = (place / scale[..., None] + 1) * (resolution / 2)
    slack = slack / scale[..., None] * (resolution / 2)
    inside = ((cell >= -slack) & (cell <= resolution + slack)).all(-1)
    x, y, z = torch.where(inside[..., None], cell, 0.0).long().clamp(0, resolution - 1).unbind(-1)
    bit = ((scale.log2().round().long() * resolution + x) * resolution + y) * resolution + z
    occupied = (occupancy.flatten()[bit >> 3] >> (bit & 7)) & 1
    keep = inside & (occupied == 1) & (start < end) & (leave > 0)[:, None]
    offsets = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
    return start[keep], end[keep], offsets, keep.nonzero()[:, 0]


def face_slack(centre: Tensor, half: Tensor) -> Tensor:
    """Return how far rounding may move a point of a face of a box, relative to half the box: [3]."""
    return 4 * torch.finfo(half.dtype).eps * (1 + 2 * centre.abs() / half)


def _step_edges(near: Tensor, last: Tensor, step: float, max_step: float, cone_angle: float) -> Tensor:
    """Return edges [N, K + 1] from near to beyond ``last``, without jitter."""
    if near.numel() == 0:
        return near.new_zeros(0, 1)
    if cone_angle == 0:
        count = max(0, math.ceil(((last - near).amax() / step).item())) + 1
        return near[:, None] + torch.arange(count + 1, device=near.device, dtype=near.dtype) * step
    edges = [near]
    while len(edges) < 2 or (edges[-1] < last).any():
        edges.append(edges[-1] + (cone_angle * edges[-1]).clamp(step, max_step))
    return torch.stack(edges, dim=1)


# --- public function ---


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
    seed: int | Tensor | None = None,
    first_ray: int = 0,
    capacity: int | None = None,
) -> Samples:
    """Find the steps of each ray whose midpoint lies in an occupied cell.

    Steps tile [near, far] whatever the grid holds: edges t_0 = near, t_{k+1} = t_k + clamp(cone_angle * t_k, step,
    max_step), the last one far. A step reads the finest level whose box holds its midpoint and whose cells are not
    shorter than the step (shortest side). Faces belong to the box, also for rays that run along them. Not
    differentiable: compute positions ``o + (t_start + t_end) / 2 * d``
    outside.

    Args:
        origins: [N, 3], fp32 or fp64.
        directions: [N, 3], of any length but zero.
        near: [N], as from :func:`intersect_box`.
        far: [N], may be infinite. No samples where far <= near.
        occupancy: uint8 [levels, R**3 / 8], R a power of two from 8 on: bit i of byte j is cell 8*j + i, x slowest,
            z fastest. Level l is the box scaled by 2**l about its centre, the inner part included.
        lower: the lower corner of level 0's box, three floats.
        upper: its upper corner.
        step: smallest step, in units of t. Without cone_angle every step is ``step``.
        max_step: largest step.
        cone_angle: growth of the step with t.
        seed: moves each inner edge at random by up to half a step either way, a function of (seed, ray, step) alone,
            the same on CPU and CUDA; an int64 scalar on the device of the rays is read there, without waiting. None
            leaves the edges unmoved.
        first_ray: the number of the first ray, so that rays processed in parts move as in one call.
        capacity: None finds the exact number of samples, which waits once for the device. A number allocates that many
            and never waits: rays that do not fit are cut off, the last entries may be empty (zero length, ray 0).

    Raises:
        ValueError: wrong shapes, dtypes or devices, steps that are not 0 < step <= max_step, a negative cone_angle or
            capacity, a seed outside [0, 2^63), NaN in rays, near or far, or steps that t cannot represent where a ray
            enters the box from far away (checked on the CPU only; :func:`factorkit.render` moves such rays to the box).
    """
    check_rays(origins, directions)
    for name, x in (("near", near), ("far", far)):
        check_matches(name, x, "origins", origins, origins.shape[:1])
        check_values(name, x, allow_infinity=name == "far")
    low, high = check_box(lower, upper)
    seed = seed_tensor(seed, origins.device)
    _check_occupancy(occupancy, origins)
    if not (0 < step < math.inf and step <= max_step) or not 0 <= cone_angle < math.inf:
        raise ValueError(f"need 0 < step <= max_step and cone_angle >= 0; got {step}, {max_step} and {cone_angle}")
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity={capacity}; it must be 0 or more, or None for as many as there are")

    origins, directions, near, far = (x.detach() for x in (origins, directions, near, far))
    _check_precision(origins, directions, near, far, low, high, step)
    skipped = first_ray if seed is not None and len(origins) else 0
    if skipped:  # kernels number rays from 0: rays without samples fill the places before the first
        origins, directions, near = (
            torch.cat([x[:1].expand(skipped, *x.shape[1:]), x]) for x in (origins, directions, near)
        )
        far = torch.cat([far.new_full((skipped,), -math.inf), far])
    rays = (origins, directions, near, far, occupancy.detach())
    settings = (low, high, float(step), float(max_step), float(cone_angle), seed)
    samples = _march(rays, settings, capacity)
    if not skipped:
        return samples
    ray = (samples.ray - skipped).clamp_min(0)
    return samples._replace(ray_offsets=samples.ray_offsets[skipped:], ray=ray)


def _check_precision(
    origins: Tensor, directions: Tensor, near: Tensor, far: Tensor, low: list[float], high: list[float], step: float
) -> None:
    """Raise ValueError if a ray enters level 0's box at a t to which a step cannot be added."""
    if not is_readable(origins) or not len(origins):
        return
    precision = torch.finfo(origins.dtype).eps
    if float(origins.abs().amax()) * precision < step * float(directions.abs().amax()):
        return
    enter, leave = cross_slabs(origins, directions, low, high)
    at = torch.where(torch.minimum(leave, far) > torch.maximum(enter, near), torch.maximum(enter, near), 0.0)
    if float(at.amax()) * precision > step:
        raise ValueError(
            f"ray {int(at.argmax())} enters the box at t = {float(at.amax()):.6g}, where steps of {step:g} are below "
            f"the precision of {origins.dtype}; move the origins along their rays to the box, or give float64"
        )


def _march(rays: tuple[Tensor, ...], settings: tuple, capacity: int | None) -> Samples:
    count = select("march_count", march_all_steps, rays[0])
    if count is march_all_steps:
        t_start, t_end, offsets, ray = count(*rays, *settings)
        wanted = offsets[-1].clone()
        if capacity is not None:
            t_start, t_end, ray = (_fit(x, capacity) for x in (t_start, t_end, ray))
            offsets = offsets.clamp_max(capacity)
        return Samples(t_start, t_end, offsets, ray, wanted)
    rays = (*rays, _occupied_blocks(rays[4]))
    counts = count(*rays, *settings)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    wanted = offsets[-1].clone()
    size = int(wanted.item()) if capacity is None else capacity
    if capacity is not None:
        offsets = offsets.clamp_max(capacity)
    t_start, t_end, ray = torch.ops.factorkit.march_write(*rays, *settings, offsets, size)
    return Samples(t_start, t_end, offsets, ray, wanted)


def _fit(x: Tensor, capacity: int) -> Tensor:
    return torch.cat([x[:capacity], x.new_zeros(max(0, capacity - x.shape[0]))])


def _check_occupancy(occupancy: Tensor, origins: Tensor) -> None:
    if occupancy.dim() != 2 or occupancy.dtype != torch.uint8 or occupancy.device != origins.device:
        actual = f"{occupancy.dtype} {tuple(occupancy.shape)} on {occupancy.device}"
        raise ValueError(f"occupancy must be uint8 [levels, R**3 / 8] on {origins.device}; got {actual}")
    levels, size = occupancy.shape
    resolution = _grid_resolution(occupancy)
    if not 1 <= levels <= 16 or resolution**3 != 8 * size or resolution < 8 or resolution & (resolution - 1):
        raise ValueError(
            f"occupancy {tuple(occupancy.shape)} is not 1 to 16 levels of R**3 / 8 bytes, R = 8, 16, 32, ..."
        )


def _grid_resolution(occupancy: Tensor) -> int:
    """Return the number of cells along each axis of a level."""
    return round((8 * occupancy.shape[1]) ** (1 / 3))


def _occupied_blocks(occupancy: Tensor) -> Tensor:
    """Return uint8 [levels, R/8, R/8, R/8], zero where a block of 8^3 cells is empty; an empty tensor below R = 32."""
    levels, resolution = occupancy.shape[0], _grid_resolution(occupancy)
    if resolution < 32:
        return occupancy.new_empty(0)
    side = resolution // 8
    # 8 cells along z share a byte. Two reductions are ten times as fast as one over both axes.
    return occupancy.reshape(levels, side, 8, side, 8, side).amax(2).amax(3)


# --- implementations ---

MARCH = (
    "Tensor origins, Tensor directions, Tensor near, Tensor far, Tensor occupancy, Tensor blocks, float[] lower, "
    "float[] upper, float step, float max_step, float cone_angle, Tensor? seed"
)


def _problem(*march: Any) -> tuple:
    """Return the arguments of csrc/march.h, with contiguous tensors."""
    lower, upper, step, max_step, cone_angle, seed = march[6:]
    tensors = (*(x.contiguous() for x in march[:6]), seed)
    centre = [(a + b) / 2 for a, b in zip(lower, upper, strict=True)]
    half = [(b - a) / 2 for a, b in zip(lower, upper, strict=True)]
    origins, occupancy = tensors[0], tensors[4]
    sizes = (origins.shape[0], occupancy.shape[0], _grid_resolution(occupancy))
    return tensors, sizes, centre, half, [step, max_step, cone_angle]


def _count(origins: Tensor, *march: Any) -> Tensor:
    counts = _count_fake(origins)
    call_extension("march_count", origins, *_problem(origins, *march), counts)
    return counts


def _count_fake(origins: Tensor, *_: Any) -> Tensor:
    return origins.new_empty(origins.shape[0], dtype=torch.int64)


def _write(origins: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *march, offsets, size = rest
    samples = _write_fake(origins, size)
    call_extension("march_write", origins, *_problem(origins, *march), (offsets.contiguous(), *samples), size)
    return samples


def _write_fake(origins: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    size = rest[-1]
    return origins.new_empty(size), origins.new_empty(size), origins.new_empty(size, dtype=torch.int64)


register("march_count", _count, _count_fake, schema=f"({MARCH}) -> Tensor", needs_extension=True)
register(
    "march_write",
    _write,
    _write_fake,
    schema=f"({MARCH}, Tensor offsets, int size) -> (Tensor, Tensor, Tensor)",
    needs_extension=True,
)
