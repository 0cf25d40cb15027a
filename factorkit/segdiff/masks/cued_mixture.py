"""The stage that trains a spatial mixture with a cue, by its own denoising loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from factorkit.diffusion.schedule import Schedule
from factorkit.engine.config import EngineConfig
from factorkit.engine.step import StepLoss
from factorkit.segdiff.masks.spatial_mixture import EM_ROUNDS, SpatialMixture, fit_mixture, noise_error
from factorkit.utils.rng import BatchDraw

MIXTURE_TIME = 600  # noise up to this step of the linear schedule of 1000 trains the mixture


class CuedMixtureTask:
    """Train a spatial mixture with a cue by its own denoising loss.

    Mirror images are left out: they would blur the places of things that face one way (docs/results.md).

    Args:
        config: of the stage.
        mixture: to train.
        size: number of images N.
        load: returns images [N, 3, S, S] in [-1, 1] and cues [N, S, S], on the device of the training; called when the
            first step needs them.
        schedule: of the noise.
    """

    capturable = True

    def __init__(
        self,
        config: EngineConfig,
        mixture: SpatialMixture,
        size: int,
        load: Callable[[], tuple[Tensor, Tensor]],
        schedule: Schedule,
    ):
        self.config, self.size, self.load = config, size, cache(load)
        self.model: nn.Module = mixture
        self.schedule = schedule
        self.t_max = max(1, schedule.find_matching_time(MIXTURE_TIME, Schedule()))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the prior at the learning rate."""
        return [{"params": list(self.model.parameters()), "scale": 1.0}]

    def loss(self, model: nn.Module, indices: Tensor, draw: BatchDraw, step: Tensor) -> StepLoss:
        """Return the noise that the mixture leaves unexplained in the images ``indices``."""
        images, cues = self.load()
        rows = indices.to(images.device)
        x0, cue = images[rows], cues[rows]
        t, eps = draw.integers(0, self.t_max), draw.normal(*x0.shape[1:])
        x_t = self.schedule.noise(x0, eps, t)
        logits, score = fit_mixture(x_t, cast(SpatialMixture, self.model).cued_prior(cue), EM_ROUNDS)
        error = noise_error(cast(Tensor, score), self.schedule, eps, t)
        metrics = {"areas": logits.detach().softmax(1).mean((0, 2, 3))}
        return StepLoss(error, error.detach(), t / self.schedule.steps, metrics)

    def inspect(self, model: nn.Module, step: int, folder: Path) -> dict[str, Any]:
        """Return nothing: the run that uses the masks has sample grids and alarms."""
        return {}
