"""How often the network looks at a picture before its masks are settled.

The thesis segments by one draw of noise at one level. Masks of several draws, of several levels and of the mirror image
are estimates of the same thing, and their mean still sums to 1 over the regions.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from factorkit.diffusion.schedule import Schedule
from factorkit.errors import ConfigError
from factorkit.segdiff.task import predict_masks


class Quality(NamedTuple):
    """Looks whose masks are averaged: every combination of levels, draws and sides.

    Attributes:
        levels: noise levels, in units of the one asked for.
        draws: of noise at each level; the first is that of a single look.
        mirror: look at the mirror image too.
    """

    levels: tuple[float, ...] = (1.0,)
    draws: int = 1
    mirror: bool = False


QUALITIES = {"fast": Quality(), "best": Quality(levels=(1 / 3, 1.0, 2.0), draws=2, mirror=True)}


def quality_of(name: str) -> Quality:
    """The looks behind a name. Raises ConfigError for an unknown one."""
    if name not in QUALITIES:
        raise ConfigError(f"quality={name!r} is unknown; choose one of {', '.join(QUALITIES)}")
    return QUALITIES[name]


def averaged_masks(
    model: nn.Module, images: Tensor, t: int, schedule: Schedule, quality: Quality, label: int | None = None
) -> Tensor:
    """Masks [N, K, H, W] (fp32, CPU) of ``images`` [N, 3, H, W] in [-1, 1], the mean over all looks around level t.

    label: the class the model is told, where it knows classes; None tells it of none.
    """
    levels = [min(round(share * t), schedule.steps - 1) for share in quality.levels]
    looks = list(product(levels, range(quality.draws), (False, True) if quality.mirror else (False,)))
    total = torch.zeros(())
    for level, draw, mirrored in looks:
        masks = predict_masks(model, images.flip(3) if mirrored else images, level, schedule, draw, label)
        total = total + (masks.flip(3) if mirrored else masks)
    return total / len(looks)
