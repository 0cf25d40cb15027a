"""Volume rendering of a field along rays, and where it samples them: a box, or the occupied cells of a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from factorkit import ops
from factorkit.rendering.cameras import Rays
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
SEGMENT_ENDS = (0.125, 0.75, 1.0)  # of the steps: before the ball, within it, and beyond


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
        seed: int | None,
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

    def place_evenly(self, origins: Tensor, seed: int | None, first_ray: int = 0) -> Intervals:
        """Return the steps of the first pass."""
        distance = origins.norm(dim=1, keepdim=True)
        near = NEAR_SHARE * distance
        start, end = torch.maximum(distance - RADIUS, 2 * near), distance + RADIUS
        unit = _unit_edges(distance[:, 0], self.num_samples, seed, first_ray)
        first, second, _ = SEGMENT_ENDS
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


def _unit_edges(near: Tensor, count: int, seed: int | None, first_ray: int) -> Tensor:
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


Sampling = UniformSampling | OccupancySampling | UnboundedSampling


def _dense_intervals(edges: Tensor) -> Intervals:
    count = edges.new_full((), edges[:, 1:].numel(), dtype=torch.int64)
    return Intervals(edges[:, :-1], edges[:, 1:], None, None, count)


#: positions [M, 3], directions [M, 3] -> density [M] (or [M, 1]), at least 0, per unit of length; radiance [M, C]
Field = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

NORMAL_CHANNELS = 3


class Rendered(NamedTuple):
    """The rendering of rays [..., 3]. Distances are in units of the directions' length."""

    color: Tensor  #: [..., C]
    depth: Tensor  #: [...], expected distance sum w_i t_i, not divided by the opacity
    opacity: Tensor  #: [...], 0 to 1
    normals: Tensor | None  #: [..., 3], expected outward normal sum w_i n_i; its length is 1 on opaque flat surfaces
    distortion: Tensor | None  #: [...], the loss of Barron et al. 2022 (eq. 15)
    num_steps: Tensor  #: int64 scalar, the number of steps (without a capacity)


def render(
    field: Field,
    rays: Rays,
    sampling: Sampling,
    *,
    background: Tensor | None = None,
    early_stop: float = 0.0,
    normals: bool = False,
    distortion: bool = False,
    seed: int | None = None,
    first_ray: int = 0,
    chunk: int | None = None,
) -> Rendered:
    """Render a field along rays (Max 1995; Mildenhall et al. 2020).

    Gradients reach the field's parameters, the background, and, through positions and directions, poses and intrinsics.
    Rays from very far away (100 radii of the sampled box) are moved to the box in double precision first.

    Args:
        field: any callable, positions [M, 3] and directions [M, 3] to density [M] and radiance [M, C], C from 1 to 32
            (29 with normals). M may be 0.
        rays: origins and directions [..., 3] of one shape, as :func:`factorkit.rendering.image_rays` returns them.
        sampling: where the field is evaluated.
        background: [C] or [..., C]; None: black.
        early_stop: transmittance below which the rest of a ray is ignored, 0 (never) to below 1.
        normals: also compute -grad density / |grad density|, by autograd through the field; differentiable.
        distortion: also compute the distortion loss.
        seed: jitters the steps (training); None: no jitter (images).
        first_ray: index of the first ray, which its jitter depends on: a batch in parts renders as a whole.
        chunk: rays at once, without gradient, for whole images; None: all at once, with gradient where it is enabled.

    Raises:
        ValueError: rays of two shapes, wrong output shapes of the field, chunk < 1, or an error of an op.

    Example:
        >>> import torch
        >>> from factorkit import rendering
        >>> def ball(positions, directions):                            # of radius 1/2, red, nearly solid
        ...     inside = positions.norm(dim=-1) < 0.5
        ...     return 50.0 * inside, torch.tensor([1.0, 0.0, 0.0]).expand(len(positions), 3)
        >>> pose, lens = rendering.orbit(1, radius=3.0, elevation=30.0)[0], rendering.intrinsics_from_fov(40.0, 9, 9)
        >>> rays = rendering.image_rays(pose, lens, 9, 9)
        >>> sampling = rendering.UniformSampling((-1, -1, -1), (1, 1, 1), num_samples=64)
        >>> out = factorkit.render(ball, rays, sampling)
        >>> out.color.shape, round(out.opacity[4, 4].item(), 3), round(out.opacity[0, 0].item(), 3)
        (torch.Size([9, 9, 3]), 1.0, 0.0)
    """
    shape = rays.origins.shape[:-1]
    if rays.origins.shape != rays.directions.shape or rays.origins.shape[-1:] != (3,):
        shapes = f"{tuple(rays.origins.shape)} and {tuple(rays.directions.shape)}"
        raise ValueError(f"origins and directions are {shapes}; give two tensors [..., 3] of one shape")
    origins, directions = rays.origins.reshape(-1, 3), rays.directions.reshape(-1, 3)
    if background is not None and background.dim() > 1:
        background = background.expand(*shape, -1).reshape(-1, background.shape[-1])

    def render_part(begin: int, end: int) -> Rendered:
        behind = background[begin:end] if background is not None and background.dim() > 1 else background
        # Steps are numbered from the chunk's first ray; another seed makes the jitter of chunks independent.
        part_seed = None if seed is None else seed + begin
        along_rays = directions[begin:end]
        starts, shift = approach_box(origins[begin:end], along_rays, *sampling.box)

        def evaluate(steps: Intervals, normals: bool) -> tuple[Tensor, Tensor]:
            """Return density and radiance at the middle of each step, shaped like the steps."""
            positions, along = _midpoints(starts, along_rays, steps)
            sigma, radiance = _evaluate_field(field, positions, along, normals)
            return sigma.reshape(steps.t_start.shape), radiance.reshape(*steps.t_start.shape, radiance.shape[-1])

        steps = sampling(starts, along_rays, lambda steps: evaluate(steps, False)[0], part_seed, first_ray, shift)
        sigma, radiance = evaluate(steps, normals)
        if normals and behind is not None:
            behind = torch.cat([behind, behind.new_zeros(*behind.shape[:-1], NORMAL_CHANNELS)], dim=-1)
        out = ops.composite(
            sigma,
            radiance,
            steps.t_start,
            steps.t_end,
            steps.ray_offsets,
            background=behind,
            early_stop=early_stop,
            distortion=distortion,
        )
        color, normal = out.color, None
        if normals:
            color, normal = color[:, :-NORMAL_CHANNELS], color[:, -NORMAL_CHANNELS:]
        depth = out.depth + out.opacity * shift.to(out.depth)
        return Rendered(color, depth, out.opacity, normal, out.distortion, steps.num_steps)

    if chunk is None:
        out = render_part(0, len(origins))
    else:
        if chunk < 1:
            raise ValueError(f"chunk={chunk}; give the number of rays to render at once, at least 1")
        with torch.no_grad():
            parts = [render_part(i, min(i + chunk, len(origins))) for i in range(0, max(1, len(origins)), chunk)]
        *images, counts = zip(*parts, strict=True)
        out = Rendered._make([*(None if x[0] is None else torch.cat(x) for x in images), torch.stack(counts).sum()])
    return Rendered._make([*(x if x is None else x.reshape((*shape, *x.shape[1:])) for x in out[:-1]), out.num_steps])


def _midpoints(origins: Tensor, directions: Tensor, steps: Intervals) -> tuple[Tensor, Tensor]:
    """Return the middle of each step and its direction, [M, 3] each."""
    middle = ((steps.t_start + steps.t_end) / 2)[..., None]
    if steps.ray is None:
        along = directions[:, None].expand(-1, middle.shape[1], -1)
        positions = origins[:, None] + middle * along
    else:
        along = directions.index_select(0, steps.ray)
        positions = origins.index_select(0, steps.ray) + middle * along
    return positions.reshape(-1, 3), along.reshape(-1, 3)


def _evaluate_field(field: Field, positions: Tensor, directions: Tensor, normals: bool) -> tuple[Tensor, Tensor]:
    """Return density [M] and radiance [M, C], with the normal as three further channels if requested."""
    if not normals:
        return _check_outputs(*field(positions, directions), len(positions))
    with_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if not positions.requires_grad:
            positions = positions.detach().requires_grad_()
        sigma, radiance = _check_outputs(*field(positions, directions), len(positions))
        if sigma.requires_grad:
            (slope,) = torch.autograd.grad(sigma.sum(), positions, create_graph=with_graph, retain_graph=with_graph)
        else:
            slope = torch.zeros_like(positions)  # the density is constant
        normal = -torch.nn.functional.normalize(slope, dim=-1, eps=1e-10)
        radiance = torch.cat([radiance, normal.to(radiance.dtype)], dim=-1)
    return (sigma, radiance) if with_graph else (sigma.detach(), radiance.detach())


def _check_outputs(sigma: Tensor, radiance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if sigma.shape not in ((count,), (count, 1)) or radiance.dim() != 2 or len(radiance) != count:
        shapes = f"density {tuple(sigma.shape)} and radiance {tuple(radiance.shape)}"
        raise ValueError(f"the field returned {shapes} for {count} points; give [{count}] and [{count}, channels]")
    return sigma.reshape(count), radiance
