"""Images and their masks from noise (thesis, algorithm 2)."""

from __future__ import annotations

import torch

from factorkit.diffusion.samplers import Samples, sample
from factorkit.diffusion.schedule import Schedule
from factorkit.segdiff.config import SegdiffConfig
from factorkit.segdiff.model import FactorizedUNet


def draw_images(
    model: FactorizedUNet, config: SegdiffConfig, count: int, *, sampler: str = "ddim", steps: int | None = 50,
    seed: int = 0, device: torch.device, progress: bool = False, trajectory: bool = False,
) -> Samples:  # fmt: skip
    """``count`` images [count, 3, R, R] in [-1, 1] with their :class:`~factorkit.segdiff.model.Regions`.

    A model trained on t < t_max alone starts there instead of at T.
    """
    start = config.timesteps if config.tail else config.t_max
    return sample(
        model,
        (count, 3, config.resolution, config.resolution),
        schedule=Schedule(config.timesteps, device=device),
        prediction=config.prediction,
        sampler=sampler,
        steps=min(steps, start) if steps else steps,
        t_start=start,
        seed=seed,
        progress=progress,
        trajectory=trajectory,
    )
