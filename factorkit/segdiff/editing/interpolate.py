"""Interpolation of images by mixing them under noise (thesis, fig. 2.12)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from factorkit.diffusion.samplers import sample
from factorkit.diffusion.schedule import Schedule
from factorkit.segdiff.config import ResolvedSegdiffConfig
from factorkit.segdiff.hierarchy import SegdiffModel
from factorkit.segdiff.inference.segment import hard_labels
from factorkit.utils.errors import ConfigError, DataError, format_count
from factorkit.utils.images import signed_to_unit
from factorkit.utils.rng import derived_seed


class Interpolation(NamedTuple):
    """The frames from images a to images b, with their masks.

    Attributes:
        images: [n, frames, 3, R, R] in [0, 1]; the first frame is the model's reconstruction of a, the last one of b.
        masks: [n, frames, K, R, R].
        labels: int64 [n, frames, R, R].
        shares: [frames], the share of b in each frame, from 0 to 1.
        a: [n, 3, R, R] in [0, 1], the first images as the model sees them.
        b: [n, 3, R, R] in [0, 1], the last ones.
    """

    images: Tensor
    masks: Tensor
    labels: Tensor
    shares: Tensor
    a: Tensor
    b: Tensor


@torch.no_grad()
def interpolate_images(
    model: SegdiffModel,
    config: ResolvedSegdiffConfig,
    schedule: Schedule,
    a: Tensor,
    b: Tensor,
    *,
    frames: int,
    t: int,
    steps: int,
    sampler: str,
    seed: int,
) -> Interpolation:
    """Interpolate from ``a`` to ``b``, both [n, 3, R, R] in [-1, 1], or [1, 3, R, R].

    Both get the same noise of level t, are mixed there, and the mixtures are denoised (Ho et al. 2020, section 4.3, who
    use independent noise):

        x_t(s) = (1 - s) x_t^a + s x_t^b = sqrt(ab_t) ((1 - s) a + s b) + sqrt(1 - ab_t) eps

    With shared noise a linear mixture has the variance of level t for every s; independent noises have it only on a
    sphere. The sampler's noise is shared by all frames too, so only s differs between them.

    Raises:
        ConfigError: fewer than two frames, an unknown sampler, or steps out of range.
        DataError: numbers of images that cannot be paired.
    """
    if frames < 2:
        raise ConfigError(f"frames={frames}: an interpolation has at least 2, its ends")
    if steps < 1:
        raise ConfigError(f"steps={steps}: at least one denoising step is needed")
    generator = torch.Generator().manual_seed(derived_seed("interpolate", seed))
    eps = torch.randn(a.shape[1:], generator=generator)
    shares = torch.linspace(0, 1, frames)
    images, masks = [], []
    a, b = pair_images(a, b)
    for start, end in zip(a, b, strict=True):
        mixed = torch.lerp(start, end, shares[:, None, None, None])
        x_t = schedule.noise(mixed.to(schedule.device), eps.to(schedule.device), torch.full((frames,), t))
        samples = sample(
            model,
            x_t.shape,
            schedule=schedule,
            prediction=config.prediction,
            sampler=sampler,
            x_start=x_t,
            t_start=t + 1,
            steps=min(steps, t + 1),
            shared_noise=True,
            seed=derived_seed("interpolate", seed, "steps"),
        )
        images.append(signed_to_unit(samples.images))
        masks.append(samples.bottleneck.masks.float().cpu())
    stacked = torch.stack(masks)
    labels = hard_labels(stacked, config.nesting)
    return Interpolation(torch.stack(images), stacked, labels, shares, signed_to_unit(a), signed_to_unit(b))


def pair_images(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return two batches of images of one length; a single image is paired with all of the others.

    Raises:
        DataError: numbers of images that cannot be paired.
    """
    count = max(len(a), len(b))
    if {len(a), len(b)} - {1, count}:
        raise DataError(f"{format_count(len(a), 'image')} cannot be paired with {len(b)}: give as many of each, or one")
    return a.expand(count, *a.shape[1:]), b.expand(count, *b.shape[1:])
