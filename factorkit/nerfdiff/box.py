"""The box of an object scene's field: its size, and whether it cuts the scene.

In the model's coordinates the box is [-1, 1]^3. By default its middle fills 90% of the image at the cameras' mean
distance. It grows if the foreground of the views, or points between the cameras, do not fit into it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from factorkit.data.views.views import Views, resize_area, target_size
from factorkit.nerfdiff.cameras.poses import FRAMING
from factorkit.nerfdiff.fields.base import Field
from factorkit.rendering import image_rays
from factorkit.report.content import Check

FOREGROUND_SIDE = 48  # longer side in pixels at which the foreground is compared with the box
MIN_DIFFERENCE = 0.1  # of a channel from the background's colour, that makes a pixel foreground
MAX_OUTSIDE = 0.01  # share of the foreground beside the box: right runs have 0
CUT_BORDER = 0.05  # share of the images' border that is foreground if the images cut the object
CUT_SCALE = 2.0  # of the box if the images cut the object: a third of the cameras of a circle see its faces
OUTLIERS = 0.01  # share of the rays, or points, that may stay outside
CAMERA_MARGIN = 0.9  # of the distance of the nearest camera, that the box's corners may reach
POINT_SHELL = 0.8  # of the cameras' mean distance, within which sparse points belong to the object
FACE_CELLS = 24  # across each face, of the cells whose opacity is measured
MIN_SHARE_OF_VIEWS = 0.5  # that contain a cell for its opacity to count
MAX_FACE_OPACITY = 0.12  # mean over the faces: right runs have 0 to .07, cut ones .20 to .30


@dataclass(frozen=True)
class Foreground:
    """Foreground of the views at a small size.

    Attributes:
        masks: bool [V, H, W].
        scored: bool [V, H, W], False at pixels that show nothing known.
        intrinsics: [V, 3, 3] in pixels of this size.
    """

    masks: Tensor
    scored: Tensor
    intrinsics: Tensor

    def to(self, device: torch.device) -> Foreground:
        """Return the same on a device."""
        return Foreground(self.masks.to(device), self.scored.to(device), self.intrinsics.to(device))

    def share_outside(self, poses: Tensor) -> float:
        """Return the share of the foreground whose rays from poses [V, 4, 4] miss the box."""
        origins, directions = self._rays(poses)
        inverse = 1 / torch.where(directions.abs() < 1e-9, 1e-9, directions)
        low, high = (-1 - origins) * inverse, (1 - origins) * inverse
        enter, leave = torch.minimum(low, high).amax(-1), torch.maximum(low, high).amin(-1)
        return float((leave < enter.clamp_min(0)).float().mean()) if len(origins) else 0.0

    def radius(self, poses: Tensor) -> float:
        """Return the distance from the origin that the rays of the foreground reach, without outliers."""
        origins, directions = self._rays(poses)
        distance = torch.linalg.cross(origins, directions).norm(dim=-1)
        return _upper_quantile(distance)

    def is_cut_by_images(self) -> bool:
        """Return whether the foreground goes beyond the images."""
        border = torch.zeros_like(self.scored)
        border[:, [0, -1]] = border[:, :, [0, -1]] = True
        border &= self.scored
        return bool((self.masks & border).sum() > CUT_BORDER * border.sum())

    def share_of_views(self, poses: Tensor, positions: Tensor) -> Tensor:
        """Return the share [P] of the cameras at poses [V, 4, 4] whose images contain positions [P, 3]."""
        return self._project(poses, self.intrinsics, positions)[1].float().mean(0)

    def covers(self, view: int, pose: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return which positions [P, 3] a view at ``pose`` [4, 4] has scored pixels of, and which lie in its masks."""
        pixels, seen = self._project(pose[None], self.intrinsics[view, None], positions)
        height, width = self.masks.shape[1:]
        column, row = pixels[0].floor().clamp_min(0).long().unbind(-1)
        row, column = row.clamp_max(height - 1), column.clamp_max(width - 1)
        return seen[0] & self.scored[view, row, column], seen[0] & self.masks[view, row, column]

    def _project(self, poses: Tensor, intrinsics: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pixels [V, P, 2] of positions [P, 3], and whether they are in the images [V, P]."""
        local = (positions - poses[:, None, :3, 3]) @ poses[:, :3, :3]
        depth = -local[..., 2]
        pixels = torch.stack([local[..., 0], -local[..., 1]], -1) / depth[..., None].clamp_min(1e-6)
        pixels = pixels * intrinsics.diagonal(dim1=1, dim2=2)[:, None, :2] + intrinsics[:, None, :2, 2]
        height, width = self.masks.shape[1:]
        return pixels, (pixels >= 0).all(-1) & (pixels <= pixels.new_tensor([width, height])).all(-1) & (depth > 0)

    def _rays(self, poses: Tensor) -> tuple[Tensor, Tensor]:
        rays = image_rays(poses, self.intrinsics, *self.masks.shape[1:])
        return rays.origins[self.masks], rays.directions[self.masks]


def find_foreground(views: Views) -> Foreground | None:
    """Return the foreground by masks, else by the background's colour; None if neither is known."""
    if views.masks is None and views.background is None:
        return None
    size = target_size(min(FOREGROUND_SIDE, max(views.size)), *views.size)
    if views.masks is not None:
        masks = resize_area(views.masks, *size)[:, 0] > 0.5
    else:
        assert views.background is not None
        difference = (resize_area(views.images, *size) - views.background[:, None, None]).abs().amax(1)
        masks = difference > MIN_DIFFERENCE
    scored = torch.ones_like(masks)
    if views.loss_masks is not None:
        scored = resize_area(views.loss_masks, *size)[:, 0] > 0.5
    return Foreground(masks & scored, scored, views.resize(size).intrinsics)


def mask_centroids(masks: Tensor) -> Tensor:
    """Return the centroids [V, 2] of masks [V, H, W] in pixels from the top left corner; 0 where a mask is empty."""
    height, width = masks.shape[1:]
    counts = masks.sum((1, 2))
    x = torch.arange(width, device=masks.device) + 0.5
    y = torch.arange(height, device=masks.device) + 0.5
    return torch.stack([(masks.sum(1) * x).sum(1), (masks.sum(2) * y).sum(1)], 1) / counts.clamp_min(1)[:, None]


def choose_scale(poses: Tensor, foreground: Foreground | None, points: Tensor | None) -> tuple[float, str]:
    """Return by which factor the box has to grow, at least 1, and why.

    Args:
        poses: of the views, [V, 4, 4], in coordinates in which the box is [-1, 1]^3.
        foreground: of the views, if known.
        points: sparse points [P, 3] of the scene in these coordinates, if known.
    """
    distances = poses[:, :3, 3].norm(dim=1)
    scale, reason = 1.0, f"{FRAMING:.0%} of the image"
    if foreground is not None and foreground.share_outside(poses) > MAX_OUTSIDE:
        scale, reason = foreground.radius(poses), "the foreground of the views"
        if foreground.is_cut_by_images():
            scale, reason = (
                max(scale, CUT_SCALE),
                f"{CUT_SCALE * FRAMING:.1f} times the image, since the images cut the object",
            )
    if points is not None:
        reach = points.norm(dim=1)
        inside = reach[reach < POINT_SHELL * distances.mean()]
        if len(inside) and (radius := _upper_quantile(inside)) > scale:
            scale, reason = radius, "the sparse points"
    limit = CAMERA_MARGIN * float(distances.min()) / 3**0.5
    if 1 < limit < scale:
        scale, reason = limit, "the nearest camera"
    return max(1.0, scale), reason


def _upper_quantile(values: Tensor) -> float:
    return float(values.sort().values[int((1 - OUTLIERS) * (len(values) - 1))])


@torch.no_grad()
def face_opacity(field: Field, foreground: Foreground, poses: Tensor) -> float:
    """Return the mean opacity of a layer of cells along the six faces of the box, where enough views show them.

    What few views show may be fog.
    """
    cell = 2 / FACE_CELLS
    line = torch.arange(FACE_CELLS) * cell - 1 + cell / 2
    u, v = torch.meshgrid(line, line, indexing="ij")
    faces = [torch.stack([torch.full_like(u, side * (1 - cell / 2)), u, v], -1) for side in (-1, 1)]
    positions = torch.cat([face.roll(axis, -1).reshape(-1, 3) for face in faces for axis in range(3)]).to(poses)
    positions = positions[foreground.share_of_views(poses, positions) >= MIN_SHARE_OF_VIEWS]
    if not len(positions):
        return 0.0
    density = field(positions, torch.nn.functional.normalize(-positions, dim=1))[0].float()
    return float((1 - (-density * cell).exp()).mean())


def box_checks(field: Field, foreground: Foreground | None, poses: Tensor, layout: str) -> list[Check]:
    """Return the checks whether the box cuts the scene.

    Args:
        field: fitted.
        foreground: of the views; None: unknown.
        poses: of the views, [V, 4, 4].
    """
    names = ("foreground beside the box", "opacity at the box's faces")
    if layout != "object":
        return [Check(name, not_run="since the box of a forward-facing scene has no walls in view") for name in names]
    if getattr(field, "unbounded", False):
        return [Check(name, not_run="since the field covers all of space") for name in names]
    if foreground is None:
        reason = "since the views have neither masks nor a background of one colour"
        return [Check(name, not_run=reason) for name in names]
    outside, opacity = foreground.share_outside(poses), face_opacity(field, foreground, poses)
    help_text = "Set the side of the box with box= (--box), or correct the masks"
    texts = (
        f"cut: the field's box does not contain {outside:.0%} of the foreground of the views. {help_text}",
        f"cut: the scene goes on beyond the field's box, whose faces are {opacity:.0%} opaque. {help_text}",
    )
    limits = (MAX_OUTSIDE, MAX_FACE_OPACITY)
    return [
        Check(name, value, high=limit, failures=(text,) if value > limit else ())
        for name, value, limit, text in zip(names, (outside, opacity), limits, texts, strict=True)
    ]
