"""Decomposition of images into the outputs of the branches: the factorization made visible (thesis, fig. 2.9)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from factorkit.diffusion.schedule import Schedule, to_x0
from factorkit.segdiff.config import ResolvedSegdiffConfig
from factorkit.segdiff.hierarchy import SegdiffModel
from factorkit.segdiff.inference.segment import add_noise, lift_masks
from factorkit.segdiff.sampling import SAMPLE_BATCH_SIZE, estimate_branches
from factorkit.utils.errors import ConfigError
from factorkit.utils.images import signed_to_unit


class Branches(NamedTuple):
    """Images decomposed at one noise level.

    Attributes:
        noisy: [n, 3, R, R] in [0, 1] (clipped), the input of the model.
        images: [n, 3, R, R] in [0, 1], its estimate of the clean image: the branches weighted by their masks.
        masks: [n, K, R, R], summing to 1 over K.
        branches: [n, K, 3, R, R] in [0, 1], each branch's estimate of the whole image; it was only trained where its
            mask is not zero.
    """

    noisy: Tensor
    images: Tensor
    masks: Tensor
    branches: Tensor


@torch.no_grad()
def decompose_images(
    model: SegdiffModel, config: ResolvedSegdiffConfig, schedule: Schedule, images: Tensor, t: int
) -> Branches:
    """Decompose ``images`` [n, 3, R, R] in [-1, 1] at level t into x0 = sum_k m_k x0_k, x0_k of branch k, in one step.

    Raises:
        ConfigError: the model has no branches (``decoding="concat"``).
    """
    if config.decoding == "concat" and config.num_leaf_regions > 1:
        raise ConfigError(
            "this run was trained with decoding='concat': one decoder sees all masks, so there are no branches to show"
        )
    parts = []
    for batch in images.split(SAMPLE_BATCH_SIZE):
        x_t, times = add_noise(model.space.encode(batch.to(schedule.device)), t, schedule)
        out = model(x_t, times)
        x0 = to_x0(config.prediction, schedule, x_t, out.prediction, times)
        branches = estimate_branches(config.prediction, schedule, x_t, out.bottleneck.branches, times)
        noisy, estimate, *decoded = (model.space.decode(x) for x in (x_t, x0, *branches.unbind(1)))
        masks = lift_masks(out.bottleneck.masks.float(), estimate).cpu()
        parts.append((signed_to_unit(noisy), signed_to_unit(estimate), masks, signed_to_unit(torch.stack(decoded, 1))))
    return Branches(*map(torch.cat, zip(*parts, strict=True)))
