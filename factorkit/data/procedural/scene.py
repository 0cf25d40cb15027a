"""A procedural scene seen from all sides: posed views that ship with the package, so that everything runs without a
download.

Objects are signed distances with a colour, turned into density by a soft step, and rendered with the package's own
volume rendering. All of it lies inside the box from -1 to 1 that :data:`LOWER` and :data:`UPPER` name; z is up.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from factorkit.data.views.views import Views, resize_area
from factorkit.rendering import OccupancyGrid, OccupancySampling, Rays, image_rays, intrinsics_from_fov, look_at, render
from factorkit.utils.errors import ConfigError

LOWER, UPPER = (-1.0, -1.0, -1.0), (1.0, 1.0, 1.0)
SOFTNESS = 0.012  # of every surface, in units of length
STEP = 0.02  # between the places asked along a ray
OVERSAMPLING = 2
AMBIENT, LIGHT = 0.55, (0.37, 0.23, 0.9)

Shape = tuple[str, tuple[float, ...], tuple[float, ...], tuple[float, float, float]]  # kind, centre, sizes, colour

# A workshop table: a slab with things of different shapes, colours and heights, none of them repeated by any turn.
TABLE: tuple[Shape, ...] = (
    ("box", (0.0, 0.0, -0.5), (0.72, 0.46, 0.1), (0.62, 0.60, 0.55)),
    ("box", (-0.48, 0.05, -0.12), (0.2, 0.28, 0.3), (0.85, 0.16, 0.12)),
    ("ball", (0.42, 0.24, -0.12), (0.28,), (0.12, 0.35, 0.88)),
    ("rod", (0.55, -0.3, -0.05), (0.1, 0.46), (0.10, 0.62, 0.22)),
    ("ball", (-0.42, -0.02, 0.42), (0.2,), (0.96, 0.80, 0.12)),
    ("box", (0.0, -0.36, -0.28), (0.2, 0.08, 0.14), (0.70, 0.22, 0.78)),
)
# A wagon that a half turn takes into itself, but for a lamp at its front.
WAGON: tuple[Shape, ...] = (
    ("box", (0.0, 0.0, -0.12), (0.78, 0.34, 0.16), (0.28, 0.40, 0.76)),
    ("box", (0.0, 0.0, 0.16), (0.42, 0.30, 0.16), (0.55, 0.66, 0.82)),
    *(("ball", (x, y, -0.3), (0.17,), (0.10, 0.10, 0.12)) for x in (0.5, -0.5) for y in (0.34, -0.34)),
)
LAMP: Shape = ("box", (0.8, 0.0, -0.1), (0.05, 0.2, 0.07), (0.95, 0.90, 0.45))


def make_procedural_views(
    count: int,
    size: int = 32,
    *,
    seed: int = 0,
    symmetric: bool = False,
    elevations: tuple[float, float] = (5.0, 65.0),
    radius: float = 4.0,
    fov: float = 35.0,
) -> Views:
    """Views of the shipped scene on white from cameras all around it that look at the origin, with their exact poses.

    The cameras' azimuths are even but for a jitter and in random order; their elevations are drawn evenly over the
    sphere between the bounds. Both depend on (count, seed) alone, the scene on nothing.

    Args:
        count: views V.
        size: pixels a side.
        seed: of the cameras.
        symmetric: a scene that looks the same after half a turn about z but for one small lamp, instead of one without
            any symmetry.
        elevations: lowest and highest, degrees above the horizon, within -85 and 85.
        radius: distance of the cameras from the origin, at least 2.
        fov: field of view in degrees.

    Returns:
        Views of `count` images [V, 3, size, size] with masks, poses, intrinsics, near and far.

    Raises:
        ConfigError: settings other than these.
    """
    low, high = elevations
    if count < 1 or size < 1 or seed < 0:
        raise ConfigError(f"count={count}, size={size}, seed={seed}: count and size are 1 or more, seed 0 or more")
    if not -85 <= low <= high <= 85 or radius < 2 or not 0 < fov < 180:
        raise ConfigError(
            f"elevations={elevations}, radius={radius}, fov={fov}: elevations lie within -85 and 85, the lower first, "
            "the radius is at least 2 and the field of view between 0 and 180 degrees"
        )
    poses = _cameras(count, seed, low, high, radius)
    intrinsics = intrinsics_from_fov(fov, size, size).expand(count, 3, 3).clone()
    images, masks = _pictures(poses, intrinsics, size, symmetric)
    reach = math.sqrt(3.0)
    return Views(
        images=images,
        masks=masks,
        poses=poses,
        intrinsics=intrinsics,
        near=radius - reach,
        far=radius + reach,
        names=[f"view_{i:03d}" for i in range(count)],
        background=torch.ones(3),
    )


def make_scene_field(symmetric: bool = False):
    """The scene itself: a field as :func:`factorkit.render` takes it, positions [M, 3] and directions [M, 3] to density
    [M] and radiance [M, 3]."""
    shapes = (*WAGON, LAMP) if symmetric else TABLE
    colors = torch.tensor([shape[3] for shape in shapes])
    light = torch.nn.functional.normalize(torch.tensor(LIGHT), dim=0)

    def field(positions: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        distances, normals = zip(*(_distance(shape, positions) for shape in shapes), strict=True)
        nearest, which = torch.stack(distances, dim=1).min(dim=1)
        # A logistic step (Yariv et al. 2021 take the Laplace distribution's): opaque within a few times the softness.
        density = 4 / SOFTNESS * torch.sigmoid(-nearest / SOFTNESS)
        normal = torch.stack(normals, dim=1)[torch.arange(len(positions)), which]
        shade = AMBIENT + (1 - AMBIENT) * (normal @ light).clamp_min(0)
        return density, colors[which] * shade[:, None]

    return field


def _distance(shape: Shape, p: Tensor) -> tuple[Tensor, Tensor]:
    """Signed distance [M] to a shape, negative inside, and its direction of steepest rise [M, 3]."""
    kind, centre, sizes, _ = shape
    p = p - p.new_tensor(centre)
    if kind == "ball":
        reach = p.norm(dim=1).clamp_min(1e-9)
        return reach - sizes[0], p / reach[:, None]
    if kind == "rod":  # standing: radius, half of its height
        flat = torch.cat([p[:, :2], torch.zeros_like(p[:, :1])], dim=1)
        reach = flat.norm(dim=1).clamp_min(1e-9)
        side, end = reach - sizes[0], p[:, 2].abs() - sizes[1]
        upright = torch.nn.functional.pad(p[:, 2:].sign(), (2, 0))
        return torch.maximum(side, end), torch.where((side > end)[:, None], flat / reach[:, None], upright)
    distance, axis = (p.abs() - p.new_tensor(sizes)).max(dim=1)
    return distance, torch.nn.functional.one_hot(axis, 3) * p.sign()


def _cameras(count: int, seed: int, low: float, high: float, radius: float) -> Tensor:
    """Poses [count, 4, 4]."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(2, count, generator=generator)
    azimuth = (torch.arange(count) + draw[0]) * (2 * math.pi / count)
    bottom, top = math.sin(math.radians(low)), math.sin(math.radians(high))
    height = bottom + draw[1] * (top - bottom)
    flat = (1 - height**2).sqrt()
    eye = radius * torch.stack([azimuth.cos() * flat, azimuth.sin() * flat, height], dim=1)
    order = torch.randperm(count, generator=generator)
    return look_at(eye[order], torch.zeros(3), torch.tensor([0.0, 0.0, 1.0]))


@torch.no_grad()
def _pictures(poses: Tensor, intrinsics: Tensor, size: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Images [V, 3, size, size] over white and opacities [V, 1, size, size], pixels averaged over finer ones."""
    field, sampling = make_scene_field(symmetric), OccupancySampling(_occupied(symmetric), step=STEP)
    fine = size * OVERSAMPLING
    scale = torch.tensor([OVERSAMPLING, OVERSAMPLING, 1.0])[:, None]
    images, masks = [], []
    for pose, k in zip(poses, intrinsics * scale, strict=True):
        rays: Rays = image_rays(pose, k, fine, fine)
        seen = render(field, rays, sampling, background=torch.ones(3), early_stop=1e-4, chunk=1 << 16)
        images.append(resize_area(seen.color.permute(2, 0, 1), size, size).clamp(0, 1))
        masks.append(resize_area(seen.opacity[None], size, size).clamp(0, 1))
    return torch.stack(images), torch.stack(masks)


@lru_cache
def _occupied(symmetric: bool) -> OccupancyGrid:
    grid = OccupancyGrid(LOWER, UPPER, resolution=64, threshold=0.02)
    field = make_scene_field(symmetric)
    for _ in range(4):
        grid.update(lambda points: field(points, points)[0])
    return grid
