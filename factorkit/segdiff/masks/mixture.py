"""Regions that compete for the pixels by place and by the colours they have in the picture at hand.

Every picture is a mixture: where region k lies is learned, pi_k(p), the same for all pictures; what colours it has is a
Gaussian of its own in each picture. So a dark horse and a white one are one region, if they stand in one place, and a
network that names regions by their colours, which it prefers when it may, never gets the chance. The class model of
LOCUS (Winn & Jojic 2005) is the nearest relative; here the place is learned by denoising: a mixture of Gaussians has
a score, and with it a denoiser, in closed form.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit.diffusion.objective import denoising_loss
from factorkit.diffusion.schedule import Schedule
from factorkit.utils.rng import derived_seed

GRID = 16  # sides of the learned map of places
ROUNDS = 3  # of expectation and maximisation; with 8 horses came out at .60 IoU, with 3 and 5 at .64
SHARE = 0.05  # of every place goes to all regions alike, so that none is shut out of it for good
PIXELS, VARIANCE = 20.0, 0.1  # a region's colours are measured as if it had so many more pixels, that much spread
FLOOR = 0.02  # least variance of a region's colours, which are in [-1, 1]
JUDGED = (30, 100, 200, 300, 400, 550)  # levels, of the linear schedule of 1000, at which competitions are compared
AT_ONCE = 32  # pictures


class Contest(NamedTuple):
    """Who won which pixel: logits [B, K, H, W], unnormalised, and, of a competition, the score [B, 3, H, W],
    d log p(x_t) / d x_t of the mixture, both fp32."""

    logits: Tensor
    score: Tensor | None


class RegionCompetition(nn.Module):
    """Logits of the regions out of a learned place, and of the colours the regions have in each picture.

    Starting from the places alone, a few rounds of EM: measure each region's mean colour and covariance, then ask of
    every pixel how well the region at this place explains its colour. Nothing sees a picture but through these rounds,
    and gradients flow through all of them (through the last one alone the places collapse).

    Args:
        regions: K.
    """

    def __init__(self, regions: int):
        super().__init__()
        # smooth places from the start: regions that begin as speckles stay for long
        rough = F.interpolate(torch.randn(1, regions, 5, 5), size=(GRID, GRID), mode="bicubic")[0]
        self.place = nn.Parameter(rough / rough.std())

    def places(self, height: int, width: int) -> Tensor:
        """pi, the share of each region in every place: [K, height, width], sums to 1 over K."""
        logits = F.interpolate(self.place[None].float(), size=(height, width), mode="bilinear", align_corners=False)
        return (1 - SHARE) * logits[0].softmax(0) + SHARE / len(self.place)

    def forward(self, x_t: Tensor) -> Contest:
        """x_t [B, 3, H, W]: pictures in [-1, 1], noised to any level. The noise is part of the colours' spread, so the
        more there is of it the more the place decides."""
        with torch.autocast(x_t.device.type, enabled=False):
            size = x_t.shape[2:]
            x = x_t.float().flatten(2).transpose(1, 2)
            squares = (x[..., :, None] * x[..., None, :]).flatten(2)
            prior = self.places(*size).log().flatten(1).expand(len(x), -1, -1)
            logits = prior
            for _ in range(ROUNDS):
                evidence, slopes = colour_evidence(x, squares, logits.softmax(1))
                logits = prior + evidence
            score = (logits.softmax(1)[..., None] * slopes).sum(1)
            return Contest(logits.unflatten(2, size), score.transpose(1, 2).unflatten(2, size))


def colour_evidence(x: Tensor, squares: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """How well each region's colours explain each pixel: log N(x; mu_k, S_k) up to a constant, and its slope in x.

    Args:
        x: pixels [B, P, 3].
        squares: their outer products [B, P, 9].
        masks: [B, K, P], over which mu_k and S_k are measured.

    Returns:
        [B, K, P] and [B, K, P, 3].
    """
    area = masks.sum(-1, keepdim=True) + 1e-3
    mean = masks @ x / area
    spread = (masks @ squares / area).unflatten(2, (3, 3)) - mean[..., :, None] * mean[..., None, :]
    eye, area = torch.eye(3, device=x.device), area[..., None]
    spread = (spread * area + PIXELS * VARIANCE * eye) / (area + PIXELS) + FLOOR * eye
    inverse, determinant = invert(spread)
    away = x[:, None] - mean[:, :, None]
    slopes = -away @ inverse
    return 0.5 * ((slopes * away).sum(-1) - determinant.log()[..., None]), slopes


def noise_error(score: Tensor, schedule: Schedule, eps: Tensor, t: Tensor) -> Tensor:
    """A competition's score as a denoiser: squared error [B] of the noise that, by Tweedie, it takes pictures to bear.

    score, and eps, the noise that is in them: [B, 3, H, W]; t [B] its level.
    """
    return denoising_loss(-schedule.sigma(t) * score, eps)


@torch.no_grad()
def unexplained_noise(competition: RegionCompetition, images: Tensor, schedule: Schedule) -> float:
    """The share of the noise in ``images`` [N, 3, H, W] that the competition cannot tell from the picture; the less,
    the better its regions explain what it is shown. Mean of :func:`noise_error` over levels, always of the same noise.
    """
    total = 0.0
    for level in JUDGED:
        t = schedule.find_matching_time(level, Schedule())
        eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(derived_seed("judge", level)))
        for part, noise in zip(images.split(AT_ONCE), eps.split(AT_ONCE), strict=True):
            part, noise = part.to(schedule.device), noise.to(schedule.device)
            times = torch.full((len(part),), t, dtype=torch.int64, device=schedule.device)
            score = competition(schedule.noise(part, noise, times)).score
            total += noise_error(score, schedule, noise, times).sum().item()
    return total / (len(JUDGED) * len(images))


def invert(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses and determinants of symmetric [..., 3, 3], by cofactors: torch's own cannot be in a CUDA graph."""
    a, b, c = matrices.unbind(-2)
    cofactors = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], -2)
    determinant = (a * cofactors[..., 0, :]).sum(-1)
    return cofactors / determinant[..., None, None], determinant
