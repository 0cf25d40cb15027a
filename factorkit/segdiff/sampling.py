"""Images and their masks from noise (thesis, algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from factorkit.diffusion.denoiser import Denoiser, GuidedDenoiser
from factorkit.diffusion.samplers import Samples, SamplingStep, sample
from factorkit.diffusion.schedule import Schedule, to_x0
from factorkit.segdiff.config import ResolvedSegdiffConfig
from factorkit.segdiff.hierarchy import SegdiffModel
from factorkit.segdiff.inference.segment import lift_masks
from factorkit.segdiff.network import PixelSpace, Regions
from factorkit.utils.errors import ConfigError
from factorkit.utils.rng import derived_seed

SAMPLE_BATCH_SIZE = 64  # images generated at once
DEFAULT_SAMPLER, DEFAULT_STEPS = "dpm++", 20  # the table of samplers in docs/generation.md


class Frame(NamedTuple):
    """One step of the denoising from noise to image (thesis, fig. 2.10)."""

    t: int
    images: Tensor  #: [n, 3, R, R] in [0, 1], the estimate of the clean image at level t
    masks: Tensor  #: [n, K, R, R]


class Generation(NamedTuple):
    """Generated images with the masks that they were composed by.

    Attributes:
        images: [n, 3, R, R] in [0, 1].
        masks: [n, K, R, R].
        labels: int64 [n, R, R].
        trajectory: every denoising step, noise first, if requested.
        classes: the requested class of each image, None for any; None if no class was requested.
    """

    images: Tensor
    masks: Tensor
    labels: Tensor
    trajectory: list[Frame] | None
    classes: list[str | None] | None = None


def num_trained_times(config: ResolvedSegdiffConfig) -> int:
    """Return the number of time steps that the model was trained on; generation starts at the last of them."""
    return config.timesteps if config.high_noise_fraction else config.t_max


def check_edit_time(config: ResolvedSegdiffConfig, t: int | None) -> int:
    """Return the time step to which images are noised for editing; None: a quarter of the trained ones.

    Raises:
        ConfigError: the model was not trained at time step t.
    """
    count = num_trained_times(config)
    t = count // 4 if t is None else t
    if not 0 <= t < count:
        raise ConfigError(f"t={t} must lie between 0 and {count - 1}, the noisiest level this model was trained on")
    return t


def estimate_branches(prediction: str, schedule: Schedule, x_t: Tensor, branches: Tensor, t: Tensor) -> Tensor:
    """Return the clean images [B, K, 3, H, W] that the outputs of the branches, of the same shape, stand for.

    The clean image is affine in the output and the masks sum to one, so sum_k m_k x0_k is the model's own estimate.
    """
    return torch.stack([to_x0(prediction, schedule, x_t, out.float(), t) for out in branches.unbind(1)], dim=1)


def draw_images(
    model: nn.Module,
    config: ResolvedSegdiffConfig,
    count: int,
    *,
    sampler: str = DEFAULT_SAMPLER,
    steps: int | None = DEFAULT_STEPS,
    seed: int = 0,
    device: torch.device,
    progress: bool = False,
    trajectory: bool = False,
    labels: Tensor | None = None,
    guidance: float = 1.0,
    rows: slice | None = None,
) -> Samples:
    """Generate ``count`` images [count, 3, R, R] in [-1, 1] with their :class:`~factorkit.segdiff.network.Regions`.

    A model trained only on t < t_max starts there instead of at T. Images are generated in batches, of which only
    images and masks are kept, on the CPU.

    Args:
        sampler, steps, seed, trajectory: as for :meth:`factorkit.segdiff.run.SegdiffRun.generate`.
        labels: classes int64 [count], -1 for none; None: no classes.
        guidance: scale of :class:`~factorkit.diffusion.denoiser.GuidedDenoiser`.
        rows: generate only these of the images; the result is the same as theirs among all.

    Raises:
        ConfigError: an unknown sampler, or steps out of range.
    """
    if steps is not None and not 1 <= steps <= config.timesteps:
        raise ConfigError(
            f"steps={steps} must lie between 1 and {config.timesteps}, the steps of this model's schedule"
        )
    channels, space = config.make_backbone().image_channels, cast(SegdiffModel, model).space
    start, (begin, end, _) = num_trained_times(config), (rows or slice(None)).indices(count)

    batches: list[Samples] = []
    for first in range(begin // SAMPLE_BATCH_SIZE * SAMPLE_BATCH_SIZE, end, SAMPLE_BATCH_SIZE):
        size = min(SAMPLE_BATCH_SIZE, count - first)
        chosen = slice(max(begin - first, 0), min(end - first, SAMPLE_BATCH_SIZE))
        denoiser = cast(Denoiser, model)
        if labels is not None:
            denoiser = GuidedDenoiser(denoiser, labels[first:][chosen].to(device), guidance)
        samples = sample(
            denoiser,
            (size, channels, config.side, config.side),
            schedule=config.build_schedule(device),
            prediction=config.prediction,
            sampler=sampler,
            steps=min(steps, start) if steps else steps,
            t_start=start,
            seed=derived_seed("generate", seed, first),
            rows=chosen,
            clip=space.clip,
            progress=progress,
            trajectory=trajectory,
        )
        batches.append(_to_images(samples, space))
    frames = None
    if trajectory:
        frames = [
            SamplingStep(
                parts[0].t,
                torch.cat([s.x_t for s in parts]),
                torch.cat([s.x0 for s in parts]),
                _concatenate([s.bottleneck for s in parts]),
            )
            for parts in zip(*(batch.trajectory or [] for batch in batches), strict=True)
        ]
    images = torch.cat([batch.images for batch in batches])
    return Samples(images, _concatenate([batch.bottleneck for batch in batches]), frames)


def _to_images(samples: Samples, space: PixelSpace) -> Samples:
    """Keep images and masks at their pixels only, on the CPU; the noisy input of a step stays what the model saw."""

    def keep(x: Tensor, regions: Regions) -> tuple[Tensor, Regions]:
        images = space.decode(x)
        return images.cpu(), Regions(lift_masks(regions.masks, images).cpu(), None)

    frames = None
    if samples.trajectory is not None:
        frames = [SamplingStep(s.t, s.x_t.cpu(), *keep(s.x0, s.bottleneck)) for s in samples.trajectory]
    return Samples(*keep(samples.images, samples.bottleneck), frames)


def _concatenate(parts: Sequence[Regions]) -> Regions:
    return Regions(torch.cat([part.masks for part in parts]), None)
