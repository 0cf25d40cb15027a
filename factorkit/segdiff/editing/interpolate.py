"""Interpolation of images by mixing them under their own noise (thesis, fig. 2.12)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from factorkit.diffusion.inversion import invert
from factorkit.diffusion.samplers import NoiseLevel, sample
from factorkit.diffusion.schedule import Schedule
from factorkit.segdiff.config import ResolvedSegdiffConfig
from factorkit.segdiff.hierarchy import SegdiffModel
from factorkit.segdiff.inference.segment import hard_labels, lift_masks
from factorkit.utils.errors import ConfigError, DataError, format_count
from factorkit.utils.images import signed_to_unit

MIN_SINE = 1e-3  # of an angle between noises, below which they count as parallel


class Interpolation(NamedTuple):
    """The frames from images a to images b, with their masks.

    Attributes:
        images: [n, frames, 3, R, R] in [0, 1]; the first frame reconstructs a, the last one b.
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
) -> Interpolation:
    """Interpolate from ``a`` to ``b``, both [n, 3, R, R] in [-1, 1], or [1, 3, R, R].

    DDIM inversion takes both to level t, x_t = sqrt(ab_t) image + sqrt(1 - ab_t) eps. Images are mixed linearly, and
    noise on the sphere, where the mixture keeps its variance (Song et al. 2021, appendix D.5):

        x_t(s) = sqrt(ab_t) ((1 - s) a + s b) + sqrt(1 - ab_t) slerp(eps^a, eps^b, s)

    DDIM denoises the mixtures, so the end frames return to a and b. The noise is that of the images, where the thesis
    (and Ho et al. 2020, section 4.3) draws noise at random: its ends do not resemble the images.

    Raises:
        ConfigError: fewer than two frames, or steps out of range.
        DataError: numbers of images that cannot be paired.
    """
    if frames < 2:
        raise ConfigError(f"frames={frames}: an interpolation has at least 2, its ends")
    if steps < 1:
        raise ConfigError(f"steps={steps}: at least one denoising step is needed")
    strides: dict[str, Any] = {"prediction": config.prediction, "t_start": t + 1, "steps": min(steps, t + 1)}
    strides |= {"schedule": schedule, "clip": model.space.clip}
    shares = torch.linspace(0, 1, frames)
    level = NoiseLevel(float(schedule.signals[t]), float(schedule.sigmas[t]))
    images, masks = [], []
    a, b = pair_images(a, b)
    for pair in zip(a, b, strict=True):
        ends = model.space.encode(torch.stack(pair).to(schedule.device))
        start, end = (invert(model, ends, **strides) - level.signal * ends) / level.sigma
        s = shares.to(schedule.device)[:, None, None, None]
        x_t = level.signal * torch.lerp(ends[0], ends[1], s) + level.sigma * slerp(start, end, s)
        samples = sample(model, x_t.shape, sampler="ddim", x_start=x_t, **strides)
        decoded = model.space.decode(samples.images)
        images.append(signed_to_unit(decoded))
        masks.append(lift_masks(samples.bottleneck.masks.float(), decoded).cpu())
    stacked = torch.stack(masks)
    labels = hard_labels(stacked, config.nesting)
    return Interpolation(torch.stack(images), stacked, labels, shares, signed_to_unit(a), signed_to_unit(b))


def slerp(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    """Interpolate from ``a`` (s = 0) to ``b`` (s = 1) along the great circle through both directions.

    Tensors of one shape, taken as vectors; ``s`` is broadcast against them. Parallel vectors are mixed linearly.
    """
    angle = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1).acos()
    if angle.sin() < MIN_SINE:
        return torch.lerp(a.expand_as(s * a), b.expand_as(s * b), s)
    return (((1 - s) * angle).sin() * a + (s * angle).sin() * b) / angle.sin()


def pair_images(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return two batches of images of one length; a single image is paired with all of the others.

    Raises:
        DataError: numbers of images that cannot be paired.
    """
    count = max(len(a), len(b))
    if {len(a), len(b)} - {1, count}:
        raise DataError(f"{format_count(len(a), 'image')} cannot be paired with {len(b)}: give as many of each, or one")
    return a.expand(count, *a.shape[1:]), b.expand(count, *b.shape[1:])
