"""Where a field is sampled along rays: in a box, in all of space, or in the occupied cells of a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from factorkit import ops
from factorkit.rendering.occupancy import OccupancyGrid

FAR_RADII = 100.0  # distance of an origin from the box, in its radii, beyond which single precision is too coarse for t


class Intervals(NamedTuple):
    """Steps along N rays: dense [N, S], or packed [M] with offsets."""

    t_start: Tensor
    t_end: Tensor
    ray_offsets: Tensor | None  #: int64 [N + 1]; None if dense
    ray: Tensor | None  #: int64 [M], the ray of each step; None if dense
    num_steps: Tensor  #: int64 scalar: the number of steps (without a capacity)


def approach_box(
    origins: Tensor, directions: Tensor, lower: Sequence[float], upper: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Move origins [N, 3] that are very far from a box along their rays to before it.

    Returns:
        The origins, moved in double precision, and by how much of t, float64 [N]: 0 where they are near enough.
    """
    with torch.no_grad():
        radius = math.dist(lower, upper) / 2
        centre = [(a + b) / 2 for a, b in zip(lower, upper, strict=True)]
        offsets = torch.stack([c - origins[:, axis].double() for axis, c in enumerate(centre)], dim=1)
        along = directions.double()
        squared = (along * along).sum(1).clamp_min(torch.finfo(torch.float32).tiny)
        shift = (offsets * along).sum(1) / squared - 2 * radius / squared.sqrt()
        shift = torch.where(offsets.norm(dim=1) > FAR_RADII * radius, shift.clamp_min(0), 0.0)
    return (origins.double() + shift[:, None] * directions.double()).to(origins.dtype), shift


Density = Callable[[Intervals], Tensor]  # the field's density at the middle of each step


@dataclass(frozen=True)
class UniformSampling:
    """Uniform steps on every ray from its entry into a box to its exit, optionally refined by importance.

    With ``num_fine_samples`` that many further steps are placed where a first pass without gradient has weight
    (Mildenhall et al. 2020, section 5.2).

    Args:
        lower: lower corner of the box, three floats.
        upper: upper corner.
        num_samples: steps of equal length.
        num_fine_samples: further steps; 0: none, and no first pass.
    """

    lower: Sequence[float]
    upper: Sequence[float]
    num_samples: int = 128
    num_fine_samples: int = 0

    @property
    def box(self) -> tuple[Sequence[float], Sequence[float]]:
        """The corners of what is sampled."""
        return self.lower, self.upper

    def __call__(
        self,
        origins: Tensor,
        directions: Tensor,
        density: Density,
        seed: int | Tensor | None,
        first_ray: int = 0,
        shift: Tensor | None = None,
    ) -> Intervals:
        """Compute intervals of rays [N, 3]; uniform edges carry gradients of the rays, fine ones are detached."""
        near, far = ops.intersect_box(origins, directions, self.lower, self.upper)
        edges = near[:, None] + (far - near)[:, None] * _unit_edges(near, self.num_samples, seed, first_ray)
        coarse = _dense_intervals(edges)
        if not self.num_fine_samples:
            return coarse
        with torch.no_grad():
            weights = _weights(density(coarse), coarse).to(edges.dtype)
            # One step more, of which only the inner edges are used: the outer ones are edges of the first pass.
            fine = ops.sample_pdf(
                coarse.t_start, coarse.t_end, weights, self.num_fine_samples + 1, seed=seed, first_ray=first_ray
            )
        return _dense_intervals(torch.cat([edges, fine[:, 1:-1]], dim=1).sort(dim=1).values)


NEAR_SHARE = 0.05  # of a camera's distance from the centre, before which nothing is sampled
RADIUS = 1.25  # of the ball around the centre, in which steps have one length
FAR_FACTOR = 64.0  # of the far end of that ball, where the last step ends
SEGMENT_ENDS = (0.125, 0.75)  # of the steps: before the ball, and within it; the rest are beyond
EVEN_SHARE = 0.2  # of the steps that the second pass spreads like the first, so that new surfaces are found


@dataclass(frozen=True)
class UnboundedSampling:
    """Steps on every ray from near its origin to far away, for a scene in all of space, centred at the origin.

    A first pass without gradient has equal steps before the ball of radius 1.25 about the origin, others within it, and
    steps equal in disparity beyond. The steps that are returned lie where it has weight, as a proposal (Barron et al.
    2022, section 3). Rays are curved in contracted space, so :func:`factorkit.ops.march_rays` does not apply.

    Args:
        num_samples: steps of either pass.
    """

    num_samples: int = 128

    @property
    def box(self) -> tuple[Sequence[float], Sequence[float]]:
        """Corners so far away that no origin is moved to them."""
        return (-1e9,) * 3, (1e9,) * 3

    @torch.no_grad()
    def __call__(
        self,
        origins: Tensor,
        directions: Tensor,
        density: Density,
        seed: int | Tensor | None,
        first_ray: int = 0,
        shift: Tensor | None = None,
    ) -> Intervals:
        """Compute intervals of rays [N, 3] with unit directions, without gradient."""
        coarse = self.place_evenly(origins, seed, first_ray)
        weights = _weights(density(coarse), coarse).to(coarse.t_start)
        weights = weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).eps)
        weights = (1 - EVEN_SHARE) * weights + EVEN_SHARE / self.num_samples
        edges = ops.sample_pdf(coarse.t_start, coarse.t_end, weights, self.num_samples, seed=seed, first_ray=first_ray)
        return _dense_intervals(edges)

    def place_evenly(self, origins: Tensor, seed: int | Tensor | None, first_ray: int = 0) -> Intervals:
        """Return the steps of the first pass."""
        distance = origins.norm(dim=1, keepdim=True)
        near = NEAR_SHARE * distance
        start, end = torch.maximum(distance - RADIUS, 2 * near), distance + RADIUS
        unit = _unit_edges(distance[:, 0], self.num_samples, seed, first_ray)
        first, second = SEGMENT_ENDS
        before = near + (start - near) * (unit / first)
        within = start + (end - start) * ((unit - first) / (second - first))
        beyond = end / (1 - (1 - 1 / FAR_FACTOR) * ((unit - second) / (1 - second)).clamp(0, 1))
        return _dense_intervals(torch.where(unit < first, before, torch.where(unit < second, within, beyond)))


def _weights(sigma: Tensor, steps: Intervals) -> Tensor:
    """Return the weight of each dense step in the rendering of densities [N, S]."""
    black = sigma.new_zeros(*sigma.shape, 1)
    weights = ops.composite(sigma, black, steps.t_start, steps.t_end, weights=True).weights
    assert weights is not None
    return weights


def _unit_edges(near: Tensor, count: int, seed: int | Tensor | None, first_ray: int) -> Tensor:
    """Return the edges of steps from 0 to 1, [count + 1] if they are even, [N, count + 1] if jittered by a seed."""
    if seed is None:
        return torch.linspace(0, 1, count + 1, dtype=near.dtype, device=near.device)
    zero = torch.zeros_like(near)[:, None].detach()
    return ops.sample_pdf(zero, zero + 1, zero + 1, count, seed=seed, first_ray=first_ray)


@dataclass(frozen=True)
class OccupancySampling:
    """Steps of constant or growing size through the occupied cells of a grid (:func:`factorkit.ops.march_rays`).

    Steps start at ``near``, the same for all rays and poses, so detaching them loses no gradient of a pose.

    Args:
        occupancy: the grid.
        step: step size in units of the directions' length; None: the shortest side of the finest cells.
        max_step: upper bound of the step.
        cone_angle: growth of the step with t; 0: constant.
        near: start of the rays.
        far: end of the rays.
        capacity: maximum number of samples; None: all of them, which synchronises once with the device.
    """

    occupancy: OccupancyGrid
    step: float | None = None
    max_step: float = math.inf
    cone_angle: float = 0.0
    near: float = 0.0
    far: float = math.inf
    capacity: int | None = None

    @property
    def box(self) -> tuple[Sequence[float], Sequence[float]]:
        """The corners of the grid's coarsest level."""
        grid = self.occupancy
        margin = [(b - a) / 2 * (2 ** (grid.levels - 1) - 1) for a, b in zip(grid.lower, grid.upper, strict=True)]
        lower = [a - m for a, m in zip(grid.lower, margin, strict=True)]
        return lower, [b + m for b, m in zip(grid.upper, margin, strict=True)]

    def __call__(
        self,
        origins: Tensor,
        directions: Tensor,
        density: Density,
        seed: int | Tensor | None,
        first_ray: int = 0,
        shift: Tensor | None = None,
    ) -> Intervals:
        """Compute intervals of rays [N, 3], without gradient.

        Rays that were moved by ``shift`` (:func:`approach_box`) start where they are, unless ``near`` is beyond that.
        """
        grid = self.occupancy
        near, far = (origins.new_full((len(origins),), bound) for bound in (self.near, self.far))
        if shift is not None:
            moved_near, moved_far = ((x.double() - shift).to(x) for x in (near, far))
            near, far = torch.where(shift > 0, moved_near.clamp_min(0), near), torch.where(shift > 0, moved_far, far)
        samples = ops.march_rays(
            origins,
            directions,
            near,
            far,
            grid.bits,
            grid.lower,
            grid.upper,
            step=grid.cell_side if self.step is None else self.step,
            max_step=self.max_step,
            cone_angle=self.cone_angle,
            seed=seed,
            first_ray=first_ray,
            capacity=self.capacity,
        )
        return Intervals(samples.t_start, samples.t_end, samples.ray_offsets, samples.ray, samples.wanted)


Sampling = UniformSampling | OccupancySampling | UnboundedSampling


def _dense_intervals(edges: Tensor) -> Intervals:
    count = edges.new_full((), edges[:, 1:].numel(), dtype=torch.int64)
    return Intervals(edges[:, :-1], edges[:, 1:], None, None, count)
