"""Sample sheets of a training: where cameras stand, and what is seen from there."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from factorkit.data.views.views import Views
from factorkit.nerfdiff.export.mesh import FAR, point_cloud
from factorkit.nerfdiff.fields.grid import Field
from factorkit.nerfdiff.previews.plane import plane_picture
from factorkit.nerfdiff.previews.points import points_picture
from factorkit.nerfdiff.previews.views import sphere_picture, views_sheet
from factorkit.nerfdiff.rays import render_views, within
from factorkit.nerfdiff.scene import Scene
from factorkit.utils.errors import DataError

SHOWN = 8  # views on a sheet
POINTS = 20_000  # at most, about as many as a sheet has room for; few pixels tell of few points


def cameras_sheet(path: Path, layout: str, chosen: Tensor, candidates: Tensor | None = None) -> None:
    """Cameras [V, 4, 4], and candidates for them [..., 4, 4], on a sphere (thesis, fig. 3.7), or in their plane where
    they face forward."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = sphere_picture if layout == "object" else plane_picture
    picture(chosen, candidates).save(path)


def renders_sheet(path: Path, field: Field, scene: Scene, poses: Tensor, samples: int) -> None:
    """Some of the scene's views beside renders from ``poses`` [V, 4, 4], with difference and disparity."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picked = torch.linspace(0, len(poses) - 1, min(SHOWN, len(poses))).round().long().to(poses.device)
    seen = render_views(field, poses[picked], scene.optics, scene.size, samples, picked)
    names = [scene.names[i] for i in picked.tolist()]
    renders = seen.color.movedim(-1, 1).clamp(0, 1).cpu()
    views_sheet(scene.images[picked].cpu(), renders, seen.depth.cpu(), seen.opacity.cpu(), names).save(path)


def points_sheet(path: Path, field: Field, scene: Scene, poses: Tensor) -> None:
    """The scene as the coloured points that ``export`` writes, from several sides; nothing where nothing is solid."""
    optics = scene.optics
    intrinsics = optics.pixels(*scene.size).cpu().expand(len(poses), 3, 3)
    views = Views(scene.images.cpu(), scene.names, intrinsics, poses=poses.cpu(), layout=scene.layout)
    lower, upper = (-1.0,) * 3, within((1.0,) * 3, FAR, optics)
    try:
        cloud = point_cloud(field, views, lower, upper, min(POINTS, scene.images[:, 0].numel()))
    except DataError:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    points_picture(cloud, optics.forward).save(path)
