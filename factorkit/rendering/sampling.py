"""Where a field is sampled along rays: uniformly in a box, or in the occupied cells of a grid."""

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
        seed: int | None,
        first_ray: int = 0,
        shift: Tensor | None = None,
    ) -> Intervals:
        """Compute intervals of rays [N, 3]; uniform edges carry gradients of the rays, fine ones are detached."""
        near, far = ops.intersect_box(origins, directions, self.lower, self.upper)
        edges = near[:, None] + (far - near)[:, None] * self._unit_edges(near, seed, first_ray)
        coarse = _dense_intervals(edges)
        if not self.num_fine_samples:
            return coarse
        with torch.no_grad():
            sigma = density(coarse)
            black = sigma.new_zeros(*sigma.shape, 1)
            weights = ops.composite(sigma, black, coarse.t_start, coarse.t_end, weights=True).weights
            assert weights is not None
            weights = weights.to(edges.dtype)
            # One step more, of which only the inner edges are used: the outer ones are edges of the first pass.
            fine = ops.sample_pdf(
                coarse.t_start, coarse.t_end, weights, self.num_fine_samples + 1, seed=seed, first_ray=first_ray
            )
        return _dense_intervals(torch.cat([edges, fine[:, 1:-1]], dim=1).sort(dim=1).values)

    def _unit_edges(self, near: Tensor, seed: int | None, first_ray: int) -> Tensor:
        if seed is None:
            return torch.linspace(0, 1, self.num_samples + 1, dtype=near.dtype, device=near.device)
        zero = torch.zeros_like(near)[:, None].detach()
        return ops.sample_pdf(zero, zero + 1, zero + 1, self.num_samples, seed=seed, first_ray=first_ray)


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
        seed: int | None,
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


def _dense_intervals(edges: Tensor) -> Intervals:
    count = torch.tensor(edges[:, 1:].numel(), device=edges.device)
    return Intervals(edges[:, :-1], edges[:, 1:], None, None, count)
