"""The views a model is trained on, on the device and in the model's own units."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from factorkit.data.views.views import Views
from factorkit.nerfdiff.cameras.normalise import ahead, centred, upright
from factorkit.nerfdiff.cameras.poses import natural_distance
from factorkit.nerfdiff.rays import Optics
from factorkit.utils.errors import ConfigError, DataError

NOTHING = 2e-3  # standard deviation of the colours below which views show nothing, half a step of 8 bits
SAME_CAMERA = 0.01  # how far focal lengths and centres may differ, relative to the image's side


@dataclass(frozen=True)
class Scene:
    """Views of one camera.

    Attributes:
        images: [V, 3, H, W] in [0, 1].
        names: of the views.
        optics: the camera and what lies behind everything.
        layout: "object" or "forward".
        distance: how far from the middle of the box [-1, 1]^3 the camera stands; in a forward-facing scene the unit
            of its places.
        poses: [V, 4, 4] as given with the views, in the model's space if they are trained with, or None.
    """

    images: Tensor
    names: list[str]
    optics: Optics
    layout: str
    distance: float
    poses: Tensor | None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.images.shape[2], self.images.shape[3]


def open_scene(views: Views, resolution: int, device: torch.device, known: bool = True) -> Scene:
    """The views at ``resolution`` pixels along their longer side, ready for training.

    Args:
        known: whether poses that come with the views are trained with; else they may be any and stay as they are.

    Raises:
        DataError: one view only, views that show nothing, cameras whose intrinsics differ, or known poses of cameras
            that are all in one place around an object, or look all ways where they are to face forward.
    """
    if len(views) < 2:
        raise DataError(f"{len(views)} view: a scene takes at least 2, and about 30 to be found well")
    views = views.resize(resolution)
    if views.images.std((0, 2, 3)).max() < NOTHING:
        raise DataError("no foreground anywhere: all pixels of all views are alike. Are masks or background inverted?")
    optics = shared_optics(views)
    poses, distance = views.poses, 1.0
    if views.layout == "object":  # which fills the pictures
        distance = natural_distance(float(optics.intrinsics.diagonal()[:2].min()))
    if known and poses is not None:
        poses = centred(upright(poses), distance) if views.layout == "object" else ahead(poses, views.near)
    optics = replace(optics, intrinsics=optics.intrinsics.to(device), background=optics.background.to(device))
    where = None if poses is None else poses.to(device)
    return Scene(views.images.to(device), list(views.names), optics, views.layout, distance, where)


def shared_optics(views: Views) -> Optics:
    """The one camera all views are taken with, black behind everything where they name no background.

    Raises:
        DataError: they are not taken with one camera.
    """
    height, width = views.size
    each = views.intrinsics / torch.tensor([width, height, 1.0])[:, None]
    mean = each.mean(0)
    if (each - mean).abs().max() > SAME_CAMERA:
        raise DataError("the views' focal lengths or image centres differ; give views of one camera")
    background = torch.zeros(3) if views.background is None else views.background
    return Optics(mean, background, views.layout == "forward")


def field_space(views: Views) -> Optics:
    """What leads between the world of views and the box of their field: for an object nothing has to.

    Raises:
        DataError: forward-facing views that are not taken with one camera.
    """
    return shared_optics(views) if views.layout == "forward" else Optics(torch.eye(3), torch.zeros(3))


def require_poses(scene: Scene) -> Tensor:
    """The given poses. Raises ConfigError where there are none."""
    if scene.poses is None:
        raise ConfigError('poses="known", but the views come without poses; use poses="predicted"')
    return scene.poses


def picked(images: Tensor, pixels: Tensor) -> Tensor:
    """Colours [B, R, 3] of images [B, 3, H, W] at pixels [B, R], numbered row by row."""
    index = pixels[:, None].expand(-1, images.shape[1], -1)
    return images.flatten(2).gather(2, index).transpose(1, 2)


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Images [..., H, W] after a Gaussian blur of ``sigma`` pixels, the borders repeated in effect."""
    if sigma < 0.3:
        return images
    rows, columns = (_gaussian(n, sigma).to(images) for n in images.shape[-2:])
    return rows @ images @ columns.T


def _gaussian(count: int, sigma: float) -> Tensor:
    place = torch.arange(count)
    weights = torch.exp(-((place[:, None] - place) ** 2) / (2 * sigma**2))
    return weights / weights.sum(1, keepdim=True)
