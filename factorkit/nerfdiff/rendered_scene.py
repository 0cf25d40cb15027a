"""What every scene has, trained or read from a file: a field, a camera, and images rendered from poses."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from factorkit.data.views.views import target_size
from factorkit.nerfdiff.cameras.poses import camera_path
from factorkit.nerfdiff.fields.base import Field
from factorkit.nerfdiff.rays import CameraModel, render_views
from factorkit.utils import distributed
from factorkit.utils.errors import ConfigError, DataError

MAX_RAYS = 1 << 18  # of whole images in memory at once


class RenderedViews(NamedTuple):
    """Images [B, 3, H, W] in [0, 1], depth [B, H, W] (expected; 0 where empty), opacity [B, H, W], poses [B, 4, 4]."""

    images: Tensor
    depth: Tensor
    opacity: Tensor
    poses: Tensor


class SceneModel(Protocol):
    """What is rendered: a field, and the poses [V, 4, 4], size and camera model of its views."""

    @property
    def field(self) -> Field: ...  # noqa: D102
    @property
    def views(self) -> Tensor: ...  # noqa: D102
    @property
    def size(self) -> tuple[int, int]: ...  # noqa: D102
    @property
    def samples_per_ray(self) -> int: ...  # noqa: D102
    @property
    def camera(self) -> CameraModel: ...  # noqa: D102


class RenderedScene:
    """Render a scene from poses and along camera paths."""

    model: SceneModel
    device: torch.device

    @property
    def poses(self) -> Tensor:
        """The poses of the views, [V, 4, 4]."""
        return self.model.views.cpu()

    def _make_path(self, kind: str, frames: int) -> Tensor:
        """Return the poses [frames, 4, 4] of a path; see :func:`factorkit.nerfdiff.cameras.poses.camera_path`."""
        return camera_path(kind, frames, self.poses, "forward" if self.model.camera.forward_facing else "object")

    def render(
        self,
        poses: Tensor,
        size: int | tuple[int, int] | None = None,
        appearance_view: int | None = None,
        intrinsics: Tensor | None = None,
    ) -> RenderedViews:
        """Render the scene from poses [B, 4, 4] in the scene's coordinates.

        Args:
            poses: camera-to-world.
            size: the longer side, or height and width; None: as trained. Another aspect ratio than in training shows
                more or less to the left and right.
            appearance_view: index of the training view whose appearance to apply, with ``appearance_dim=``; None: the
                mean appearance.
            intrinsics: K [3, 3] or [B, 3, 3] in pixels of images of ``size``; None: those of the training views.

        Raises:
            ConfigError: no such appearance, or another aspect ratio in a forward-facing scene without ``intrinsics``.
            DataError: poses or intrinsics of another shape, or poses that are not finite.
        """
        size = self.model.size if size is None else target_size(size, *self.model.size)
        if poses.dim() != 3 or poses.shape[1:] != (4, 4) or not poses.isfinite().all():
            raise DataError(f"poses of shape {tuple(poses.shape)}: give [B, 4, 4], all of them finite")
        camera, own = self.model.camera, None
        if intrinsics is None:
            camera = camera.with_image_shape(self.model.size, size)
        elif intrinsics.shape not in ((3, 3), (len(poses), 3, 3)):
            raise DataError(f"intrinsics of shape {tuple(intrinsics.shape)}: give [3, 3] or [{len(poses)}, 3, 3]")
        else:
            own = (intrinsics.cpu() / torch.tensor([size[1], size[0], 1.0])[:, None]).expand(len(poses), 3, 3)
            own = own.to(self.device)
        field, views = self.model.field, None
        if appearance_view is not None:
            if field.appearance is None:
                raise ConfigError(f"appearance_view={appearance_view} needs a run trained with appearance_dim=4 or so")
            if not 0 <= appearance_view < len(self.poses):
                raise ConfigError(f"appearance_view={appearance_view}: give a view from 0 to {len(self.poses) - 1}")
            views = torch.full((len(poses),), appearance_view, device=self.device)
        samples = self._samples_per_ray(size)

        def render_rows(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            parts = []
            for index in torch.arange(len(poses))[rows].split(max(1, MAX_RAYS // (size[0] * size[1]))):
                of_views = None if views is None else views[index]
                lens = None if own is None else own[index]
                rendered = render_views(field, poses[index].to(self.device), camera, size, samples, of_views, lens)
                color = rendered.color.movedim(-1, 1).clamp(0, 1)
                parts.append((color.cpu(), rendered.depth.cpu(), rendered.opacity.cpu()))
            color, depth, opacity = (torch.cat(x) for x in zip(*parts, strict=True))
            return color, depth, opacity

        return RenderedViews(*distributed.map_shares(render_rows, len(poses)), poses)

    def _samples_per_ray(self, size: tuple[int, int]) -> int:
        """Return the samples along a ray of an image: more than in training, since they are not jittered."""
        return max(2 * self.model.samples_per_ray, max(size) // 2)

    def render_path(
        self,
        path: str | Tensor = "orbit",
        size: int | tuple[int, int] | None = None,
        frames: int = 60,
        appearance_view: int | None = None,
    ) -> RenderedViews:
        """Render the scene along a camera path (thesis, fig. 3.8).

        Args:
            path: ``"orbit"``, ``"spiral"``, or poses [B, 4, 4] in the scene's coordinates.
            size: as in :meth:`render`.
            frames: of an orbit or spiral.
            appearance_view: as in :meth:`render`.

        Raises:
            ConfigError: an unknown path, no frames, or no such appearance.

        Example:
            >>> video = scene.render_path("orbit", frames=3, size=12)
            >>> video.images.shape, video.depth.shape
            (torch.Size([3, 3, 12, 12]), torch.Size([3, 12, 12]))
        """
        if isinstance(path, str):
            path = self._make_path(path, frames)
        return self.render(path, size, appearance_view)
