"""Masks of one object in several views whose backgrounds differ: what has the same colours in all views is the object.

Two mixtures of Gaussians explain the colours in and around each pixel: one of the object, whose colours are those of
the object in the other views, and one of this view's own background. Masks and mixtures follow from each other in turn,
as in GrabCut (Rother, Kolmogorov and Blake 2004), for several images of one object (Rother et al. 2006).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from factorkit.segdiff.masks.smoothness import smooth_masks
from factorkit.utils.rng import derived_seed

SIDES = (*8 * (32,), 64)  # pixels of the square copies of the views, one a round; the borders come last
WINDOW = 5  # pixels along a side of a pixel's surroundings
OBJECT_COLORS, BACKGROUND_COLORS = 20, 6  # Gaussians of the mixtures
FOLDS = 4  # of the views: a view's object is explained by the views of the other folds
OBJECT_PIXELS = 6000  # that a mixture of the object is fitted to
FIT_ROUNDS = 6
BATCH_SIZE = 8  # views at a time
START_VARIANCE, PSEUDO_VARIANCE, PSEUDO_PIXELS, MIN_VARIANCE = 0.1, 0.05, 20, 0.02  # of colours of about [-1, 1]
BORDER_WEIGHT = 2.0  # added to the weights of pixels on the image's border in the background: the object ends before it
PLACE_WEIGHT = 0.5  # exponent of the place beside the colours, as in the first EM of the object masks
MIN_SHARE = 0.03  # of object and background at a place
MIN_PROBABILITY = 0.02  # of object and background at a pixel before neighbours agree


@torch.no_grad()
def cosegment(colors: Tensor, masks: Tensor) -> Tensor:
    """Return the probability [N, H, W] of the object in views.

    Args:
        colors: Lab colours of the views, of about [-1, 1], [N, 3, H, W]; H and W at least SIDES.
        masks: [N, H, W], of which the first mixtures use the mean, the place of the object.
    """
    generator = torch.Generator().manual_seed(derived_seed("cosegment"))
    share = masks.mean(0, keepdim=True).expand_as(masks)[:, None]
    for side in SIDES:
        small = F.adaptive_avg_pool2d(colors, side)
        pixels = describe_pixels(small).flatten(2).mT.contiguous()
        share = F.interpolate(share, size=(side, side), mode="bilinear", align_corners=False)
        place = average(share.mean(0, keepdim=True)).clamp(MIN_SHARE, 1 - MIN_SHARE)
        border = torch.ones(side, side)
        border[1:-1, 1:-1] = 0
        # Squares: what is doubtful describes neither.
        inside = share.flatten(1).square()
        outside = (1 - share.flatten(1)).square() + BORDER_WEIGHT * border.flatten()
        parts = zip(pixels.split(BATCH_SIZE), outside.split(BATCH_SIZE), strict=True)
        own = [Mixture(x, weights, BACKGROUND_COLORS, generator).log_density(x) for x, weights in parts]
        evidence = explain_object(pixels, inside, generator) - torch.cat(own)
        object_share = (evidence.view_as(share) + PLACE_WEIGHT * torch.logit(place)).sigmoid()
        object_share = object_share.clamp(MIN_PROBABILITY, 1 - MIN_PROBABILITY)
        share = smooth_masks(torch.cat([object_share, 1 - object_share], 1), small)[:, :1]
    return F.interpolate(share, size=colors.shape[2:], mode="bilinear", align_corners=False)[:, 0]


def explain_object(pixels: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
    """Return the log density [N, P] of pixels [N, P, D] in a mixture of those of other views with weights [N, P]."""
    result, fold = torch.empty_like(weights), torch.arange(len(pixels)) % FOLDS
    for number in range(FOLDS):
        others, own = pixels[fold != number].flatten(0, 1), fold == number
        rows = torch.multinomial(weights[fold != number].flatten(), OBJECT_PIXELS, True, generator=generator)
        mixture = Mixture(others[None, rows], torch.ones(1, len(rows)), OBJECT_COLORS, generator)
        result[own] = torch.cat([mixture.log_density(view[None]) for view in pixels[own]])
    return result


def describe_pixels(colors: Tensor) -> Tensor:
    """Return the colour of each pixel [N, 3, S, S], and mean and deviation of those around it: [N, 9, S, S]."""
    mean = average(colors)
    return torch.cat([colors, mean, (average(colors.square()) - mean.square()).clamp_min(0).sqrt()], 1)


def average(values: Tensor) -> Tensor:
    """Return the mean of values [N, C, S, S] over the window around each pixel."""
    return F.avg_pool2d(F.pad(values, (WINDOW // 2,) * 4, mode="reflect"), WINDOW, 1)


class Mixture:
    """A mixture of Gaussians in each row of values.

    Args:
        x: values [B, P, D].
        weights: of the values [B, P].
        count: number K of Gaussians.
        generator: chooses the first means, far from each other.
    """

    def __init__(self, x: Tensor, weights: Tensor, count: int, generator: torch.Generator):
        (rows, _, size), eye = x.shape, torch.eye(x.shape[2])
        means, distance = list[Tensor](), torch.ones_like(weights)
        for _ in range(count):
            chosen = torch.multinomial((weights * distance).clamp_min(1e-12), 1, generator=generator)
            means.append(x.gather(1, chosen[..., None].expand(-1, -1, size)))
            away = (x - means[-1]).square().sum(2)
            distance = away if len(means) == 1 else torch.minimum(distance, away)
        self.shares, self.means = torch.full((rows, count), 1 / count), torch.cat(means, 1)
        self.factors = (START_VARIANCE**0.5 * eye).expand(rows, count, size, size)
        for _ in range(FIT_ROUNDS):
            parts = self._log_parts(x).softmax(2) * weights[..., None]
            area = parts.sum(1) + 1e-3
            self.shares, self.means = area / area.sum(1, keepdim=True), parts.mT @ x / area[..., None]
            aways = [x - self.means[:, k, None] for k in range(count)]
            squares = [(away * parts[..., k, None]).mT @ away for k, away in enumerate(aways)]
            area = area[..., None, None]
            covariance = (torch.stack(squares, 1) + PSEUDO_PIXELS * PSEUDO_VARIANCE * eye) / (area + PSEUDO_PIXELS)
            self.factors = torch.linalg.cholesky(covariance + MIN_VARIANCE * eye)

    def log_density(self, x: Tensor) -> Tensor:
        """Return the log density [B, P] of values [B, P, D] up to a constant."""
        return self._log_parts(x).logsumexp(2)

    def _log_parts(self, x: Tensor) -> Tensor:
        inverse = torch.linalg.inv(self.factors)
        logs = self.shares.log() - self.factors.diagonal(dim1=2, dim2=3).log().sum(2)
        away = [((x - self.means[:, k, None]) @ inverse[:, k].mT).square().sum(2) for k in range(logs.shape[1])]
        return logs[:, None] - 0.5 * torch.stack(away, 2)
