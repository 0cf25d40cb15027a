"""Rays of a scene's cameras and what they see; every picture and every loss of nerfdiff is made here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from factorkit.nerfdiff.fields.grid import Field
from factorkit.rendering import (
    OccupancySampling,
    Rays,
    Rendered,
    UniformSampling,
    from_ndc,
    image_rays,
    ndc_rays,
    pixel_rays,
    render,
)
from factorkit.utils.errors import ConfigError

MARGIN = 1.3  # how much more of a forward-facing scene the box holds, sideways, than the mean camera sees
PIECE = 1 << 20  # places asked at once without gradient


@dataclass(frozen=True)
class Optics:
    """What all cameras of a scene share.

    Attributes:
        intrinsics: [3, 3] in units of the image's width and height.
        background: [3], the colour behind everything, unless the field has a background of its own.
        forward: whether the box is the space before the cameras, out to infinity, instead of something they stand
            around.
    """

    intrinsics: Tensor
    background: Tensor
    forward: bool = False

    def pixels(self, height: int, width: int) -> Tensor:
        """The intrinsics in pixels of pictures of this size."""
        return self.intrinsics * self.intrinsics.new_tensor([width, height, 1.0])[:, None]

    def shaped(self, taken: tuple[int, int], size: tuple[int, int]) -> Optics:
        """The optics of pictures of ``size`` whose pixels are as wide as high where those of pictures of ``taken`` are:
        these themselves, or with more or less to be seen to the left and right.

        Raises:
            ConfigError: another shape of pictures of a forward-facing scene, whose box is made after theirs.
        """
        if same_shape(taken, size):
            return self
        if self.forward:
            raise ConfigError(f"size={size}: those of a forward-facing scene have the shape of {taken}; give a number")
        intrinsics = self.intrinsics.clone()
        narrower = (taken[1] / taken[0]) / (size[1] / size[0])
        intrinsics[0, 0] *= narrower
        intrinsics[0, 2] = 0.5 + (intrinsics[0, 2] - 0.5) * narrower
        return replace(self, intrinsics=intrinsics)

    def bent(self, rays: Rays, size: tuple[int, int]) -> Rays:
        """The rays in the space of the field's box, from the nearest plane on, or from where they begin beyond it."""
        if not self.forward:
            return rays
        bent = ndc_rays(rays, self.pixels(*size).to(rays.origins), *size)
        narrow = rays.origins.new_tensor([1 / MARGIN, 1 / MARGIN, 1.0])
        passed = 1 - 1 / reached(rays.origins)[..., None]
        origins = bent.origins + passed * bent.directions
        return Rays(origins * narrow, bent.directions * narrow)

    def unbent(self, places: Tensor) -> Tensor:
        """World coordinates [..., 3] of places in the field's box; what lies at its far wall is at infinity."""
        if not self.forward:
            return places
        wide = places * places.new_tensor([MARGIN, MARGIN, 1.0])
        return from_ndc(wide, self.intrinsics.to(places), 1, 1)


def same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether heights and widths have one ratio, but for whole pixels."""
    (height, width), (high, wide) = one, other
    return abs(height * wide - width * high) <= max(*one, *other)


def within(upper: Sequence[float], far: float, optics: Optics) -> tuple[float, ...]:
    """The box's upper corner, before forward-facing cameras drawn nearer to leave out what is deeper than ``far``."""
    return (*upper[:2], min(upper[2], 1 - 2 / far)) if optics.forward else tuple(upper)


def reached(origins: Tensor) -> Tensor:
    """How far ahead [...] rays of a forward-facing scene begin: at the nearest plane, 1, or where their camera is."""
    return (-origins[..., 2]).clamp_min(1.0)


def sampling(field: Field, samples: int, forward: bool = False) -> UniformSampling | OccupancySampling:
    """So many steps through the box; as long ones, where there is anything, if the field knows where."""
    grid = getattr(field, "occupancy", None)
    if grid is None:
        return UniformSampling((-1.0,) * 3, (1.0,) * 3, samples)
    return OccupancySampling(grid, step=(1.0 if forward else 2.0) / samples)  # bent rays cross the box within t = 1


def render_pixels(
    field: Field,
    poses: Tensor,
    optics: Optics,
    pixels: Tensor,
    size: tuple[int, int],
    samples: int,
    seed: int | None = None,
    views: Tensor | None = None,
    first: int = 0,
) -> Rendered:
    """What is seen, colour [B, R, 3] and opacity [B, R], at pixels [B, R] (numbered row by row) of pictures of ``size``
    from poses [B, 4, 4].

    Args:
        seed: moves the steps along rays at random; None leaves them in place.
        views: whose tones the colours are to have, indices [B] of training views; None: the mean one.
        first: number of the first ray among those of all processes and micro-batches, whose steps move differently.
    """
    height, width = size
    place = torch.stack([pixels % width, pixels // width], dim=-1) + 0.5
    rays = pixel_rays(poses, optics.pixels(height, width), place.to(poses.dtype))
    behind = backdrop(field, rays.directions, optics)
    how = sampling(field, samples, optics.forward)
    seen = render(field, optics.bent(rays, size), how, background=behind, seed=seed, first_ray=first)
    return seen._replace(color=toned(field, seen, optics, views))


@torch.no_grad()
def render_views(
    field: Field, poses: Tensor, optics: Optics, size: tuple[int, int], samples: int, views: Tensor | None = None
) -> Rendered:
    """Pictures from poses [..., 4, 4] without gradient: colour [..., H, W, 3], depth, opacity [..., H, W].

    Args:
        views: as :func:`render_pixels` takes them, [B] for poses [B, 4, 4].
    """
    rays = image_rays(poses, optics.pixels(*size), *size)
    behind = backdrop(field, rays.directions, optics)
    how = sampling(field, samples, optics.forward)
    seen = render(field, optics.bent(rays, size), how, background=behind, chunk=max(1, PIECE // samples))
    seen = seen._replace(color=toned(field, seen, optics, views))
    if not optics.forward:
        return seen
    # along a bent ray t grows by 1 from the nearest plane to infinity, as 1 / depth falls from 1 to 0
    inverse = (1 / reached(rays.origins) - seen.depth / seen.opacity.clamp_min(1e-6)).clamp(1e-3, 1)
    return seen._replace(depth=seen.opacity / inverse)


def backdrop(field: Field, directions: Tensor, optics: Optics) -> Tensor:
    """The colours [..., 3] behind everything along directions [..., 3] of length one, or the one colour [3] given."""
    own = getattr(field, "background", None)
    return optics.background if own is None else own(directions)


def toned(field: Field, seen: Rendered, optics: Optics, views: Tensor | None) -> Tensor:
    """The colours [B, ..., 3] in the tones of these views [B]. A background that was given is as it was given."""
    tone = getattr(field, "appearance", None)
    if tone is None or views is None:
        return seen.color
    if field.background is not None:
        return tone(views, seen.color, 1.0)
    fixed = (1 - seen.opacity)[..., None] * optics.background
    return tone(views, seen.color - fixed, seen.opacity) + fixed
