"""How often the network looks at a picture before its masks are settled.

The thesis segments by one draw of noise at one level. Masks of several draws, of several levels and of the mirror image
are estimates of the same thing, and their mean still sums to 1 over the regions. Of the three only the mirror image was
found to gain anything (docs/results.md), so that ``"best"`` is one further look; the others can be asked for.
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


QUALITIES = {"fast": Quality(), "best": Quality(mirror=True)}


def quality_of(quality: str | Quality, mirrored: bool) -> Quality:
    """The looks behind a name, or those given.

    mirrored: whether the training showed mirror images. Where it did not, as left and right mean something, the best
        look is the only one: regions in the mirror image of a horse that faces left are nothing the model has learned.

    Raises:
        ConfigError: an unknown name, or looks that are none.
    """
    if isinstance(quality, Quality):
        if quality.draws < 1 or not quality.levels or min(quality.levels) < 0:
            raise ConfigError(f"{quality}: at least one draw and one level, none below 0, are a look")
        return quality
    if quality not in QUALITIES:
        raise ConfigError(f"quality={quality!r} is unknown; choose one of {', '.join(QUALITIES)}, or give a Quality")
    return QUALITIES[quality]._replace(mirror=QUALITIES[quality].mirror and mirrored)


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
