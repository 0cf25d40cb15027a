"""The training views on the device, in the model's coordinates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from factorkit.data.views.cameras import Distortion, undistort
from factorkit.data.views.views import LOSS_MASK_THRESHOLD, SceneLayout, Views
from factorkit.nerfdiff.box import Foreground, choose_scale, find_foreground
from factorkit.nerfdiff.cameras.normalise import align_forward, align_up_axis, center_poses, rms_spread
from factorkit.nerfdiff.cameras.poses import framing_distance
from factorkit.nerfdiff.config import NerfdiffConfig
from factorkit.nerfdiff.rays import CameraModel, same_aspect_ratio
from factorkit.utils.errors import ConfigError, DataError

MIN_SCENE_VIEWS = 2
MIN_COLOR_STD = 2e-3  # half a step of 8 bits: views with a smaller standard deviation are empty
INTRINSICS_TOLERANCE = 0.01  # difference of focal lengths and centres, relative to the image's side
MIN_INWARD_SHARE = 0.9  # of the cameras that look towards the centre, for a scene that surrounds it
MIN_WEIGHT = 1e-6  # sum of weights below which nothing counts
MIN_BLUR_PIXELS = 0.3  # a Gaussian narrower than this changes nothing visible


@dataclass(frozen=True)
class Scene:
    """Views with their cameras.

    Attributes:
        images: [V, 3, H, W] in [0, 1].
        names: of the views.
        camera: what the cameras of all views share, and their own intrinsics.
        layout: "object" (cameras around it) or "forward" (cameras side by side).
        distance: from the cameras to the centre of the box [-1, 1]^3; in a forward-facing scene the unit of length.
        poses: [V, 4, 4] as stored with the views, normalised if they are used in training; or None.
        initial_poses: [V, 4, 4] by structure from motion, normalised, where the refinement starts; or None.
        loss_masks: [V, 1, H, W], 0 at pixels that no loss counts; None: all pixels count.
        foreground: of the views of an object, if masks or a background colour show it.
        note: a sentence for the user on how the scene was prepared.
        has_focal: whether the focal lengths are known; False: they are a guess.
        masks: opacity [V, 1, H, W] of the views of an object in [0, 1], or None.
        times: [V], when the views were taken, in seconds from any start; or None.
        reframed_images: the views [V, 3, H, W] as the common camera sees them; None: it is the camera of all views.
        points: sparse points [P, 3] of an object scene in the field's coordinates, if the poses came with some.
        turns: around the object that the views were taken on, if the search found that; else 1.
    """

    images: Tensor
    names: list[str]
    camera: CameraModel
    layout: SceneLayout
    distance: float
    poses: Tensor | None
    loss_masks: Tensor | None = None
    reframed_images: Tensor | None = None
    foreground: Foreground | None = None
    note: str = ""
    initial_poses: Tensor | None = None
    points: Tensor | None = None
    has_focal: bool = True
    masks: Tensor | None = None
    times: Tensor | None = None
    turns: float = 1.0

    @property
    def encoder_images(self) -> Tensor:
        """The views [V, 3, H, W] as the common camera sees them."""
        return self.images if self.reframed_images is None else self.reframed_images

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.images.shape[2], self.images.shape[3]


def open_scene(
    views: Views, resolution: int, device: torch.device, known_poses: bool = True, box: float | None = None
) -> Scene:
    """Prepare views for training.

    Args:
        views: what was read.
        resolution: longer side in pixels.
        device: where the images are kept.
        known_poses: whether the poses of the views are used in training; otherwise they stay unchanged, for scoring.
        box: length of the sides of the field's box in the units of the poses; None: by the views, see
            :mod:`factorkit.nerfdiff.box`.

    Raises:
        ConfigError: a box that is not positive, or without known poses around an object.
        DataError: fewer than two views, empty views, or known poses that cannot be normalised.
    """
    if len(views) < MIN_SCENE_VIEWS:
        raise DataError(
            f"{len(views)} view: a scene needs at least {MIN_SCENE_VIEWS} views; about 30 give reliable poses"
        )
    views = views.resize(resolution)
    if views.images.std((0, 2, 3)).max() < MIN_COLOR_STD:
        raise DataError("no foreground: all pixels of all views are equal. Are masks or background inverted?")
    camera, foreground = shared_camera(views), None
    poses, distance, note, points = views.poses, 1.0, "", None
    if views.layout == "object":
        distance, foreground = framing_distance(float(camera.intrinsics.diagonal()[:2].min())), find_foreground(views)
    if box is not None and not (box > 0 and known_poses and poses is not None and views.layout == "object"):
        raise ConfigError(
            f'box={box:g}: give a length above 0 in the units of known poses around an object (poses="known")'
        )
    if known_poses and poses is not None:
        if views.layout == "object":
            poses, distance, note, points = _fit_box(views, poses, distance, foreground, box)
            points = None if points is None else points.to(device)
        else:
            poses = align_forward(poses, views.near)
    poses = None if poses is None else poses.to(device)
    loss_masks = None if views.loss_masks is None else views.loss_masks.to(device)
    seen = None if camera.view_intrinsics is None else match_camera(views, camera, views.size).images.to(device)
    images, camera = views.images.to(device), camera.to(device)
    foreground = None if foreground is None else foreground.to(device)
    return Scene(
        images,
        list(views.names),
        camera,
        views.layout,
        distance,
        poses,
        loss_masks,
        seen,
        foreground,
        note,
        points=points,
        has_focal=views.has_focal,
        masks=None if views.masks is None or views.layout == "forward" else views.masks.to(device),
        times=views.times,
    )


def scale_focal(scene: Scene, factor: float) -> Scene:
    """Return the scene of an object with other focal lengths, and distances at which it has the same size in images."""
    scale = torch.tensor([factor, factor, 1.0], device=scene.images.device)
    intrinsics = scene.camera.intrinsics
    scene = with_intrinsics(scene, intrinsics + torch.diag(intrinsics.diagonal() * (scale - 1)))
    return replace(scene, distance=scene.distance * factor)


def with_intrinsics(scene: Scene, intrinsics: Tensor) -> Scene:
    """Return the scene with other intrinsics [3, 3]; the focal lengths of its views and foreground change likewise."""
    foreground = scene.foreground
    if foreground is not None:
        own = foreground.intrinsics
        change = (intrinsics.diagonal() / scene.camera.intrinsics.diagonal() - 1).to(own.device)
        own = own + torch.diag_embed(own.diagonal(dim1=1, dim2=2) * change)
        foreground = replace(foreground, intrinsics=own)
    return replace(scene, camera=scene.camera.with_intrinsics(intrinsics), foreground=foreground)


def straighten_scene(scene: Scene, term: float) -> Scene:
    """Return the scene with its views resampled without a radial term of their lens; see :func:`straighten_images`."""
    camera, foreground = scene.camera, scene.foreground
    shared = camera.pixel_intrinsics(*scene.size).expand(len(scene.images), 3, 3)
    own = camera.pixel_intrinsics(*scene.size, camera.of_views()).expand(len(scene.images), 3, 3)
    reframed = scene.reframed_images
    if foreground is not None:
        parts = (x[:, None].float() for x in (foreground.masks, foreground.scored))
        masks, scored = (straighten_images(x, foreground.intrinsics, term)[:, 0] for x in parts)
        foreground = replace(foreground, masks=masks > 0.5, scored=scored > LOSS_MASK_THRESHOLD)
    return replace(
        scene,
        images=straighten_images(scene.images, own, term),
        masks=None if scene.masks is None else straighten_images(scene.masks, own, term),
        loss_masks=_straighten_loss_masks(scene.loss_masks, own, term),
        reframed_images=None if reframed is None else straighten_images(reframed, shared, term),
        foreground=foreground,
    )


def straighten_views(views: Views, term: float) -> Views:
    """Return views resampled without a radial term of their lens; see :func:`straighten_images`."""
    if not term:
        return views
    return replace(
        views,
        images=straighten_images(views.images, views.intrinsics, term),
        masks=None if views.masks is None else straighten_images(views.masks, views.intrinsics, term),
        loss_masks=_straighten_loss_masks(views.loss_masks, views.intrinsics, term),
    )


def _straighten_loss_masks(loss_masks: Tensor | None, intrinsics: Tensor, term: float) -> Tensor | None:
    if loss_masks is None:
        return None
    return (straighten_images(loss_masks, intrinsics, term) > LOSS_MASK_THRESHOLD).float()


def straighten_images(images: Tensor, intrinsics: Tensor, term: float) -> Tensor:
    """Resample images [V, C, H, W], which show a point x at x (1 + term |x|^2), as a pinhole camera sees them.

    Args:
        intrinsics: [V, 3, 3] in pixels.
    """
    lens = Distortion(term)
    return torch.stack(
        [undistort(x, k.cpu().double().numpy(), lens)[0] for x, k in zip(images, intrinsics, strict=True)]
    )


def _fit_box(
    views: Views, poses: Tensor, distance: float, foreground: Foreground | None, side: float | None
) -> tuple[Tensor, float, str, Tensor | None]:
    """Move and scale poses so that the field's box [-1, 1]^3 holds the object.

    Args:
        views: with sparse points, if known.
        poses: of the views, [V, 4, 4].
        distance: mean distance of the cameras if the images frame the object.
        foreground: of the views, if known.
        side: length of the box's sides in the units of the poses; None: by the views.

    Returns:
        The poses, their mean distance, a sentence for the user, and the sparse points, moved likewise.
    """
    upright = align_up_axis(poses)
    centered = center_poses(upright, distance)
    scale = rms_spread(centered[:, :3, 3]) / rms_spread(upright[:, :3, 3])

    def move_points(moved: Tensor) -> Tensor | None:
        if views.points is None:
            return None
        points = views.points @ (upright[0, :3, :3] @ poses[0, :3, :3].T).T  # as the poses were turned
        growth = rms_spread(moved[:, :3, 3]) / rms_spread(upright[:, :3, 3])
        return (points - upright[0, :3, 3]) * growth + moved[0, :3, 3]

    if side is not None:
        factor, reason = side * scale / 2, "as given"
    else:
        factor, reason = choose_scale(centered, foreground, move_points(centered))
    if factor != 1:
        distance = distance / factor
        centered = center_poses(upright, distance)
    note = f"The field's box has sides of {2 * factor / scale:.4g} units of the poses: {reason}."
    return centered, distance, note, move_points(centered)


def shared_camera(views: Views) -> CameraModel:
    """Return the camera model of views; their background is black if none is stored.

    Intrinsics that differ stay those of each view, and the common ones are of an image that contains all views.
    """
    intrinsics = relative_intrinsics(views)
    background = torch.zeros(3) if views.background is None else views.background
    camera = CameraModel(intrinsics.mean(0), background, views.layout == "forward")
    if has_intrinsics(camera.intrinsics, intrinsics):
        return camera
    focal, centre = intrinsics.diagonal(dim1=1, dim2=2)[:, :2], intrinsics[:, :2, 2]
    lower, upper = (centre / focal).amax(0), ((1 - centre) / focal).amax(0)  # tangents of the widest angles
    union = torch.eye(3)
    union[:2, :2] = torch.diag(1 / (lower + upper))
    union[:2, 2] = lower / (lower + upper)
    return replace(camera, intrinsics=union, view_intrinsics=intrinsics)


def relative_intrinsics(views: Views) -> Tensor:
    """Return the intrinsics [V, 3, 3] of views in units of width and height."""
    return views.intrinsics / torch.tensor([views.size[1], views.size[0], 1.0])[:, None]


def has_intrinsics(intrinsics: Tensor, own: Tensor) -> bool:
    """Return whether intrinsics [V, 3, 3] are, up to rounding and small errors, those of one camera [3, 3]."""
    return bool((own - intrinsics).abs().max() <= INTRINSICS_TOLERANCE)


def match_size(views: Views, size: tuple[int, int]) -> Views:
    """Return views at the size of a run; views of another shape keep it, with the same longer side."""
    return views.resize(size if same_aspect_ratio(views.size, size) else max(size))


def match_camera(views: Views, camera: CameraModel, size: tuple[int, int]) -> Views:
    """Return views as one camera that contains all views of a run sees them, at its size.

    Views of that camera are only resized.
    """
    if same_aspect_ratio(views.size, size) and has_intrinsics(camera.intrinsics.cpu(), relative_intrinsics(views)):
        return views.resize(size)
    return views.reframe(camera.pixel_intrinsics(*size).cpu(), size)


def box_camera(views: Views) -> CameraModel:
    """Return the camera model that maps between world and field box: the identity for object scenes."""
    return shared_camera(views) if views.layout == "forward" else CameraModel(torch.eye(3), torch.zeros(3))


def view_poses(views: Views) -> Tensor:
    """Return the poses of views.

    Raises:
        DataError: they have none.
    """
    if views.poses is None:
        raise DataError("the views have no poses; predict them first")
    return views.poses


def choose_unbounded(config: NerfdiffConfig, scene: Scene) -> Literal["yes", "no"]:
    """Return whether the field covers all of space: as the settings say, else as cameras and images suggest.

    Raises:
        ConfigError: ``unbounded="yes"`` for a scene without known poses around it.
    """
    poses = scene.initial_poses if config.poses == "predicted" else scene.poses if config.poses == "known" else None
    if config.unbounded != "auto":
        problem = (
            "these views are forward-facing, whose box reaches to infinity already"
            if scene.layout == "forward"
            else "it needs known poses, or those of structure from motion"
        )
        if config.unbounded == "yes" and (scene.layout == "forward" or poses is None):
            raise ConfigError(f'unbounded="yes": {problem}, or give unbounded="no" (--unbounded no)')
        return config.unbounded
    is_object = scene.foreground is not None or config.background != "given"
    if poses is None or scene.layout == "forward" or is_object:
        return "no"
    inwards = (poses[:, :3, 2] * poses[:, :3, 3]).sum(1) > 0
    return "yes" if inwards.float().mean() >= MIN_INWARD_SHARE else "no"


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
