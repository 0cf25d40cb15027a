"""A scene as a coloured mesh."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from factorkit.nerfdiff.export.points import NDC_LENGTH, Shape, evaluate_field
from factorkit.nerfdiff.fields.base import field_device
from factorkit.nerfdiff.rays import CameraModel
from factorkit.rendering.render import Field
from factorkit.utils.errors import ConfigError, DataError
from factorkit.utils.images import unit_to_uint8

HALVING_SHARE = 16  # at the default density, light is halved within this fraction of the box


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
