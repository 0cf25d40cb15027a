"""From a field and rays to what the rays see."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from factorkit import ops
from factorkit.rendering.cameras import Rays
from factorkit.rendering.sampling import EvenSampling, Intervals, OccupiedSampling

#: positions [M, 3], directions [M, 3] -> density [M] (or [M, 1]), at least 0, per unit of length; radiance [M, C]
Field = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

NORMAL_CHANNELS = 3


class Rendered(NamedTuple):
    """What rays [..., 3] see. Distances are in units of the directions' length."""

    color: Tensor  #: [..., C]
    depth: Tensor  #: [...], expected distance sum w_i t_i, not divided by the opacity
    opacity: Tensor  #: [...], 0 to 1
    normals: Tensor | None  #: [..., 3], expected outward normal sum w_i n_i: as long as the surface is opaque and flat
    distortion: Tensor | None  #: [...], the loss of Barron et al. 2022 (eq. 15)
    count: Tensor  #: int64 scalar, the steps that were to be taken


def render(
    field: Field,
    rays: Rays,
    sampling: EvenSampling | OccupiedSampling,
    *,
    background: Tensor | None = None,
    early_stop: float = 0.0,
    normals: bool = False,
    distortion: bool = False,
    seed: int | None = None,
    first_ray: int = 0,
    chunk: int | None = None,
) -> Rendered:
    """Volume rendering of a field along rays (Max 1995; Mildenhall et al. 2020).

    Gradients reach the field's parameters, the background, and through positions and directions the rays and whatever
    they were made from: poses and intrinsics.

    Args:
        field: any callable, positions [M, 3] and directions [M, 3] to density [M] and radiance [M, C], C from 1 to 32
            (29 with normals). M may be 0.
        rays: origins and directions [..., 3] of one shape, as :func:`factorkit.rendering.image_rays` makes them.
        sampling: where the field is asked.
        background: [C] or [..., C], what lies behind; black if None.
        early_stop: transmittance below which the rest of a ray counts as nothing, 0 (never) to below 1.
        normals: also -grad density / |grad density|, by autograd through the field, with gradient where that is on.
        distortion: also the distortion loss.
        seed: moves the steps at random, a function of it alone (training); None leaves them in place (pictures).
        first_ray: the number of the first ray, of which too its move is a function: a batch in parts moves as a whole.
        chunk: rays at once, without gradient, for whole images; None renders all at once, with gradient where it is on.

    Raises:
        ValueError: rays of two shapes, a field's answer of another shape, chunk < 1, or what the ops refuse.

    Example:
        >>> import torch
        >>> from factorkit import rendering
        >>> def ball(positions, directions):                            # of radius 1/2, red, nearly solid
        ...     inside = positions.norm(dim=-1) < 0.5
        ...     return 50.0 * inside, torch.tensor([1.0, 0.0, 0.0]).expand(len(positions), 3)
        >>> pose, lens = rendering.orbit(1, radius=3.0, elevation=30.0)[0], rendering.intrinsics_from_fov(40.0, 9, 9)
        >>> rays = rendering.image_rays(pose, lens, 9, 9)
        >>> seen = factorkit.render(ball, rays, rendering.EvenSampling((-1, -1, -1), (1, 1, 1), samples=64))
        >>> seen.color.shape, round(seen.opacity[4, 4].item(), 3), round(seen.opacity[0, 0].item(), 3)
        (torch.Size([9, 9, 3]), 1.0, 0.0)
    """
    shape = rays.origins.shape[:-1]
    if rays.origins.shape != rays.directions.shape or rays.origins.shape[-1:] != (3,):
        found = f"{tuple(rays.origins.shape)} and {tuple(rays.directions.shape)}"
        raise ValueError(f"origins and directions are {found}; give two tensors [..., 3] of one shape")
    origins, directions = rays.origins.reshape(-1, 3), rays.directions.reshape(-1, 3)
    if background is not None and background.dim() > 1:
        background = background.expand(*shape, -1).reshape(-1, background.shape[-1])

    def part(begin: int, end: int) -> Rendered:
        behind = background[begin:end] if background is not None and background.dim() > 1 else background
        # Steps are numbered from the chunk's first ray; another seed keeps two chunks from jittering alike.
        moved = None if seed is None else seed + begin
        given = origins[begin:end], directions[begin:end], sampling, behind, early_stop, normals, distortion
        return _render(field, *given, moved, first_ray)

    if chunk is None:
        found = part(0, len(origins))
    else:
        if chunk < 1:
            raise ValueError(f"chunk={chunk}; give the number of rays to render at once, at least 1")
        with torch.no_grad():
            parts = [part(i, min(i + chunk, len(origins))) for i in range(0, max(1, len(origins)), chunk)]
        *images, counts = zip(*parts, strict=True)
        found = Rendered._make([*(None if x[0] is None else torch.cat(x) for x in images), torch.stack(counts).sum()])
    images = (x if x is None else x.reshape((*shape, *x.shape[1:])) for x in found[:-1])
    return Rendered._make([*images, found.count])


def _render(field, origins, directions, sampling, background, early_stop, normals, distortion, seed, first) -> Rendered:
    def ask(steps: Intervals, normals: bool) -> tuple[Tensor, Tensor]:
        """Density and radiance at the middle of each step, shaped like the steps."""
        sigma, radiance = _answer(field, *_places(origins, directions, steps), normals)
        return sigma.reshape(steps.t_start.shape), radiance.reshape(*steps.t_start.shape, radiance.shape[-1])

    steps = sampling(origins, directions, lambda steps: ask(steps, False)[0], seed, first)
    sigma, radiance = ask(steps, normals)
    if normals and background is not None:
        background = torch.cat([background, background.new_zeros(*background.shape[:-1], NORMAL_CHANNELS)], dim=-1)
    seen = ops.composite(
        sigma,
        radiance,
        steps.t_start,
        steps.t_end,
        steps.ray_offsets,
        background=background,
        early_stop=early_stop,
        distortion=distortion,
    )
    color, facing = seen.color, None
    if normals:
        color, facing = color[:, :-NORMAL_CHANNELS], color[:, -NORMAL_CHANNELS:]
    return Rendered(color, seen.depth, seen.opacity, facing, seen.distortion, steps.count)


def _places(origins: Tensor, directions: Tensor, steps: Intervals) -> tuple[Tensor, Tensor]:
    """Positions at the middle of each step and the directions there, [M, 3] each."""
    middle = ((steps.t_start + steps.t_end) / 2)[..., None]
    if steps.ray is None:
        along = directions[:, None].expand(-1, middle.shape[1], -1)
        positions = origins[:, None] + middle * along
    else:
        along = directions.index_select(0, steps.ray)
        positions = origins.index_select(0, steps.ray) + middle * along
    return positions.reshape(-1, 3), along.reshape(-1, 3)


def _answer(field: Field, positions: Tensor, along: Tensor, normals: bool) -> tuple[Tensor, Tensor]:
    """Density [M] and radiance [M, C], with normals after the radiance's channels where they are wanted."""
    if not normals:
        return _checked(*field(positions, along), len(positions))
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if not positions.requires_grad:
            positions = positions.detach().requires_grad_()
        sigma, radiance = _checked(*field(positions, along), len(positions))
        if sigma.requires_grad:
            (slope,) = torch.autograd.grad(sigma.sum(), positions, create_graph=graph, retain_graph=graph)
        else:
            slope = torch.zeros_like(positions)  # a density that is the same everywhere
        facing = -torch.nn.functional.normalize(slope, dim=-1, eps=1e-10)
        answer = sigma, torch.cat([radiance, facing.to(radiance.dtype)], dim=-1)
    return answer if graph else (answer[0].detach(), answer[1].detach())


def _checked(sigma: Tensor, radiance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if sigma.shape not in ((count,), (count, 1)) or radiance.dim() != 2 or len(radiance) != count:
        found = f"density {tuple(sigma.shape)} and radiance {tuple(radiance.shape)}"
        wanted = f"[{count}] and [{count}, channels]"
        raise ValueError(f"the field answered {found} to {count} points; it must answer {wanted}")
    return sigma.reshape(count), radiance
