"""A scene as coloured points, or as a coloured mesh."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from factorkit.data.views.views import Views
from factorkit.metrics.pose import Similarity
from factorkit.nerfdiff.fields.base import MAX_POSITIONS, field_device, occupied_sampling
from factorkit.nerfdiff.rays import CameraModel
from factorkit.nerfdiff.scene import box_camera, view_poses
from factorkit.rendering.cameras import image_rays
from factorkit.rendering.render import Field, render
from factorkit.utils.errors import ConfigError, DataError
from factorkit.utils.images import unit_to_uint8

MIN_OPACITY = 0.7  # of a pixel whose depth is used
MIN_OPTICAL_DEPTH = 1 / 8  # over two cells at a point's position
RAYS_PER_CHUNK = 1 << 14
MIN_STEPS = 10_000  # of single precision along a shape's longest side
MAX_DEPTH = 30.0  # in near-plane depths; deeper parts of forward-facing scenes are left out
NDC_LENGTH = 2.0  # length of the box that a ray of a forward-facing scene crosses as its t grows by 1
HALVING_SHARE = 16  # at the default density, light is halved within this fraction of the box


@dataclass(frozen=True)
class Shape:
    """Coloured points, and for a mesh the triangles between them.

    Attributes:
        points: float32 or float64 [P, 3].
        colors: uint8 [P, 3].
        faces: int [F, 3], counter-clockwise seen from outside, or None.
    """

    points: np.ndarray
    colors: np.ndarray
    faces: np.ndarray | None = None

    def save(self, path: Path, up: Tensor) -> None:
        """Write a .ply, or for a mesh also .obj or .glb.

        Args:
            up: direction [3] that is up in the points' coordinates. A .glb is rotated so that the axis closest to it
                becomes y, as glTF 2.0 (section 3.4) demands.

        Raises:
            DataError: the points are so far from the origin that single precision does not tell them apart.
        """
        import trimesh

        points = self.points @ to_y_up(up).T if path.suffix.lower() == ".glb" else self.points
        extent = float(np.ptp(points, axis=0).max())
        if points.dtype == np.float64 and np.abs(points).max() * np.finfo(np.float32).eps > extent / MIN_STEPS:
            raise DataError(
                f"the points are {float(np.abs(points).max()):.6g} away from the origin and {extent:.3g} apart, which "
                f'single precision does not resolve; export them with coordinates="run" (--coordinates run)'
            )
        shape: trimesh.PointCloud | trimesh.Trimesh
        if self.faces is None:
            shape = trimesh.PointCloud(points, colors=self.colors)
        else:
            shape = trimesh.Trimesh(points, self.faces, vertex_colors=self.colors, process=False)
        shape.export(path)


def move_shape(shape: Shape, similarity: Similarity | None) -> Shape:
    """Return a shape in other coordinates, in double precision; unchanged without a similarity."""
    if similarity is None:
        return shape
    return replace(shape, points=similarity.apply_points(torch.from_numpy(shape.points).double()).numpy())


def to_y_up(up: Tensor) -> np.ndarray:
    """Return the rotation [3, 3] that maps the signed axis closest to ``up`` to y."""
    axis = int(up.abs().argmax())
    if axis == 1:
        return np.diag([1.0, 1.0, 1.0] if up[1] > 0 else [1.0, -1.0, -1.0]).astype(np.float32)
    sign = 1.0 if up[axis] > 0 else -1.0
    rotation = np.zeros((3, 3), np.float32)
    rotation[1, axis], rotation[axis, 1] = sign, -sign
    rotation[2 - axis, 2 - axis] = 1
    return rotation


@torch.no_grad()
def point_cloud(field: Field, views: Views, lower: Sequence[float], upper: Sequence[float], count: int) -> Shape:
    """Return about ``count`` points in world coordinates, at the expected depth of the views' foreground pixels.

    Only opaque pixels count, and only where the field is dense: at a silhouette the expected depth is in empty space
    between foreground and background.

    Args:
        views: with poses.

    Raises:
        DataError: no solid point is visible, or the intrinsics of forward-facing views differ.
    """
    # The image size with that many foreground pixels; without masks, an object fills half of the image.
    share = 1.0 if views.layout == "forward" else 0.5
    share = share if views.masks is None else max(0.02, float((views.masks > 0.5).float().mean()))
    height, width = views.size
    scale = math.sqrt(count / (len(views) * share * height * width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    device = field_device(field)
    stretch = torch.tensor([size[1] / width, size[0] / height, 1.0])[:, None]
    sampling = occupied_sampling(field, lower, upper)
    camera = box_camera(views)
    cell = sampling.occupancy.cell_side / (NDC_LENGTH if camera.forward_facing else 1.0)  # in units of t
    positions, colors = [], []
    for pose, intrinsics in zip(view_poses(views).to(device), (views.intrinsics * stretch).to(device), strict=True):
        rays = camera.to_ndc(image_rays(pose, intrinsics, *size), size)
        rendered = render(field, rays, sampling, early_stop=1e-3, chunk=RAYS_PER_CHUNK)
        opaque = rendered.opacity > MIN_OPACITY
        opacity = rendered.opacity[opaque]
        points = rays.origins[opaque] + (rendered.depth[opaque] / opacity)[:, None] * rays.directions[opaque]
        density = evaluate_field(field, points, rays.directions[opaque], 0).reshape(-1)
        solid = density * (2 * cell) > MIN_OPTICAL_DEPTH
        positions.append(camera.from_ndc(points[solid]).cpu())
        colors.append((rendered.color[opaque] / opacity[:, None])[solid].cpu())
    if not any(map(len, positions)):
        raise DataError("no view shows anything solid, so there are no points. Train longer, or look at a render first")
    return Shape(torch.cat(positions).float().numpy(), unit_to_uint8(torch.cat(colors)))


def evaluate_field(field: Field, positions: Tensor, directions: Tensor, output: int) -> Tensor:
    """Return the field's density (output 0) or colour (output 1) at positions [M, 3], evaluated in parts."""
    parts = zip(positions.split(MAX_POSITIONS), directions.split(MAX_POSITIONS), strict=True)
    return torch.cat([field(*part)[output].float() for part in parts])


@torch.no_grad()
def surface_mesh(
    field: Field,
    lower: Sequence[float],
    upper: Sequence[float],
    resolution: int,
    level: float | None,
    camera: CameraModel,
) -> Shape:
    """Return the surface of density ``level`` by marching cubes (Lorensen & Cline 1987), closed at the box's walls.

    Each vertex has the colour seen from outside, in a forward-facing scene from the cameras.

    Args:
        resolution: cells along the box's longest side.
        level: density of the surface; None: light is halved within a 16th of the box's longest side.
        camera: maps from the box to the world.

    Raises:
        ConfigError: scikit-image is not installed, or the level is not positive.
        DataError: the density is below the level everywhere.
    """
    try:
        from skimage.measure import marching_cubes
    except ImportError as error:
        raise ConfigError(f"a mesh needs scikit-image: pip install 'factorkit[mesh]' ({error})") from error
    low, high = (torch.tensor(corner, dtype=torch.float32) for corner in (lower, upper))
    side = float((high - low).max())
    if level is None:
        level = math.log(2) * HALVING_SHARE / side * (NDC_LENGTH if camera.forward_facing else 1.0)
    if not level > 0:
        raise ConfigError(f"level={level}: give a density above 0")
    counts = [max(2, round(resolution * float(length) / side)) for length in high - low]
    axes = [torch.linspace(float(a), float(b), n + 1) for a, b, n in zip(low, high, counts, strict=True)]
    positions = torch.cartesian_prod(*axes).to(field_device(field))
    density = evaluate_field(field, positions, torch.zeros_like(positions), 0).cpu().reshape(*(len(x) for x in axes))
    highest = float(density.max())
    if not highest > level:
        raise DataError(
            f"the density is at most {highest:.3g}, below level={level:.3g} everywhere. Give a lower level, or train "
            "longer"
        )
    cells = np.array([float(axis[1] - axis[0]) for axis in axes])
    # An empty frame around the grid closes the surface at the walls; vertices in the frame are moved back to the wall,
    # where some of them coincide and are merged.
    vertices, faces, normals, _ = marching_cubes(np.pad(density.numpy(), 1), level, gradient_direction="ascent")
    vertices = np.clip((vertices - 1) * cells + low.numpy(), low.numpy(), high.numpy()).astype(np.float32)
    vertices, first, merged = np.unique(vertices, axis=0, return_index=True, return_inverse=True)
    faces = merged.reshape(-1)[faces]
    faces = faces[(faces != np.roll(faces, 1, axis=1)).all(1)]
    inwards = torch.from_numpy(-normals[first])
    if camera.forward_facing:  # the map to the world reverses the orientation: the box's far wall has the highest z
        inwards, faces = torch.tensor([0.0, 0.0, NDC_LENGTH]).expand_as(inwards), faces[:, ::-1]
    colors = evaluate_field(field, torch.from_numpy(vertices).to(positions), inwards.to(positions), 1)
    return Shape(camera.from_ndc(torch.from_numpy(vertices)).numpy(), unit_to_uint8(colors), faces)
