"""Camera model and rendering: every image and every loss of nerfdiff goes through this file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from factorkit.nerfdiff.fields.base import Field, ImageField
from factorkit.rendering import (
    OccupancySampling,
    Rays,
    Rendered,
    UnboundedSampling,
    UniformSampling,
    from_ndc,
    image_rays,
    ndc_rays,
    pixel_rays,
    render,
)
from factorkit.rendering.sampling import Sampling
from factorkit.utils.errors import ConfigError

NDC_MARGIN = 1.3  # lateral size of a forward-facing scene's box, relative to the mean camera's view
MAX_SAMPLES_PER_CHUNK = 1 << 20  # evaluated at once without gradient
RADIAL_ITERATIONS = 4  # of Newton's method, which squares the error of a few percent each time


@dataclass(frozen=True)
class CameraModel:
    """What all cameras of a scene share, and their intrinsics where they differ.

    Attributes:
        intrinsics: [3, 3], in units of the image's width and height; of an image that contains those of all views.
        background: [3], the colour behind the scene; unused if the field has its own background.
        forward_facing: whether the field's box is the space in front of the cameras, in normalised device coordinates
            (NDC), instead of a volume they surround.
        view_intrinsics: [V, 3, 3] of the training views if they differ, or None.
    """

    intrinsics: Tensor
    background: Tensor
    forward_facing: bool = False
    view_intrinsics: Tensor | None = None

    def of_views(self, rows: Tensor | slice = slice(None)) -> Tensor | None:
        """Return the intrinsics [B, 3, 3] of some training views; None if they are those of all."""
        return None if self.view_intrinsics is None else self.view_intrinsics[rows]

    def to(self, device: torch.device) -> CameraModel:
        """Return the camera model on a device."""
        own = None if self.view_intrinsics is None else self.view_intrinsics.to(device)
        return replace(
            self, intrinsics=self.intrinsics.to(device), background=self.background.to(device), view_intrinsics=own
        )

    def with_intrinsics(self, intrinsics: Tensor) -> CameraModel:
        """Return the camera model with optimised intrinsics; the focal lengths of the views change likewise."""
        own = self.view_intrinsics
        if own is not None:
            change = intrinsics.diagonal() / self.intrinsics.diagonal() - 1
            own = own + torch.diag_embed(own.diagonal(dim1=1, dim2=2) * change)
        return replace(self, intrinsics=intrinsics, view_intrinsics=own)

    def pixel_intrinsics(self, height: int, width: int, own: Tensor | None = None) -> Tensor:
        """Return the intrinsics in pixels for an image size: ``own`` [..., 3, 3], or those of all views."""
        intrinsics = self.intrinsics if own is None else own
        x, y, last = intrinsics.unbind(-2)
        return torch.stack([x * width, y * height, last], dim=-2)

    def with_image_shape(self, trained: tuple[int, int], size: tuple[int, int]) -> CameraModel:
        """Return the camera model for images of another aspect ratio, with square pixels if the trained ones are.

        Args:
            trained: height and width of the training views.
            size: height and width of the new images, which show more or less to the left and right.

        Raises:
            ConfigError: the aspect ratio of a forward-facing scene cannot change, since its box depends on it.
        """
        if same_aspect_ratio(trained, size):
            return self
        if self.forward_facing:
            raise ConfigError(f"size={size}: a forward-facing scene needs the shape of {trained}; give one number")
        intrinsics = self.intrinsics.clone()
        ratio = (trained[1] / trained[0]) / (size[1] / size[0])
        intrinsics[0, 0] *= ratio
        intrinsics[0, 2] = 0.5 + (intrinsics[0, 2] - 0.5) * ratio
        return replace(self, intrinsics=intrinsics)

    def to_ndc(self, rays: Rays, size: tuple[int, int]) -> Rays:
        """Return world rays in the space of the field's box; they start at the near plane or at a camera beyond it."""
        if not self.forward_facing:
            return rays
        ndc = ndc_rays(rays, self.pixel_intrinsics(*size).to(rays.origins), *size)
        skipped = 1 - 1 / start_depth(rays.origins)[..., None]
        origins = ndc.origins + skipped * ndc.directions
        return Rays(*(torch.cat([x[..., :2] * (1 / NDC_MARGIN), x[..., 2:]], -1) for x in (origins, ndc.directions)))

    @property
    def box_scale(self) -> Tensor | None:
        """The coordinates [2] in the box of a forward-facing scene at a slope of 1 to the viewing axis, or None."""
        return 2 / NDC_MARGIN * self.intrinsics.detach().diagonal()[:2] if self.forward_facing else None

    def from_ndc(self, positions: Tensor) -> Tensor:
        """Return world coordinates [..., 3] of positions in the field's box; its far wall is at infinity."""
        if not self.forward_facing:
            return positions
        ndc = positions * positions.new_tensor([NDC_MARGIN, NDC_MARGIN, 1.0])
        return from_ndc(ndc, self.intrinsics.to(positions), 1, 1)


def same_aspect_ratio(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether two sizes (height, width) have one aspect ratio, up to rounding to whole pixels."""
    (height, width), (other_height, other_width) = one, other
    return abs(height * other_width - width * other_height) <= max(*one, *other)


def limit_depth(upper: Sequence[float], far: float, camera: CameraModel) -> tuple[float, ...]:
    """Return the box's upper corner, in forward-facing scenes without what is deeper than ``far`` near-plane depths."""
    return (*upper[:2], min(upper[2], 1 - 2 / far)) if camera.forward_facing else tuple(upper)


def start_depth(origins: Tensor) -> Tensor:
    """Return the depth [...] at which rays of a forward-facing scene start: the near plane at 1, or their camera."""
    return (-origins[..., 2]).clamp_min(1.0)


def build_sampling(field: Field, samples: int, forward_facing: bool = False) -> Sampling:
    """Build sampling with ``samples`` steps through the scene, only in occupied cells if the field has a grid."""
    if getattr(field, "unbounded", False):
        return UnboundedSampling(samples)
    grid = getattr(field, "occupancy", None)
    if grid is None:
        return UniformSampling((-1.0,) * 3, (1.0,) * 3, samples)
    return OccupancySampling(grid, step=(1.0 if forward_facing else 2.0) / samples)  # NDC rays cross the box at t = 1


def render_pixels(
    field: Field,
    poses: Tensor,
    camera: CameraModel,
    pixels: Tensor,
    size: tuple[int, int],
    samples: int,
    seed: int | Tensor | None = None,
    views: Tensor | None = None,
    first_ray: int = 0,
    intrinsics: Tensor | None = None,
    straighten: Callable[[Tensor], Tensor] | None = None,
) -> Rendered:
    """Render some pixels with gradient: colour [B, R, 3], depth and opacity [B, R].

    Args:
        poses: camera-to-world, [B, 4, 4].
        pixels: indices [B, R], row by row.
        size: height and width of the image.
        seed: jitters the samples; None places them evenly.
        views: indices [B] of the training views whose appearance to apply; None: the mean appearance.
        first_ray: number of the first ray among those of all processes and micro-batches; it selects the jitter.
        intrinsics: of each pose, [B, 3, 3], in units of width and height; None: those of the camera model.
        straighten: from image points [B, R, 2] to those of images without distortion; None: there is none, as always
            where whole images are drawn.
    """
    height, width = size
    if isinstance(field, ImageField):
        image = rasterize_views(field, poses, camera, size, intrinsics)
        index = pixels[..., None]
        color = image.color.flatten(1, 2).gather(1, index.expand(-1, -1, image.color.shape[-1]))
        depth, opacity = (x.flatten(1).gather(1, pixels) for x in (image.depth, image.opacity))
        rendered = image._replace(color=color, depth=depth, opacity=opacity)
        return rendered._replace(color=apply_appearance(field, rendered, camera, views))
    points = (torch.stack([pixels % width, pixels // width], dim=-1) + 0.5).to(poses.dtype)
    points = points if straighten is None else straighten(points)
    rays = pixel_rays(poses, camera.pixel_intrinsics(height, width, intrinsics), points)
    background = background_colors(field, rays.directions, camera)
    sampling = build_sampling(field, samples, camera.forward_facing)
    rendered = render(field, camera.to_ndc(rays, size), sampling, background=background, seed=seed, first_ray=first_ray)
    return rendered._replace(color=apply_appearance(field, rendered, camera, views))


def straighten_points(points: Tensor, intrinsics: Tensor, term: Tensor) -> Tensor:
    """Return where image points [..., P, 2] would be without a radial term of the lens; differentiable.

    A point x, in units of the focal length from the principal point, is seen at x (1 + term |x|^2).

    Args:
        intrinsics: [..., 3, 3] in pixels.
        term: of r^2.
    """
    focal, centre = intrinsics.diagonal(dim1=-2, dim2=-1)[..., None, :2], intrinsics[..., None, :2, 2]
    scaled = (points - centre) / focal
    amount = term * scaled.square().sum(-1, keepdim=True)
    factor = torch.ones_like(amount)
    for _ in range(RADIAL_ITERATIONS):  # factor (1 + amount factor^2) = 1
        factor = factor - (factor + amount * factor**3 - 1) / (1 + 3 * amount * factor**2)
    return scaled * factor * focal + centre


@torch.no_grad()
def sample_surface(
    field: Field, poses: Tensor, camera: CameraModel, size: tuple[int, int], samples: int, count: int, seed: int
) -> Tensor:
    """Return what random pixels of the training views show: positions [count, 3] at the mean depth of their rays.

    The arguments are those of :func:`render_pixels`, with the poses of all training views.
    """
    generator, shape = torch.Generator().manual_seed(seed), (len(poses), -(-count // len(poses)))
    pixels = torch.randint(0, size[0] * size[1], shape, generator=generator).to(poses.device)
    own = camera.of_views()
    rendered = render_pixels(field, poses, camera, pixels, size, samples, intrinsics=own)
    points = torch.stack([pixels % size[1], pixels // size[1]], dim=-1) + 0.5
    rays = pixel_rays(poses, camera.pixel_intrinsics(*size, own), points.to(poses.dtype))
    depth = rendered.depth / rendered.opacity.clamp_min(1e-6)
    return (rays.origins + depth[..., None] * rays.directions).flatten(0, 1)[:count]


@torch.no_grad()
def render_views(
    field: Field,
    poses: Tensor,
    camera: CameraModel,
    size: tuple[int, int],
    samples: int,
    views: Tensor | None = None,
    intrinsics: Tensor | None = None,
) -> Rendered:
    """Render whole images without gradient: colour [..., H, W, 3], depth and opacity [..., H, W].

    The arguments are those of :func:`render_pixels`, with poses [..., 4, 4] and intrinsics that broadcast with them.
    """
    if isinstance(field, ImageField):
        rendered = rasterize_views(field, poses.reshape(-1, 4, 4), camera, size, intrinsics, poses.shape[:-2])
        return rendered._replace(color=apply_appearance(field, rendered, camera, views))
    rays = image_rays(poses, camera.pixel_intrinsics(*size, intrinsics), *size)
    background = background_colors(field, rays.directions, camera)
    sampling = build_sampling(field, samples, camera.forward_facing)
    chunk = max(1, MAX_SAMPLES_PER_CHUNK // samples)
    rendered = render(field, camera.to_ndc(rays, size), sampling, background=background, chunk=chunk)
    rendered = rendered._replace(color=apply_appearance(field, rendered, camera, views))
    if not camera.forward_facing:
        return rendered
    # In NDC, t grows by 1 from the near plane to infinity while 1 / depth falls from 1 to 0.
    expected_t = rendered.depth / rendered.opacity.clamp_min(1e-6)
    inverse_depth = (1 / start_depth(rays.origins) - expected_t).clamp(1e-3, 1)
    return rendered._replace(depth=rendered.opacity / inverse_depth)


def rasterize_views(
    field: ImageField,
    poses: Tensor,
    camera: CameraModel,
    size: tuple[int, int],
    intrinsics: Tensor | None,
    shape: Sequence[int] | None = None,
) -> Rendered:
    """Draw whole images of poses [B, 4, 4], with background, as [*shape, H, W]; shape None: [B, H, W].

    Images smaller than those that the field was fitted to are drawn larger and averaged: its blur is in pixels.
    """
    shape = poses.shape[:1] if shape is None else shape
    factor = max(1, round(field.side / max(size)))
    size = (factor * size[0], factor * size[1])
    lens = camera.pixel_intrinsics(*size, intrinsics).expand(*shape, 3, 3).reshape(-1, 3, 3)
    images = []
    for pose, own in zip(poses, lens, strict=True):
        drawn = field.rasterize(pose, own, size)
        behind = camera.background
        if field.background is not None:
            behind = field.background(image_rays(pose, own, *size).directions)
        color = drawn.color + (1 - drawn.opacity[..., None]) * behind
        images.append([average_blocks(x, factor) for x in (color, drawn.depth, drawn.opacity)])
    color, depth, opacity = (torch.stack(x).reshape(*shape, *x[0].shape) for x in zip(*images, strict=True))
    return Rendered(color, depth, opacity, None, None, torch.tensor(len(images), device=color.device))


def average_blocks(image: Tensor, side: int) -> Tensor:
    """Return the means of an image [H, W, ...] over blocks of side x side pixels."""
    return image if side == 1 else image.unflatten(1, (-1, side)).unflatten(0, (-1, side)).mean((1, 3))


def background_colors(field: Field, directions: Tensor, camera: CameraModel) -> Tensor:
    """Return the background [..., 3] along unit directions [..., 3], or the camera model's one colour [3]."""
    background = getattr(field, "background", None)
    return camera.background if background is None else background(directions)


def apply_appearance(field: Field, rendered: Rendered, camera: CameraModel, views: Tensor | None) -> Tensor:
    """Return the rendered colour with the appearance of training views [B]; a fixed background keeps its colour."""
    appearance = getattr(field, "appearance", None)
    if appearance is None or views is None:
        return rendered.color
    if field.background is not None:
        learned: Tensor = appearance(views, rendered.color, 1.0)
        return learned
    fixed = (1 - rendered.opacity)[..., None] * camera.background
    scene: Tensor = appearance(views, rendered.color - fixed, rendered.opacity)
    return scene + fixed
