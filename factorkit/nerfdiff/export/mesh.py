"""Where a field is solid: points that its views see, and a mesh of equal density."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from factorkit.data.views.views import Views
from factorkit.nerfdiff.fields.occupancy import PLACES, device_of, occupied_sampling
from factorkit.nerfdiff.rays import Optics
from factorkit.nerfdiff.scene import field_space
from factorkit.rendering.cameras import image_rays
from factorkit.rendering.render import Field, render
from factorkit.utils.errors import ConfigError, DataError
from factorkit.utils.images import unit_to_uint8

OPAQUE = 0.7  # of a pixel whose depth is believed
SOLID = 1 / 8  # the optical depth that a believed place must have over two cells
RAYS = 1 << 14  # rendered at once
HALVING = 16  # the default surface halves light within this fraction of the box
FAR = 30.0  # depth in units of the nearest plane's beyond which forward-facing scenes are left out
AHEAD = 2.0  # of the box's length, how much a ray of a forward-facing scene covers while its t grows by 1


@dataclass(frozen=True)
class Shape:
    """Points with colours, and the triangles between them where it is a mesh.

    Attributes:
        points: float32 [P, 3].
        colors: uint8 [P, 3].
        faces: int [F, 3], counter-clockwise as seen from outside, or None.
    """

    points: np.ndarray
    colors: np.ndarray
    faces: np.ndarray | None = None

    def save(self, path: Path) -> None:
        """As .ply, or for meshes .obj and .glb too."""
        import trimesh

        if self.faces is None:
            shape = trimesh.PointCloud(self.points, colors=self.colors)
        else:
            shape = trimesh.Trimesh(self.points, self.faces, vertex_colors=self.colors, process=False)
        shape.export(path)


@torch.no_grad()
def point_cloud(field: Field, views: Views, lower: Sequence[float], upper: Sequence[float], count: int) -> Shape:
    """About ``count`` points, at the expected depth of the pixels that all views together have in the foreground.

    Only pixels that are opaque count, and only where the field is dense at the place itself: at a silhouette the
    expected depth lies in the empty space between what is before and what is behind. Forward-facing views' places are
    those of the world.

    Raises:
        DataError: no view sees anything, or forward-facing views of different cameras.
    """
    # The pictures' size that gives so many pixels, if nothing tells how much of them is foreground: of an object half.
    share = 1.0 if views.layout == "forward" else 0.5
    share = share if views.masks is None else max(0.02, float((views.masks > 0.5).float().mean()))
    height, width = views.size
    scale = math.sqrt(count / (len(views) * share * height * width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    like = device_of(field)
    stretch = torch.tensor([size[1] / width, size[0] / height, 1.0])[:, None]
    sampling = occupied_sampling(field, lower, upper)
    space = field_space(views)
    cell = sampling.occupancy.cell_side / (AHEAD if space.forward else 1.0)  # in units of t
    found = []
    for pose, k in zip(views.poses.to(like), (views.intrinsics * stretch).to(like), strict=True):
        rays = space.bent(image_rays(pose, k, *size), size)
        seen = render(field, rays, sampling, early_stop=1e-3, chunk=RAYS)
        kept = seen.opacity > OPAQUE
        opacity = seen.opacity[kept]
        places = rays.origins[kept] + (seen.depth[kept] / opacity)[:, None] * rays.directions[kept]
        colors = seen.color[kept] / opacity[:, None]
        solid = _density(field, places, rays.directions[kept]) * (2 * cell) > SOLID
        found.append((space.unbent(places[solid]).cpu(), colors[solid].cpu()))
    places, colors = (torch.cat(parts) for parts in zip(*found, strict=True))
    if not len(places):
        raise DataError(
            "no view sees anything solid: there are no points to export. Train longer, or look at a render first."
        )
    return Shape(places.float().numpy(), unit_to_uint8(colors))


@torch.no_grad()
def surface_mesh(
    field: Field, lower: Sequence[float], upper: Sequence[float], resolution: int, level: float | None, space: Optics
) -> Shape:
    """The surface where the density is ``level``, by marching cubes (Lorensen & Cline 1987) over a lattice, closed at
    the box's walls; each vertex coloured as seen from straight outside, or in a forward-facing scene from before it.

    Args:
        space: what leads from the field's box to the world.

    Raises:
        ConfigError: scikit-image is not installed, or a level not above 0.
        DataError: the density is below the level everywhere.
    """
    try:
        from skimage.measure import marching_cubes
    except ImportError as error:
        raise ConfigError(f"a mesh needs scikit-image: pip install 'factorkit[mesh]' ({error})") from error
    lower, upper = (torch.tensor(corner, dtype=torch.float32) for corner in (lower, upper))
    side = float((upper - lower).max())
    if level is None:
        level = math.log(2) * HALVING / side * (AHEAD if space.forward else 1.0)
    if not level > 0:
        raise ConfigError(f"level={level}: give a density above 0")
    counts = [max(2, round(resolution * float(length) / side)) for length in upper - lower]
    axes = [torch.linspace(float(a), float(b), n + 1) for a, b, n in zip(lower, upper, counts, strict=True)]
    places = torch.cartesian_prod(*axes).to(device_of(field))
    density = _density(field, places, torch.zeros_like(places)).cpu().reshape(*(len(axis) for axis in axes))
    highest = float(density.max())
    if not highest > level:
        raise DataError(
            f"the density is at most {highest:.3g}, below the surface's {level:.3g} everywhere. Give a "
            "lower level, or train longer."
        )
    cells = np.array([float(axis[1] - axis[0]) for axis in axes])
    # A frame of nothing around the lattice closes the surface where the box cuts through it; what lies in the frame is
    # brought back to the wall, where some of its vertices become one.
    found, faces, normals, _ = marching_cubes(np.pad(density.numpy(), 1), level, gradient_direction="ascent")
    found = np.clip((found - 1) * cells + lower.numpy(), lower.numpy(), upper.numpy()).astype(np.float32)
    found, first, merged = np.unique(found, axis=0, return_index=True, return_inverse=True)
    faces = merged.reshape(-1)[faces]
    faces = faces[(faces != np.roll(faces, 1, axis=1)).all(1)]
    inwards = torch.from_numpy(-normals[first])
    if space.forward:  # the map to the world turns the box inside out: what is far ahead has the highest z
        inwards, faces = torch.tensor([0.0, 0.0, AHEAD]).expand_as(inwards), faces[:, ::-1]
    colors = _ask(field, torch.from_numpy(found).to(places), inwards.to(places), 1)
    return Shape(space.unbent(torch.from_numpy(found)).numpy(), unit_to_uint8(colors), faces)


def _density(field: Field, places: Tensor, along: Tensor) -> Tensor:
    return _ask(field, places, along, 0).reshape(-1)


def _ask(field: Field, places: Tensor, along: Tensor, which: int) -> Tensor:
    """The field's density or radiance at places [M, 3], in parts."""
    parts = zip(places.split(PLACES), along.split(PLACES), strict=True)
    return torch.cat([field(*part)[which].float() for part in parts])
