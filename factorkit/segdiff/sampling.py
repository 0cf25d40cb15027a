"""Images and their masks from noise (thesis, algorithm 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from factorkit.diffusion.denoiser import Denoiser
from factorkit.diffusion.guidance import Guided
from factorkit.diffusion.samplers import Samples, Step, sample
from factorkit.engine.streams import derived_seed
from factorkit.errors import ConfigError
from factorkit.segdiff.config import SegdiffConfig
from factorkit.segdiff.model import FactorizedUNet, Regions

PIECE = 64  # images drawn at once


def draw_images(
    model: FactorizedUNet, config: SegdiffConfig, count: int, *, sampler: str = "ddim", steps: int | None = 50,
    seed: int = 0, device: torch.device, progress: bool = False, trajectory: bool = False,
    labels: Tensor | None = None, guidance: float = 1.0,
) -> Samples:  # fmt: skip
    """``count`` images [count, 3, R, R] in [-1, 1] with their :class:`~factorkit.segdiff.model.Regions`.

    A model trained on t < t_max alone starts there instead of at T. Many images are drawn in pieces, so that memory
    does not grow with their number. labels: int64 [count], -1 for none, what the images are to be of; guidance: the
    scale of :class:`~factorkit.diffusion.guidance.Guided`.

    Raises:
        ConfigError: an unknown sampler, or steps out of range.
    """
    if steps is not None and not 1 <= steps <= config.timesteps:
        raise ConfigError(f"steps={steps}: this model's schedule has 1 to {config.timesteps} of them")
    start = config.timesteps if config.tail else config.t_max

    def told(first: int) -> Denoiser:
        return model if labels is None else Guided(model, labels[first : first + PIECE].to(device), guidance)

    pieces = [
        sample(
            told(first),
            (min(PIECE, count - first), 3, config.resolution, config.resolution),
            schedule=config.noising(device),
            prediction=config.prediction,
            sampler=sampler,
            steps=min(steps, start) if steps else steps,
            t_start=start,
            seed=derived_seed("generate", seed, first),
            progress=progress,
            trajectory=trajectory,
        )
        for first in range(0, count, PIECE)
    ]
    images = torch.cat([piece.images for piece in pieces])
    frames = None
    if trajectory:
        frames = [
            Step(
                level[0].t, torch.cat([s.x_t for s in level]), torch.cat([s.x0 for s in level]),
                _joined([s.bottleneck for s in level]),
            )
            for level in zip(*(piece.trajectory for piece in pieces), strict=True)
        ]  # fmt: skip
    return Samples(images, _joined([piece.bottleneck for piece in pieces]), frames)


def _joined(parts: list[Regions]) -> Regions:
    branches = None if parts[0].branches is None else torch.cat([part.branches for part in parts])
    return Regions(torch.cat([part.masks for part in parts]), branches)
