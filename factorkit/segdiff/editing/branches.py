"""What each branch makes of a picture: the factorization itself, made visible (fig. 2.9)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from factorkit.diffusion.objective import to_x0
from factorkit.diffusion.schedule import Schedule
from factorkit.segdiff.config import ResolvedSegdiffConfig
from factorkit.segdiff.network import FactorizedUNet
from factorkit.segdiff.sampling import SAMPLE_BATCH_SIZE, estimate_branches
from factorkit.segdiff.task import add_noise
from factorkit.utils.errors import ConfigError
from factorkit.utils.images import signed_to_unit


class Branches(NamedTuple):
    """Pictures taken apart at one noise level.

    Attributes:
        noisy: [n, 3, R, R] in [0, 1] (clipped), what the model was shown.
        images: [n, 3, R, R] in [0, 1], its estimate of the clean picture: the branches, weighed by their masks.
        masks: [n, K, R, R], summing to 1 over K.
        branches: [n, K, 3, R, R] in [0, 1], what each branch takes the whole picture to be; a branch was only ever
            taught where its mask is not zero.
    """

    noisy: Tensor
    images: Tensor
    masks: Tensor
    branches: Tensor


@torch.no_grad()
def take_apart(
    model: FactorizedUNet, config: ResolvedSegdiffConfig, schedule: Schedule, images: Tensor, t: int
) -> Branches:
    """The factorization of ``images`` [n, 3, R, R] in [-1, 1] at level t: branch k says x0_k, the model
    x0 = sum_k m_k x0_k, in one step.

    Raises:
        ConfigError: the model has no branches (``decoding="concat"``).
    """
    if config.decoding == "concat" and config.num_leaf_regions > 1:
        raise ConfigError(
            "this run was trained with decoding='concat': one decoder sees all masks, so there are no branches to show"
        )
    parts = []
    for piece in images.split(SAMPLE_BATCH_SIZE):
        x_t, times = add_noise(piece.to(schedule.device), t, schedule)
        out = model(x_t, times)
        x0 = to_x0(config.prediction, schedule, x_t, out.prediction, times)
        each = estimate_branches(config.prediction, schedule, x_t, out.bottleneck.branches, times)
        parts.append(
            (signed_to_unit(x_t), signed_to_unit(x0), out.bottleneck.masks.float().cpu(), signed_to_unit(each))
        )
    return Branches(*map(torch.cat, zip(*parts, strict=True)))
