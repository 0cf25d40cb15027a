"""Image grids of views: beside their renders, and during denoising; disparity and point images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from factorkit.data.views.views import Views
from factorkit.nerfdiff.export.shapes import MAX_DEPTH, Shape, point_cloud
from factorkit.nerfdiff.fields.base import Field
from factorkit.nerfdiff.network import CameraPrediction, NerfdiffModel
from factorkit.nerfdiff.previews.cameras import (
    FROM_BEHIND,
    SIDE,
    SPHERE_ELEVATION,
    PlaneDrawing,
    draw_hemisphere,
    draw_plane,
    draw_sphere,
)
from factorkit.nerfdiff.rays import limit_depth, render_views
from factorkit.nerfdiff.scene import Scene
from factorkit.report.image_grid import PAPER_COLOR, Caption, draw_image_grid
from factorkit.utils.errors import DataError
from factorkit.utils.files import save_image
from factorkit.utils.images import images_to_pixels, unit_to_uint8

MAX_QUANTILE_VALUES = 1 << 22  # torch.quantile takes at most 2^24
MIN_SHADE = 0.15  # of the farthest depth; black is empty
POINT_SIDE = 240  # pixels of each view of a point cloud
POINT_SIZE = 2  # pixels
POINT_ELEVATION = 25.0  # degrees above the horizon from which the points of an object are drawn
POINT_AZIMUTHS = (0, 90, 180, 270)  # degrees
SHOWN_SHARE = 0.98  # of the points along each axis: outliers should not shrink the rest
MAX_VIEWS = 8  # in an image grid
MAX_POINTS = 20_000  # about as many as the drawing resolves; fewer pixels give fewer points


def draw_view_grid(
    images: Tensor, renders: Tensor, depth: Tensor, opacity: Tensor, names: Sequence[str] | None = None
) -> Image.Image:
    """Draw one column for each view: image, render, twice their absolute difference, and disparity.

    Args:
        images: [V, 3, H, W] in [0, 1].
        renders: [V, 3, H, W] in [0, 1].
        depth: expected depth [V, H, W], not divided by the opacity.
        opacity: [V, H, W].
    """
    difference = 2 * (images - renders).abs()
    rows = [list(images_to_pixels(x)) for x in (images, renders, difference)]
    rows.append(list(disparity_pixels(depth, opacity)))
    return draw_image_grid(rows, names, row_captions=["image", "render", "2 x difference", "disparity"])


def disparity_pixels(depth: Tensor, opacity: Tensor) -> np.ndarray:
    """Return disparities 1 / depth as uint8 [V, H, W]: the nearest is white, the farthest dark grey, empty is black.

    Args:
        depth: expected depth [V, H, W], not divided by the opacity.
        opacity: [V, H, W].
    """
    solid = opacity > 0.5
    if not solid.any():
        return np.zeros(tuple(depth.shape), np.uint8)
    disparity = torch.where(solid, opacity / depth.clamp_min(1e-6), torch.nan)
    values = disparity[solid]
    values = values[:: 1 + values.numel() // MAX_QUANTILE_VALUES]
    low, high = values.quantile(0.01), values.quantile(0.99)  # a single outlier should not take all of the range
    shade = MIN_SHADE + (1 - MIN_SHADE) * (disparity - low) / (high - low).clamp_min(1e-6 * high)
    return unit_to_uint8(shade.clamp(MIN_SHADE, 1).nan_to_num(0))


def draw_denoising_grid(
    images: Sequence[Tensor],
    cameras: Sequence[Tensor],
    times: Sequence[int],
    noisy: Sequence[Tensor] | None = None,
    layout: str = "object",
) -> Image.Image:
    """Draw views and their cameras during denoising (thesis, fig. 3.9).

    Args:
        images: S tensors [n, 3, H, W] in [0, 1], the predicted clean images.
        cameras: S tensors of poses [n, 4, 4].
        noisy: S tensors [n, 3, H, W] in [0, 1], drawn above the clean images.
        layout: "object" or "forward".
    """
    plane = PlaneDrawing(torch.cat(list(cameras)))

    def draw_camera(pose: Tensor) -> np.ndarray:
        return np.asarray(
            draw_hemisphere(SPHERE_ELEVATION, pose) if layout == "object" else plane.draw(FROM_BEHIND, pose)
        )

    rows: list[list[np.ndarray]] = []
    captions: list[Caption] = []
    for n in range(len(images[0])):
        if noisy is not None:
            rows.append([images_to_pixels(x[n]) for x in noisy])
            captions.append(f"view {n}, noisy")
        rows.append([images_to_pixels(x[n]) for x in images])
        captions.append(f"view {n}")
        rows.append([draw_camera(poses[n : n + 1]) for poses in cameras])
        captions.append("its camera")
    return draw_image_grid(rows, [f"t = {t}" for t in times], captions, cell=SIDE // 2)


def draw_points(cloud: Shape, forward_facing: bool) -> Image.Image:
    """Draw coloured points in orthographic projection.

    Args:
        cloud: points of an object with z up, drawn from four sides; or of a forward-facing scene, drawn from the
            cameras and from above.
        forward_facing: which of them.
    """
    if forward_facing:
        axes = {"ahead": np.eye(3), "from above": np.array([[1.0, 0, 0], [0, 0, -1.0], [0, 1.0, 0]])}
    else:
        elevation = math.radians(POINT_ELEVATION)
        axes = {f"from {azimuth} degrees": _viewer_axes(math.radians(azimuth), elevation) for azimuth in POINT_AZIMUTHS}
    return draw_image_grid([[_project_points(cloud, x) for x in axes.values()]], list(axes), cell=POINT_SIDE)


def _viewer_axes(azimuth: float, elevation: float) -> np.ndarray:
    """Return the axes right, up and backward, as rows, of a viewer who looks at the origin."""
    flat = math.cos(elevation)
    backward = np.array([flat * math.cos(azimuth), flat * math.sin(azimuth), math.sin(elevation)])
    right = np.array([-math.sin(azimuth), math.cos(azimuth), 0.0])
    return np.stack([right, np.cross(backward, right), backward])


def _project_points(cloud: Shape, axes: np.ndarray) -> np.ndarray:
    """Return uint8 [POINT_SIDE, POINT_SIDE, 3] with the points nearest to the viewer on top."""
    right, up, nearness = axes @ cloud.points.T
    low, high = np.quantile([right, up], [(1 - SHOWN_SHARE) / 2, (1 + SHOWN_SHARE) / 2], axis=1)
    scale = 0.9 * POINT_SIDE / max(*(high - low), 1e-9)
    column, row = (
        np.round(POINT_SIDE / 2 + sign * scale * (values - center)).astype(int)
        for sign, values, center in zip((1, -1), (right, up), (low + high) / 2, strict=True)
    )
    pixels = np.full((POINT_SIDE + POINT_SIZE, POINT_SIDE + POINT_SIZE, 3), PAPER_COLOR, np.uint8)
    inside = (column >= 0) & (column < POINT_SIDE) & (row >= 0) & (row < POINT_SIDE)
    order = np.flatnonzero(inside)[np.argsort(nearness[inside], kind="stable")]  # of equal indices, the last one counts
    for down in range(POINT_SIZE):
        for across in range(POINT_SIZE):
            pixels[row[order] + down, column[order] + across] = cloud.colors[order]
    return pixels[:POINT_SIDE, :POINT_SIDE]


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
