"""A procedural scene: posed views of a built-in scene, so that everything runs without a download.

Objects are signed distances with a colour, converted to density by a soft step and rendered with the package's own
volume rendering. The scene lies inside the box from `LOWER` to `UPPER`; z is up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot, pad

from factorkit.data.views.views import Views, resize_area
from factorkit.rendering import OccupancyGrid, OccupancySampling, image_rays, intrinsics_from_fov, look_at, render
from factorkit.utils.errors import ConfigError

LOWER, UPPER = (-1.0, -1.0, -1.0), (1.0, 1.0, 1.0)
SOFTNESS = 0.012  # width of every surface, in scene units
STEP = 0.02  # distance between samples along a ray
OVERSAMPLING = 2
AMBIENT, LIGHT_DIRECTION = 0.55, (0.37, 0.23, 0.9)
MAX_ELEVATION = 85  # degrees; `look_at` is undefined at the poles
MIN_RADIUS = 2  # smaller, the cameras may be inside the box

Shape = tuple[str, tuple[float, ...], tuple[float, ...], tuple[float, float, float]]  # kind, centre, sizes, colour

# A table: a slab with objects of different shapes, colours and heights, without any symmetry.
TABLE: tuple[Shape, ...] = (
    ("box", (0.0, 0.0, -0.5), (0.72, 0.46, 0.1), (0.62, 0.60, 0.55)),
    ("box", (-0.48, 0.05, -0.12), (0.2, 0.28, 0.3), (0.85, 0.16, 0.12)),
    ("ball", (0.42, 0.24, -0.12), (0.28,), (0.12, 0.35, 0.88)),
    ("rod", (0.55, -0.3, -0.05), (0.1, 0.46), (0.10, 0.62, 0.22)),
    ("ball", (-0.42, -0.02, 0.42), (0.2,), (0.96, 0.80, 0.12)),
    ("box", (0.0, -0.36, -0.28), (0.2, 0.08, 0.14), (0.70, 0.22, 0.78)),
)
# A wagon with a half-turn symmetry except for a lamp at its front.
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
    """Render views of the built-in scene on white, from cameras around it that look at the origin.

    Azimuths are evenly spaced with jitter, in random order; elevations are uniform on the sphere between the bounds.
    Both depend only on (count, seed); the scene is fixed.

    Args:
        count: number of views V.
        size: side of the images in pixels.
        seed: seed of the cameras.
        symmetric: use a scene that looks the same after half a turn about z, except for a small lamp; by default a
            scene without symmetry.
        elevations: lowest and highest elevation, in degrees, within -85 and 85.
        radius: distance of the cameras from the origin, at least 2.
        fov: field of view in degrees.

    Returns:
        Views with images [V, 3, size, size], masks, poses, intrinsics, near and far.

    Raises:
        ConfigError: an argument out of range.
    """
    low, high = elevations
    if count < 1 or size < 1 or seed < 0:
        raise ConfigError(f"count={count}, size={size}, seed={seed}: count and size must be 1 or more, seed 0 or more")
    if not -MAX_ELEVATION <= low <= high <= MAX_ELEVATION or radius < MIN_RADIUS or not 0 < fov < 180:
        raise ConfigError(
            f"elevations={elevations}, radius={radius}, fov={fov}: need -85 <= lowest <= highest <= 85, radius >= 2, "
            "and 0 < fov < 180"
        )
    poses = _sample_poses(count, seed, low, high, radius)
    intrinsics = intrinsics_from_fov(fov, size, size).expand(count, 3, 3).clone()
    images, masks = _render(poses, intrinsics, size, symmetric)
    extent = math.sqrt(3.0)  # half of the box's diagonal
    return Views(
        images=images,
        masks=masks,
        poses=poses,
        intrinsics=intrinsics,
        near=radius - extent,
        far=radius + extent,
        names=[f"view_{i:03d}" for i in range(count)],
        background=torch.ones(3),
    )


def make_scene_field(
    symmetric: bool = False, light_direction: Sequence[float] | Tensor = LIGHT_DIRECTION
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the scene, lit from a direction [3], as a field for :func:`factorkit.rendering.render`.

    It maps positions [M, 3] and directions [M, 3] to density [M] and radiance [M, 3].
    """
    shapes = (*WAGON, LAMP) if symmetric else TABLE
    colors = torch.tensor([shape[3] for shape in shapes])
    light = normalize(torch.as_tensor(light_direction), dim=0)

    def field(positions: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        distances, normals = zip(*(signed_distance(shape, positions) for shape in shapes), strict=True)
        distance, index = torch.stack(distances, dim=1).min(dim=1)
        # A logistic step, where Yariv et al. 2021 use the Laplace distribution's.
        density = 4 / SOFTNESS * torch.sigmoid(-distance / SOFTNESS)
        normal = torch.stack(normals, dim=1)[torch.arange(len(positions)), index]
        shade = AMBIENT + (1 - AMBIENT) * (normal @ light).clamp_min(0)
        return density, colors[index] * shade[:, None]

    return field


def signed_distance(shape: Shape, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the signed distance [M] of points [M, 3] to a shape, negative inside, and its gradient [M, 3]."""
    kind, centre, sizes, _ = shape
    p = points - points.new_tensor(centre)
    if kind == "ball":
        norm = p.norm(dim=1).clamp_min(1e-9)
        return norm - sizes[0], p / norm[:, None]
    if kind == "rod":  # vertical; sizes are the radius and half of the height
        flat = torch.cat([p[:, :2], torch.zeros_like(p[:, :1])], dim=1)
        norm = flat.norm(dim=1).clamp_min(1e-9)
        side, end = norm - sizes[0], p[:, 2].abs() - sizes[1]
        vertical = pad(p[:, 2:].sign(), (2, 0))
        return torch.maximum(side, end), torch.where((side > end)[:, None], flat / norm[:, None], vertical)
    distance, axis = (p.abs() - p.new_tensor(sizes)).max(dim=1)
    return distance, one_hot(axis, 3) * p.sign()


def _sample_poses(count: int, seed: int, low: float, high: float, radius: float) -> Tensor:
    """Return poses [count, 4, 4]."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.rand(2, count, generator=generator)
    azimuth = (torch.arange(count) + samples[0]) * (2 * math.pi / count)
    bottom, top = math.sin(math.radians(low)), math.sin(math.radians(high))
    height = bottom + samples[1] * (top - bottom)
    flat = (1 - height**2).sqrt()
    positions = radius * torch.stack([azimuth.cos() * flat, azimuth.sin() * flat, height], dim=1)
    order = torch.randperm(count, generator=generator)
    return look_at(positions[order], torch.zeros(3), torch.tensor([0.0, 0.0, 1.0]))


@torch.no_grad()
def _render(poses: Tensor, intrinsics: Tensor, size: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return images [V, 3, size, size] over white and opacities [V, 1, size, size], averaged over finer pixels."""
    field, sampling = make_scene_field(symmetric), OccupancySampling(_make_occupancy(symmetric), step=STEP)
    fine = size * OVERSAMPLING
    scale = torch.tensor([OVERSAMPLING, OVERSAMPLING, 1.0])[:, None]
    images, masks = [], []
    for pose, k in zip(poses, intrinsics * scale, strict=True):
        rays = image_rays(pose, k, fine, fine)
        result = render(field, rays, sampling, background=torch.ones(3), early_stop=1e-4, chunk=1 << 16)
        images.append(resize_area(result.color.permute(2, 0, 1), size, size).clamp(0, 1))
        masks.append(resize_area(result.opacity[None], size, size).clamp(0, 1))
    return torch.stack(images), torch.stack(masks)


@lru_cache
def _make_occupancy(symmetric: bool) -> OccupancyGrid:
    grid = OccupancyGrid(LOWER, UPPER, resolution=64, threshold=0.02)
    field = make_scene_field(symmetric)
    for _ in range(4):
        grid.update(lambda points: field(points, points)[0])
    return grid
