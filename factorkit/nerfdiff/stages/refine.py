"""A field fitted to views: with their poses given, free, or refined from where a search left them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from factorkit.engine.step import StepLoss
from factorkit.nerfdiff.alarms import scene_alarms
from factorkit.nerfdiff.config import NerfdiffConfig
from factorkit.nerfdiff.fields.grid import Field
from factorkit.nerfdiff.fields.occupancy import look_again
from factorkit.nerfdiff.rays import Optics, render_pixels
from factorkit.nerfdiff.scene import Scene, blurred, picked
from factorkit.nerfdiff.watch import cameras_sheet
from factorkit.rendering import Rendered
from factorkit.utils.rng import BatchDraw

FIELD_BETAS = (0.9, 0.99)  # a cell is seen by few rays a step: moments over a thousand steps would be of another scene
ANNEALED = 0.6  # share of the steps over which what is coarse at the beginning sharpens
BLUR = 0.094  # of the views where all is as coarse as can be, in units of the longer side
EVERY = 10  # steps between changes of the blur


class Fit(nn.Module):
    """A field and where its views were taken from.

    Args:
        poses: a module that answers the poses [B, 4, 4] of view indices [B].
        optics: of all views.
        free_focal: whether their focal length is a parameter too, which starts at that of ``optics``.
    """

    def __init__(
        self,
        field: Field,
        poses: nn.Module,
        optics: Optics,
        size: tuple[int, int],
        samples: int,
        free_focal: bool = False,
    ):
        super().__init__()
        self.field, self.poses = field, poses
        self.given, self.size, self.samples = optics, size, samples
        self.log_focal = nn.Parameter(torch.zeros((), device=optics.intrinsics.device)) if free_focal else None

    @property
    def optics(self) -> Optics:
        """Of all views, as they stand now."""
        if self.log_focal is None:
            return self.given
        zoom = torch.stack([self.log_focal.exp(), self.log_focal.exp(), torch.ones_like(self.log_focal)])
        focal = torch.diag(self.given.intrinsics.diagonal() * zoom)
        centre = self.given.intrinsics - torch.diag(self.given.intrinsics.diagonal())
        return replace(self.given, intrinsics=focal + centre)

    def forward(self, indices: Tensor, pixels: Tensor, seed: int, first: int = 0, **options: Any) -> Rendered:
        """What is seen at pixels [B, R] of views [B]; ``options`` go to the poses, seed and first as
        :func:`factorkit.nerfdiff.rays.render_pixels` takes them."""
        poses = self.poses(indices, **options)
        return render_pixels(self.field, poses, self.optics, pixels, self.size, self.samples, seed, indices, first)


def field_groups(field: Field, rate: float, base: float) -> list[dict[str, Any]]:
    """Adam's groups of a field that learns at ``rate``, in units of the learning rate ``base``."""
    return [{"params": part, "scale": speed / base, "betas": FIELD_BETAS} for part, speed in field.rates(rate)]


def prior(config: NerfdiffConfig, scene: Scene, field: Field, seen: Rendered) -> Tensor:
    """What the objective [B] has beside the views' errors: the field's roughness, and around an object the fog seen.

    Fog of the background's colour shows in no picture that a field is fitted to, but in those of other cameras it does.
    """
    rough = config.tv_weight * field.roughness()
    return rough + config.opacity_weight * seen.opacity.mean(1) if scene.layout == "object" else rough


class FitTask:
    """Squared errors of random rays through the views.

    Args:
        config: of the stage.
        chosen: indices of the views to fit; None: all.
        sheets: what the stage is called on sample sheets; None: it draws none.
        hot: how coarse field and views are at the beginning, 0 (as they are) to 1: for poses that are far off.
    """

    capturable = False  # steps along a ray are jittered by a number the host knows

    def __init__(
        self,
        config: NerfdiffConfig,
        scene: Scene,
        model: Fit,
        chosen: Tensor | None = None,
        sheets: str | None = None,
        hot: float = 0.0,
    ):
        self.config, self.scene, self.model, self.sheets, self.hot = config, scene, model, sheets, hot
        self._blurred: tuple[float, Tensor] = (0.0, scene.images)
        self.chosen = torch.arange(len(scene.images)) if chosen is None else chosen
        self.size = len(self.chosen)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The field at the stage's learning rate; poses, where they are free, at theirs."""
        groups = field_groups(self.model.field, self.config.learning_rate, self.config.learning_rate)
        poses = [p for p in self.model.poses.parameters() if p.requires_grad]
        poses += [] if self.model.log_focal is None else [self.model.log_focal]
        scale = self.config.pose_learning_rate / self.config.learning_rate
        return groups + ([{"params": poses, "scale": scale, "betas": FIELD_BETAS}] if poses else [])

    def loss(self, model: nn.Module, indices: Tensor, draw: BatchDraw, step: Tensor) -> StepLoss:
        self.model.field.coarseness = self.heat(int(step))
        which = self.chosen[indices]
        if draw.first:
            look_again(self.model.field, int(step))
        images = self.images(int(step))[which.to(self.scene.images.device)]
        pixels = draw.integers(0, images.shape[2] * images.shape[3], self.config.rays_per_view)
        first = draw.rows.start * self.config.rays_per_view
        seen = model(which, pixels, int(step), first, **self.options(draw, int(step)))
        error = (seen.color - picked(images, pixels)).square().mean((1, 2))
        objective = error + prior(self.config, self.scene, self.model.field, seen)
        return StepLoss(objective, error, torch.zeros_like(error), {})

    def heat(self, step: int) -> float:
        """``hot`` at the beginning, 0 once all is sharp."""
        return self.hot * max(0.0, 1 - step / (ANNEALED * self.config.steps))

    def images(self, step: int) -> Tensor:
        """What the views are compared with at this step, [V, 3, H, W]."""
        sigma = round(self.heat(step // EVERY * EVERY) * BLUR * max(self.scene.size), 2)
        if self._blurred[0] != sigma:
            self._blurred = sigma, blurred(self.scene.images, sigma)
        return self._blurred[1]

    def options(self, draw: BatchDraw, step: Tensor) -> dict[str, Tensor]:
        """What else the poses are to know."""
        return {}

    def inspect(self, model: Fit, step: int, folder: Path) -> dict[str, Any]:
        """Where the cameras stand, drawn and in figures."""
        if self.sheets is None:
            return {}
        poses = model.poses(torch.arange(len(self.scene.images)))
        cameras_sheet(folder / f"{step:06d}_cameras_{self.sheets}.png", self.scene.layout, poses)
        if self.scene.layout != "object":
            return {}
        return scene_alarms(self.config, self.scene, model.field, poses, settled=step == self.config.steps)
