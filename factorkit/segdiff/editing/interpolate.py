"""Pictures between two pictures, by mixing them under noise (fig. 2.12)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from factorkit.diffusion.samplers import sample
from factorkit.diffusion.schedule import Schedule
from factorkit.segdiff.config import ResolvedSegdiffConfig
from factorkit.segdiff.hierarchy import hard_labels
from factorkit.segdiff.network import FactorizedUNet
from factorkit.utils.errors import ConfigError, DataError
from factorkit.utils.images import signed_to_unit
from factorkit.utils.rng import derived_seed


class Interpolation(NamedTuple):
    """The way from pictures a to pictures b, with the masks found along it.

    Attributes:
        images: [n, frames, 3, R, R] in [0, 1]; the first frame is a as the model rebuilds it, the last one b.
        masks: [n, frames, K, R, R].
        labels: int64 [n, frames, R, R].
        shares: [frames], how much of b is in each frame, from 0 to 1.
        a, b: [n, 3, R, R] in [0, 1], the pictures as the model saw them.
    """

    images: Tensor
    masks: Tensor
    labels: Tensor
    shares: Tensor
    a: Tensor
    b: Tensor


@torch.no_grad()
def interpolate_pictures(
    model: FactorizedUNet,
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
    """The ways from ``a`` to ``b``, both [n, 3, R, R] in [-1, 1], or [1, 3, R, R].

    Both are taken to level t with the same noise, mixed there, and the mixtures denoised (Ho et al. 2020, section 4.3,
    who give each picture noise of its own):

        x_t(s) = (1 - s) x_t^a + s x_t^b = sqrt(ab_t) ((1 - s) a + s b) + sqrt(1 - ab_t) eps

    The noise being shared, a straight mixture has the variance of level t for every s, which two independent noises
    have only on a sphere. The sampler's own noise is shared by all frames too: nothing but s differs along the way.

    Raises:
        ConfigError: fewer than two frames, an unknown sampler, or steps out of range.
        DataError: so many pictures cannot be paired.
    """
    if frames < 2:
        raise ConfigError(f"frames={frames}: the way from one picture to another has at least 2, its ends")
    if steps < 1:
        raise ConfigError(f"steps={steps}: at least one denoising step is needed")
    generator = torch.Generator().manual_seed(derived_seed("interpolate", seed))
    eps = torch.randn(a.shape[1:], generator=generator)
    shares = torch.linspace(0, 1, frames)
    images, masks = [], []
    a, b = paired(a, b)
    for start, end in zip(a, b, strict=True):
        mixed = torch.lerp(start, end, shares[:, None, None, None])
        x_t = schedule.noise(mixed.to(schedule.device), eps.to(schedule.device), torch.full((frames,), t))
        way = sample(
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
        images.append(signed_to_unit(way.images))
        masks.append(way.bottleneck.masks.float().cpu())
    masks = torch.stack(masks)
    return Interpolation(
        torch.stack(images), masks, hard_labels(masks, config.nesting), shares, signed_to_unit(a), signed_to_unit(b)
    )


def paired(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two batches of pictures of one length; a single picture goes with all of the others.

    Raises:
        DataError: so many pictures cannot be paired.
    """
    count = max(len(a), len(b))
    if {len(a), len(b)} - {1, count}:
        raise DataError(f"{len(a)} pictures cannot be paired with {len(b)}: give as many of each, or one")
    return a.expand(count, *a.shape[1:]), b.expand(count, *b.shape[1:])
