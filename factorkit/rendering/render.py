"""Volume rendering of a field along rays."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from factorkit import ops
from factorkit.rendering.cameras import Rays
from factorkit.rendering.sampling import Intervals, Sampling, approach_box

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
    seed: int | Tensor | None = None,
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
