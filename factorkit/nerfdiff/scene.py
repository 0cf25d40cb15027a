"""The training views on the device, in the model's coordinates."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from factorkit.data.views.views import SceneLayout, Views
from factorkit.nerfdiff.cameras.normalise import align_forward, align_up_axis, center_poses
from factorkit.nerfdiff.cameras.poses import framing_distance
from factorkit.nerfdiff.rays import CameraModel, same_aspect_ratio
from factorkit.utils.errors import ConfigError, DataError

MIN_COLOR_STD = 2e-3  # half a step of 8 bits: views with a smaller standard deviation are empty
INTRINSICS_TOLERANCE = 0.01  # difference of focal lengths and centres, relative to the image's side
MIN_WEIGHT = 1e-6  # sum of weights below which nothing counts
MIN_BLUR_PIXELS = 0.3  # a Gaussian narrower than this changes nothing visible


@dataclass(frozen=True)
class Scene:
    """Views taken with one camera.

    Attributes:
        images: [V, 3, H, W] in [0, 1].
        names: of the views.
        camera: shared by all views.
        layout: "object" (cameras around it) or "forward" (cameras side by side).
        distance: from the cameras to the centre of the box [-1, 1]^3; in a forward-facing scene the unit of length.
        poses: [V, 4, 4] as stored with the views, normalised if they are used in training; or None.
        loss_masks: [V, 1, H, W], 0 at pixels that no loss counts; None: all pixels count.
    """

    images: Tensor
    names: list[str]
    camera: CameraModel
    layout: SceneLayout
    distance: float
    poses: Tensor | None
    loss_masks: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.images.shape[2], self.images.shape[3]


def open_scene(views: Views, resolution: int, device: torch.device, known_poses: bool = True) -> Scene:
    """Prepare views for training.

    Args:
        views: what was read.
        resolution: longer side in pixels.
        device: where the images are kept.
        known_poses: whether the poses of the views are used in training; otherwise they stay unchanged, for scoring.

    Raises:
        DataError: fewer than two views, empty views, differing intrinsics, or known poses that cannot be normalised.
    """
    if len(views) < 2:
        raise DataError(f"{len(views)} view: a scene needs at least 2 views; about 30 give reliable poses")
    views = views.resize(resolution)
    if views.images.std((0, 2, 3)).max() < MIN_COLOR_STD:
        raise DataError("no foreground: all pixels of all views are equal. Are masks or background inverted?")
    camera = shared_camera(views)
    poses, distance = views.poses, 1.0
    if views.layout == "object":
        distance = framing_distance(float(camera.intrinsics.diagonal()[:2].min()))
    if known_poses and poses is not None:
        if views.layout == "object":
            poses = center_poses(align_up_axis(poses), distance)
        else:
            poses = align_forward(poses, views.near)
    camera = replace(camera, intrinsics=camera.intrinsics.to(device), background=camera.background.to(device))
    poses = None if poses is None else poses.to(device)
    loss_masks = None if views.loss_masks is None else views.loss_masks.to(device)
    return Scene(views.images.to(device), list(views.names), camera, views.layout, distance, poses, loss_masks)


def shared_camera(views: Views) -> CameraModel:
    """Return the camera model of views; their background is black if none is stored.

    Raises:
        DataError: the intrinsics of the views differ.
    """
    height, width = views.size
    intrinsics = views.intrinsics / torch.tensor([width, height, 1.0])[:, None]
    mean = intrinsics.mean(0)
    if (intrinsics - mean).abs().max() > INTRINSICS_TOLERANCE:
        raise DataError("the views' focal lengths or image centres differ; give views of one camera")
    background = torch.zeros(3) if views.background is None else views.background
    return CameraModel(mean, background, views.layout == "forward")


def match_camera(views: Views, camera: CameraModel, size: tuple[int, int]) -> Views:
    """Return views as the camera of a run sees them, at its size; views of that camera are only resized."""
    k = camera.intrinsics.cpu() * torch.tensor([size[1], size[0], 1.0])[:, None]
    own = views.intrinsics / torch.tensor([views.size[1], views.size[0], 1.0])[:, None]
    if same_aspect_ratio(views.size, size) and (own - camera.intrinsics.cpu()).abs().max() <= INTRINSICS_TOLERANCE:
        return views.resize(size)
    return views.reframe(k, size)


def box_camera(views: Views) -> CameraModel:
    """Return the camera model that maps between world and field box: the identity for object scenes.

    Raises:
        DataError: the intrinsics of forward-facing views differ.
    """
    return shared_camera(views) if views.layout == "forward" else CameraModel(torch.eye(3), torch.zeros(3))


def view_poses(views: Views) -> Tensor:
    """Return the poses of views.

    Raises:
        DataError: they have none.
    """
    if views.poses is None:
        raise DataError("the views have no poses; predict them first")
    return views.poses


def gather_pixels(images: Tensor, pixels: Tensor) -> Tensor:
    """Return colours [B, R, 3] of images [B, 3, H, W] at pixel indices [B, R], counted row by row."""
    index = pixels[:, None].expand(-1, images.shape[1], -1)
    return images.flatten(2).gather(2, index).transpose(1, 2)


def mean_squared_error(a: Tensor, b: Tensor, dims: tuple[int, ...], weights: Tensor | None = None) -> Tensor:
    """Return the squared difference of ``a`` and ``b``, averaged over ``dims``.

    Args:
        a: any shape.
        b: broadcasts with ``a``.
        dims: to average over.
        weights: broadcasts too; None: all 1. The error is 0 where all weights are 0.
    """
    squared = (a - b).square()
    if weights is None:
        return squared.mean(dims)
    weights = weights.expand_as(squared)
    return (squared * weights).sum(dims) / weights.sum(dims).clamp_min(MIN_WEIGHT)


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Blur images [..., H, W] with a Gaussian of ``sigma`` pixels, renormalised at the borders."""
    if sigma < MIN_BLUR_PIXELS:
        return images
    rows, columns = (_gaussian_matrix(n, sigma).to(images) for n in images.shape[-2:])
    return rows @ images @ columns.T


def _gaussian_matrix(count: int, sigma: float) -> Tensor:
    index = torch.arange(count)
    weights = torch.exp(-((index[:, None] - index) ** 2) / (2 * sigma**2))
    return weights / weights.sum(1, keepdim=True)


def require_poses(scene: Scene) -> Tensor:
    """Return the poses of a scene.

    Raises:
        ConfigError: it has none.
    """
    if scene.poses is None:
        raise ConfigError('poses="known", but the views have no poses; use poses="predicted"')
    return scene.poses
