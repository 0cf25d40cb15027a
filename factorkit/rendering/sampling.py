"""Where along rays a field is asked: everywhere in a box, or where an occupancy grid says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from factorkit import ops
from factorkit.rendering.occupancy import OccupancyGrid


class Intervals(NamedTuple):
    """Steps of N rays: dense [N, S], or packed [M] with offsets."""

    t_start: Tensor
    t_end: Tensor
    ray_offsets: Tensor | None  #: [N + 1] int64, None where dense
    ray: Tensor | None  #: [M] int64, None where dense
    count: Tensor  #: int64 scalar: how many steps there are (or would be, without a capacity)


Density = Callable[[Intervals], Tensor]  # the field's density at the middle of each step


@dataclass(frozen=True)
class EvenSampling:
    """The same number of steps on every ray: of equal length from where it enters the box to where it leaves it, and
    among them, with ``resampled``, that many more where a first look without gradient found weight (Mildenhall et al.
    2020, 5.2).

    Args:
        lower, upper: the box's corners, three floats each.
        samples: steps of equal length.
        resampled: further steps; 0 for none, and no first look.
    """

    lower: Sequence[float]
    upper: Sequence[float]
    samples: int = 128
    resampled: int = 0

    def __call__(
        self, origins: Tensor, directions: Tensor, density: Density, seed: int | None, first_ray: int = 0
    ) -> Intervals:
        """Intervals of rays [N, 3]. The evenly placed edges carry gradients for the rays, the further ones are held."""
        near, far = ops.intersect_box(origins, directions, self.lower, self.upper)
        edges = near[:, None] + (far - near)[:, None] * self._unit_edges(near, seed, first_ray)
        found = _dense(edges)
        if not self.resampled:
            return found
        with torch.no_grad():
            sigma = density(found)
            black = sigma.new_zeros(*sigma.shape, 1)
            weights = ops.composite(sigma, black, found.t_start, found.t_end, weights=True).weights.to(edges.dtype)
            # Of so many steps and one more, the inner edges: the outer ones are edges of the first look already.
            given = found.t_start, found.t_end, weights, self.resampled + 1
            finer = ops.sample_pdf(*given, seed=seed, first_ray=first_ray)[:, 1:-1]
        return _dense(torch.cat([edges, finer], dim=1).sort(dim=1).values)

    def _unit_edges(self, near: Tensor, seed: int | None, first_ray: int) -> Tensor:
        if seed is None:
            return torch.linspace(0, 1, self.samples + 1, dtype=near.dtype, device=near.device)
        zero = torch.zeros_like(near)[:, None].detach()
        return ops.sample_pdf(zero, zero + 1, zero + 1, self.samples, seed=seed, first_ray=first_ray)


@dataclass(frozen=True)
class OccupiedSampling:
    """Steps of a fixed or a growing size through the occupied cells of a grid (:func:`factorkit.ops.march_rays`).

    Steps are counted from ``near``, the same for all rays and poses: holding them takes nothing from a pose's gradient.

    Args:
        occupancy: the grid.
        step: size of a step in units of the directions' length; None: the shortest side of the finest cells.
        max_step, cone_angle: with a cone_angle the step grows with t, up to max_step.
        near, far: where rays begin and end.
        capacity: None for all samples, which waits once for the device; a number makes room for that many.
    """

    occupancy: OccupancyGrid
    step: float | None = None
    max_step: float = math.inf
    cone_angle: float = 0.0
    near: float = 0.0
    far: float = math.inf
    capacity: int | None = None

    def __call__(
        self, origins: Tensor, directions: Tensor, density: Density, seed: int | None, first_ray: int = 0
    ) -> Intervals:
        """Intervals of rays [N, 3], without gradient."""
        grid = self.occupancy
        near, far = (origins.new_full((len(origins),), bound) for bound in (self.near, self.far))
        found = ops.march_rays(
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
        return Intervals(found.t_start, found.t_end, found.ray_offsets, found.ray, found.wanted)


def _dense(edges: Tensor) -> Intervals:
    count = torch.tensor(edges[:, 1:].numel(), device=edges.device)
    return Intervals(edges[:, :-1], edges[:, 1:], None, None, count)
