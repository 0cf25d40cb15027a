"""Preview files of a training run: where the cameras are, and what the scene looks like from there."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from factorkit.data.views.views import Views
from factorkit.nerfdiff.export.points import MAX_DEPTH, point_cloud
from factorkit.nerfdiff.fields.base import Field
from factorkit.nerfdiff.network import CameraPrediction, NerfdiffModel
from factorkit.nerfdiff.previews.cameras import draw_plane, draw_sphere
from factorkit.nerfdiff.previews.views import draw_points, draw_view_grid
from factorkit.nerfdiff.rays import limit_depth, render_views
from factorkit.nerfdiff.scene import Scene
from factorkit.report.image_grid import draw_image_grid
from factorkit.utils.errors import DataError
from factorkit.utils.files import save_image
from factorkit.utils.images import images_to_pixels

MAX_VIEWS = 8  # in an image grid
MAX_POINTS = 20_000  # about as many as the drawing resolves; fewer pixels give fewer points


def save_model_previews(
    folder: Path, step: int, model: NerfdiffModel, scene: Scene, cameras: CameraPrediction, with_points: bool
) -> None:
    """Save views beside renders, the encoder's cameras, and optionally the scene's points."""
    save_renders(folder / f"{step:06d}_views.png", model.field, scene, cameras.best_poses, model.samples_per_ray)
    save_cameras(folder / f"{step:06d}_cameras_encoder.png", scene.layout, cameras.best_poses, cameras.poses)
    if with_points:
        save_points(folder / f"{step:06d}_points.png", model.field, scene, model.views)


def save_cameras(path: Path, layout: str, cameras: Tensor, candidates: Tensor | None = None) -> None:
    """Save a drawing of cameras [V, 4, 4] and their candidates [..., 4, 4]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = draw_sphere if layout == "object" else draw_plane
    save_image(draw(cameras, candidates), path)


def save_renders(path: Path, field: Field, scene: Scene, poses: Tensor, samples: int) -> None:
    """Save some views beside renders from ``poses`` [V, 4, 4], with difference and disparity."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = torch.linspace(0, len(poses) - 1, min(MAX_VIEWS, len(poses))).round().long().to(poses.device)
    own = scene.camera.of_views(rows)
    rendered = render_views(field, poses[rows], scene.camera, scene.size, samples, rows, own)
    color = rendered.color.movedim(-1, 1).clamp(0, 1).cpu()
    names = [scene.names[i] for i in rows.tolist()]
    grid = draw_view_grid(scene.images[rows].cpu(), color, rendered.depth.cpu(), rendered.opacity.cpu(), names)
    save_image(grid, path)


def save_masks(path: Path, views: Views) -> None:
    """Save some views beside their foreground masks; nothing for views without."""
    if views.masks is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = torch.linspace(0, len(views) - 1, min(MAX_VIEWS, len(views))).round().long()
    pixels = [list(images_to_pixels(x[rows])) for x in (views.images, views.masks.expand_as(views.images))]
    save_image(draw_image_grid(pixels, [views.names[i] for i in rows], row_captions=["image", "mask"]), path)


def save_points(path: Path, field: Field, scene: Scene, poses: Tensor) -> None:
    """Save a drawing of the exported point cloud; nothing if the scene is not solid anywhere."""
    camera = scene.camera
    intrinsics = camera.pixel_intrinsics(*scene.size, camera.of_views()).cpu().expand(len(poses), 3, 3)
    views = Views(scene.images.cpu(), scene.names, intrinsics, poses=poses.cpu(), layout=scene.layout)
    lower, upper = (-1.0,) * 3, limit_depth((1.0,) * 3, MAX_DEPTH, camera)
    try:
        cloud = point_cloud(field, views, lower, upper, min(MAX_POINTS, scene.images[:, 0].numel()))
    except DataError:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(draw_points(cloud, camera.forward_facing), path)
