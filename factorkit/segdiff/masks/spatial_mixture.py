"""Masks by a spatial mixture model: a learned spatial prior, and the colours of each region in the image at hand.

Each image is a mixture of K Gaussians over colour. The prior pi_k(p) of region k at pixel p is learned and the same for
all images; mean and covariance of a region's colours are fitted to each image by EM. A dark and a white horse at the
same place are one region, which a network that names regions by their colours does not achieve. The nearest relative is
the class model of LOCUS (Winn & Jojic 2005). Here the prior is learned by denoising: the score of a mixture of
Gaussians, and with it a denoiser, has a closed form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit.diffusion.schedule import Schedule, denoising_loss
from factorkit.segdiff.masks.proposal import Encoding, MaskProposal, MaskProposer, without_autocast
from factorkit.utils.rng import derived_seed

PRIOR_SIDE = 16  # sides of the learned prior in cells
EM_ROUNDS = 3  # IoU on horses: .64 with 3 and 5 rounds, .60 with 8
OBJECT_FIRST_SPREAD = 0.5  # of the random start beside the centred region 0
UNIFORM_SHARE = 0.05  # of the prior is uniform over the regions, so that none is excluded anywhere for good
PSEUDO_PIXELS, PSEUDO_VARIANCE = 20.0, 0.1  # prior of a region's colour covariance: so many pixels of that variance
MIN_VARIANCE = 0.02  # of a region's colours, which are in [-1, 1]
ERROR_TIMES = (30, 100, 200, 300, 400, 550)  # of the linear schedule of 1000 steps, at which mixtures are compared
BATCH_SIZE = 32  # images of :func:`unexplained_noise` at a time


class SpatialMixture(MaskProposer):
    """Masks by a learned prior and the colours of the regions in each image.

    From the prior alone, a few rounds of EM: measure the mean colour and covariance of each region, then compute for
    each pixel how well each region explains its colour. Gradients flow through all rounds; through the last one alone
    the prior collapses.

    Args:
        regions: K.
        object_first: start with region 0 in the centre, so that it becomes the object.
    """

    needs_encoding = False

    def __init__(self, regions: int, object_first: bool = False):
        super().__init__()
        # Start smooth: regions that begin as speckles stay so for long.
        rough = F.interpolate(torch.randn(1, regions, 5, 5), size=(PRIOR_SIDE, PRIOR_SIDE), mode="bicubic")[0]
        rough = rough / rough.std()
        if object_first:
            side = torch.linspace(-1, 1, PRIOR_SIDE).square()
            rough = OBJECT_FIRST_SPREAD * rough
            rough[0] += 1 - 2 * (side[:, None] + side)
        self.prior_logits = nn.Parameter(rough)

    def prior(self, height: int, width: int) -> Tensor:
        """Return pi [K, height, width], which sums to 1 over K."""
        return share_uniformly(self._prior_logits(height, width).softmax(1))[0]

    def cued_prior(self, cue: Tensor) -> Tensor:
        """Return the prior [B, K, H, W] of images whose cue [B, H, W] is added to the logit of region 0."""
        logits = self._prior_logits(*cue.shape[1:])
        logits = torch.cat([logits[:, :1] + cue[:, None], logits[:, 1:].expand(len(cue), -1, -1, -1)], 1)
        return share_uniformly(logits.softmax(1))

    def _prior_logits(self, height: int, width: int) -> Tensor:
        logits = self.prior_logits[None].float()
        return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)

    def forward(
        self, x_t: Tensor, encoding: Encoding | None = None, within: Tensor | None = None, t: Tensor | None = None
    ) -> MaskProposal:
        """Propose masks of images at any noise level.

        The noise is part of the colours' variance: the more there is, the more the prior decides.
        """
        with without_autocast(x_t.device):
            return fit_mixture(x_t.float(), self.prior(*x_t.shape[2:]).expand(len(x_t), -1, -1, -1), EM_ROUNDS)


def share_uniformly(masks: Tensor) -> Tensor:
    """Mix masks [B, K, H, W] with a uniform share, so that no region is excluded anywhere for good."""
    return (1 - UNIFORM_SHARE) * masks + UNIFORM_SHARE / masks.shape[1]


def fit_mixture(
    x: Tensor,
    prior: Tensor,
    rounds: int,
    refine: Callable[[Tensor], Tensor] | None = None,
    min_variance: float = MIN_VARIANCE,
) -> MaskProposal:
    """Fit one Gaussian a region to the colours of each image by EM from its prior.

    Args:
        x: images [B, 3, H, W].
        prior: of the regions [B, K, H, W], above 0.
        rounds: of EM.
        refine: changes the masks [B, K, H, W] after each round but the last; None does not.
        min_variance: of a region's colours.
    """
    size = x.shape[2:]
    x = x.flatten(2).transpose(1, 2)
    squares = (x[..., :, None] * x[..., None, :]).flatten(2)
    logits = prior = prior.log().flatten(2)
    for number in range(rounds):
        masks = logits.softmax(1)
        if number and refine is not None:
            masks = refine(masks.unflatten(2, size)).flatten(2)
        evidence, slopes = colour_evidence(x, squares, masks, min_variance)
        logits = prior + evidence
    score = (logits.softmax(1)[:, :, None] * slopes).sum(1)
    return MaskProposal(logits.unflatten(2, size), score.unflatten(2, size))


def colour_evidence(
    x: Tensor, squares: Tensor, masks: Tensor, min_variance: float = MIN_VARIANCE
) -> tuple[Tensor, Tensor]:
    """Compute log N(x; mu_k, S_k) of each pixel and region up to a constant, and its gradient in x.

    Args:
        x: pixels [B, P, 3].
        squares: their outer products [B, P, 9].
        masks: [B, K, P], by which mu_k and S_k are measured.
        min_variance: added to every variance.

    Returns:
        [B, K, P] and [B, K, 3, P].
    """
    area = masks.sum(-1, keepdim=True) + 1e-3
    mean = masks @ x / area
    covariance = (masks @ squares / area).unflatten(2, (3, 3)) - mean[..., :, None] * mean[..., None, :]
    eye, area = torch.eye(3, device=x.device), area[..., None]
    covariance = (covariance * area + PSEUDO_PIXELS * PSEUDO_VARIANCE * eye) / (
        area + PSEUDO_PIXELS
    ) + min_variance * eye
    inverse, determinant = invert(covariance)
    away = x.mT[:, None] - mean[..., None]  # [B, K, 3, P]: sums over the last of 3 colours took 3 times as long
    slopes = -inverse @ away
    return 0.5 * ((slopes * away).sum(2) - determinant.log()[..., None]), slopes


def noise_error(score: Tensor, schedule: Schedule, eps: Tensor, t: Tensor) -> Tensor:
    """Return the squared error [B] of the noise that the score of a mixture predicts by Tweedie's formula.

    Args:
        score: [B, 3, H, W].
        eps: the true noise [B, 3, H, W].
        t: its time steps [B].
    """
    return denoising_loss(-schedule.sigma(t) * score, eps)


@torch.no_grad()
def unexplained_noise(mixture: MaskProposer, images: Tensor, schedule: Schedule, cues: Tensor | None = None) -> float:
    """Return the mean of :func:`noise_error` over ERROR_TIMES, always with the same noise.

    It is the share of the noise in ``images`` [N, 3, H, W] that the mixture cannot separate from the image: the less,
    the better its regions explain the images. ``cues`` [N, H, W] are those of :meth:`SpatialMixture.cued_prior`.
    """

    def explain(x_t: Tensor, times: Tensor, rows: slice) -> Tensor | None:
        if cues is None:
            return mixture.explain(x_t, times)
        prior = cast(SpatialMixture, mixture).cued_prior(cues[rows].to(schedule.device))
        return fit_mixture(x_t, prior, EM_ROUNDS).score

    total = 0.0
    for time in ERROR_TIMES:
        t = schedule.find_matching_time(time, Schedule())
        eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(derived_seed("judge", time)))
        for start in range(0, len(images), BATCH_SIZE):
            rows = slice(start, start + BATCH_SIZE)
            part, noise = images[rows].to(schedule.device), eps[rows].to(schedule.device)
            times = torch.full((len(part),), t, dtype=torch.int64, device=schedule.device)
            score = explain(schedule.noise(part, noise, times), times, rows)
            assert score is not None
            total += noise_error(score, schedule, noise, times).sum().item()
    return total / (len(ERROR_TIMES) * len(images))


def invert(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return inverses and determinants of symmetric [..., 3, 3].

    By cofactors, since torch's own functions cannot be captured in a CUDA graph.
    """
    a, b, c = matrices.unbind(-2)
    cofactors = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], -2)
    determinant = (a * cofactors[..., 0, :]).sum(-1)
    return cofactors / determinant[..., None, None], determinant
