"""Images and their masks from noise (thesis, algorithm 2)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from factorkit.diffusion.denoiser import Denoiser, GuidedDenoiser
from factorkit.diffusion.objective import to_x0
from factorkit.diffusion.samplers import Samples, SamplingStep, sample
from factorkit.diffusion.schedule import Schedule
from factorkit.segdiff.config import SegdiffConfig
from factorkit.segdiff.network import FactorizedUNet, Regions
from factorkit.utils.errors import ConfigError
from factorkit.utils.rng import derived_seed

PIECE = 64  # images drawn at once


def levels(config: SegdiffConfig) -> int:
    """How many noise levels the model was trained on; generation begins at the last of them."""
    return config.timesteps if config.high_noise_fraction else config.t_max


def edit_level(config: SegdiffConfig, t: int | None) -> int:
    """A level that pictures can be taken to and denoised from; None: a quarter of the way up.

    Raises:
        ConfigError: the model was not trained at level t.
    """
    t = levels(config) // 4 if t is None else t
    if not 0 <= t < levels(config):
        raise ConfigError(
            f"t={t} must lie between 0 and {levels(config) - 1}, the noisiest level this model was trained on"
        )
    return t


def branch_estimates(prediction: str, schedule: Schedule, x_t: Tensor, branches: Tensor, t: Tensor) -> Tensor:
    """The clean images [B, K, 3, H, W] that the branches' outputs, of the same shape, stand for.

    The clean image is affine in the output and the masks sum to one, so sum_k m_k x0_k is the model's own estimate.
    """
    return torch.stack([to_x0(prediction, schedule, x_t, out.float(), t) for out in branches.unbind(1)], dim=1)


def draw_images(
    model: FactorizedUNet,
    config: SegdiffConfig,
    count: int,
    *,
    sampler: str = "ddim",
    steps: int | None = 50,
    seed: int = 0,
    device: torch.device,
    progress: bool = False,
    trajectory: bool = False,
    labels: Tensor | None = None,
    guidance: float = 1.0,
    rows: slice | None = None,
) -> Samples:
    """``count`` images [count, 3, R, R] in [-1, 1] with their :class:`~factorkit.segdiff.network.Regions`.

    A model trained on t < t_max alone starts there instead of at T. Many images are drawn in pieces, of which nothing
    but images and masks is kept, on the CPU. labels: int64 [count], -1 for none, what the images are to be of;
    guidance: the scale of :class:`~factorkit.diffusion.denoiser.GuidedDenoiser`. rows: draw only these of them, as they are
    among all.

    Raises:
        ConfigError: an unknown sampler, or steps out of range.
    """
    if steps is not None and not 1 <= steps <= config.timesteps:
        raise ConfigError(f"steps={steps}: this model's schedule has 1 to {config.timesteps} of them")
    start, (begin, end, _) = levels(config), (rows or slice(None)).indices(count)

    def told(drawn: slice) -> Denoiser:
        return model if labels is None else GuidedDenoiser(model, labels[drawn].to(device), guidance)

    pieces = [
        _kept(
            sample(
                told(slice(max(begin, first), min(end, first + PIECE))),
                (min(PIECE, count - first), 3, config.resolution, config.resolution),
                schedule=config.build_schedule(device),
                prediction=config.prediction,
                sampler=sampler,
                steps=min(steps, start) if steps else steps,
                t_start=start,
                seed=derived_seed("generate", seed, first),
                rows=slice(max(begin - first, 0), min(end - first, PIECE)),
                progress=progress,
                trajectory=trajectory,
            )
        )
        for first in range(begin // PIECE * PIECE, end, PIECE)
    ]
    images = torch.cat([piece.images for piece in pieces])
    frames = None
    if trajectory:
        frames = [
            SamplingStep(
                level[0].t,
                torch.cat([s.x_t for s in level]),
                torch.cat([s.x0 for s in level]),
                _joined([cast(Regions, s.bottleneck) for s in level]),
            )
            for level in zip(*(piece.trajectory for piece in pieces), strict=True)
        ]
    return Samples(images, _joined([cast(Regions, piece.bottleneck) for piece in pieces]), frames)


def _kept(piece: Samples) -> Samples:
    """What is wanted of a piece, where there is room for many."""
    masks = lambda bottleneck: Regions(cast(Regions, bottleneck).masks.cpu(), None)  # noqa: E731
    frames = None
    if piece.trajectory is not None:
        frames = [SamplingStep(s.t, s.x_t.cpu(), s.x0.cpu(), masks(s.bottleneck)) for s in piece.trajectory]
    return Samples(piece.images.cpu(), masks(piece.bottleneck), frames)


def _joined(parts: list[Regions]) -> Regions:
    return Regions(torch.cat([part.masks for part in parts]), None)
