"""A splat file as a scene: Gaussians without views, poses and encoder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from factorkit.data.views.views import Views
from factorkit.engine.config import resolve_device
from factorkit.metrics.pose import Similarity
from factorkit.nerfdiff.cameras.poses import camera_path
from factorkit.nerfdiff.export import SPLAT_SUFFIXES
from factorkit.nerfdiff.export.splats import read_splats, save_splats
from factorkit.nerfdiff.fields.gaussians import GaussianField
from factorkit.nerfdiff.rays import CameraModel
from factorkit.nerfdiff.rendered_scene import RenderedScene
from factorkit.rendering import orbit
from factorkit.utils.errors import ConfigError
from factorkit.utils.output_record import writing_file

SIDE = 512  # pixels of renders by default
FOCAL = 1.2  # of their camera, in image sides: 45 degrees
NUM_VIEWS, ELEVATION = 8, 20.0  # of the poses around the Gaussians; degrees
EXTENT_SHARE = 0.9  # of the opacity that the views frame: some Gaussians may lie far outside
UP = {"z": (2, 1), "y": (1, 1), "-y": (1, -1), "-z": (2, -1)}  # axis and sign
Up = Literal["z", "y", "-y", "-z"]


class SplatModel(NamedTuple):
    """What is rendered; see :class:`factorkit.nerfdiff.rendered_scene.SceneModel`."""

    field: GaussianField
    views: Tensor
    size: tuple[int, int]
    camera: CameraModel
    samples_per_ray: int = 1


class SplatScene(RenderedScene):
    """Gaussians from a .spz or from the .ply of any 3DGS training, in the coordinates of the file.

    It renders and is written again; it predicts no poses and samples no views. ``poses`` are eight cameras around the
    Gaussians, which also define the paths.

    Args:
        path: the file.
        device: as :func:`factorkit.load` takes it.
        up: axis that points up; "-y" in most .ply of trainings on COLMAP's cameras. None: "z" as factorkit writes
            them, and "y" of a .spz.

    Raises:
        DataError: the file is missing, truncated or holds something else.
        ConfigError: unknown ``up``.
    """

    model: SplatModel

    def __init__(
        self, path: str | os.PathLike[str], *, device: str | torch.device = "auto", up: Up | None = None
    ) -> None:
        self.path = Path(path)
        up = up or ("y" if self.path.suffix.lower() == ".spz" else "z")
        if up not in UP:
            raise ConfigError(f"up={up!r} is unknown; choose one of {', '.join(UP)}")
        self.device = device if isinstance(device, torch.device) else resolve_device(device)
        field = read_splats(self.path).to(self.device)
        self.from_orbit, distance = _frame(field, up)
        views = self.from_orbit.apply(orbit(NUM_VIEWS, distance, ELEVATION)).to(self.device)
        camera = CameraModel(torch.tensor([[FOCAL, 0, 0.5], [0, FOCAL, 0.5], [0, 0, 1]]), torch.zeros(3))
        self.model = SplatModel(field, views, (SIDE, SIDE), camera.to(self.device))

    def _make_path(self, kind: str, frames: int) -> Tensor:
        """Return the poses [frames, 4, 4] of a path around the Gaussians."""
        around_origin = self.from_orbit.inverse().apply(self.poses)
        return self.from_orbit.apply(camera_path(kind, frames, around_origin, "object"))

    @property
    def views(self) -> Views:
        """Renders from ``poses``."""
        images, names = self.render(self.poses).images, [f"view_{i:04d}" for i in range(NUM_VIEWS)]
        intrinsics = self.model.camera.pixel_intrinsics(*self.model.size).cpu().expand(NUM_VIEWS, 3, 3)
        return Views(images, names, intrinsics, poses=self.poses, layout="object", background=torch.zeros(3))

    def export(self, path: str | Path, *, overwrite: bool = False, **options: Any) -> Path:
        """Write the Gaussians as another splat file.

        Args:
            path: a .ply or .spz.
            overwrite: replace a file of another origin.
            **options: ``kind`` is "splats" if given; the others of :meth:`NerfdiffRun.export` are of runs.

        Raises:
            ConfigError: another kind or option.
        """
        path = Path(path)
        requested = {name: value for name, value in options.items() if value not in (None, "run", "splats")}
        if requested or path.suffix.lower() not in SPLAT_SUFFIXES:
            suffixes = " or ".join(SPLAT_SUFFIXES)
            raise ConfigError(f"{path}: a splat file is written as another splat file only, {suffixes}, where it is")
        with writing_file(path, f"export: {self.path.resolve()}", overwrite=overwrite, inputs=[self.path]) as temporary:
            save_splats(temporary, path.suffix.lower(), self.model.field, None, self.from_orbit.rotation[:, 2])
        return path


def _frame(field: GaussianField, up: Up) -> tuple[Similarity, float]:
    """Return the map from a scene around the origin with z up to the field's, and the distance that frames it."""
    means, weights = field.means.cpu().double(), field.opacities.cpu().double().sigmoid()
    centre = torch.stack([_weighted_quantile(x, weights, 0.5) for x in means.unbind(1)])
    radius = _weighted_quantile((means - centre).norm(dim=1), weights, EXTENT_SHARE).clamp_min(1e-3)
    axis, sign = UP[up]
    rotation = torch.zeros(3, 3, dtype=torch.float64)
    rotation[axis, 2] = sign
    rotation[0, 0], rotation[3 - axis, 1] = 1, sign if axis == 2 else -sign
    return Similarity(rotation, centre, torch.ones((), dtype=torch.float64)), float(3 * FOCAL * radius)


def _weighted_quantile(values: Tensor, weights: Tensor, share: float) -> Tensor:
    order = values.argsort()
    total = weights[order].cumsum(0)
    index = torch.searchsorted(total, share * total[-1]).clamp_max(len(values) - 1)
    return values[order][index]
