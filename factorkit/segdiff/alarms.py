"""Label-free alarms: whether the regions follow the content, which the loss does not show.

A factorized model can denoise equally well with regions that are positions, noise, or a single region. Each quantity
here separates one of those failures from success; docs/segmenting.md has the table of true and false alarms. Where
colour does not separate object from background, the figures of a good run may be lower, so a failure is a warning that
quotes them; and passing certifies that regions follow content, not that they are objects.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from factorkit.report.content import Check, all_failures, log_checks
from factorkit.segdiff.masks.objects import EM_ROUNDS, resize, scale_lab
from factorkit.segdiff.masks.spatial_mixture import fit_mixture, share_uniformly
from factorkit.utils.errors import ConfigError, DataError

MIN_ETA_GAP = 0.3  # success .40-.51, failure 0-.15
MIN_PLACE_GAIN = 0.05  # nats a pixel, of object masks: a pixel becomes 5% more probable by its place
MIN_PLACE_SHARE = 0.25  # of what the regions of object masks explain; right ones from .36 on, leaves .14 and .20
PLACE_GAIN_SIDE = 32  # pixels of the images that it is measured on
MIN_POSITION_SHARE, MAX_POSITION_SHARE = 0.05, 0.8  # success .20-.42, positional .91-1, collapsed about 0
MAX_BOUNDARY_LENGTH = 0.6  # of that of shuffled pixels: success .1-.36 from 16 px on, dithered .9-1
MIN_FLIP_AGREEMENT = 0.5  # success .92 and more, positional about 0
MAX_MEAN_MASK_AGREEMENT = 0.9
MEAN_MASK = "agreement with the mean mask"  # the name of this check,
OWN_MEAN = "their own mean over all images"  # and how the sentence of its failure ends
MIN_COLOR_SHARE = 0.65  # success .87-.95, failure .05-.51
MIN_JUDGED_STEPS = 100  # masks of shorter trainings still change
TWO_MEANS_ITERATIONS = 15  # enough for two clusters in three dimensions
MIN_AREA = 0.01  # below it a region is dead; with all others dead, the masks have collapsed
CHECKS = (
    "smallest area",
    "position share",
    MEAN_MASK,
    "boundary length",
    "flip agreement",
    "eta gap",
    "place gain",
    "place share",
    "explained colour",
    "agreement with 2-means",
)


@dataclass(frozen=True)
class Alarms:
    """The quantities of :func:`measure_alarms`. Hard masks are one-hot in the most probable region of each pixel.

    Attributes:
        eta_gap: share of an image's colour variance that its own hard masks explain, minus the share that the masks of
            another image do; in (-1, 1).
        position_share: share of the hard masks' variance, over images and pixels, that position alone explains; in
            [0, 1].
        boundary_length: share of neighbouring pixel pairs that lie in different regions; in [0, 1].
        flip_agreement: agreement of the regions of an image and of its mirror image, corrected for chance (Cohen's
            kappa): 1 is perfect, 0 is chance.
        areas: share of all pixels in each region [K].
        confidence: mean probability of the most probable region; in [1/K, 1].
        entropy: mean entropy of the soft masks as a share of log K; in [0, 1].
        error: of a spatial mixture or object masks, the noise it cannot separate from the image
            (:func:`~factorkit.segdiff.masks.spatial_mixture.unexplained_noise`); else None. Good mixtures may have a
            low eta gap, so where there is an error no run is ranked by the eta gap, and a mixture is not judged by it.
        mean_mask_agreement: agreement (Cohen's kappa) of the masks with their own mean over all images; 1 if they are
            the same for every image. None: not measured.
        two_means_agreement: mean agreement (Cohen's kappa) with two colour clusters of each image, to each of which
            every region is assigned by majority; 1 if the regions are the colour clusters. None: not measured.
        color_share: colour variance that an image's own hard masks explain, over that which its two colour clusters do;
            0 for images of one colour. None: not measured.
        place_gain: of object masks (masks="auto"), in nats a pixel (:func:`measure_place_gain`); None for other masks.
        place_share: share of the place gain in what regions explain at all; None for other masks.
    """

    eta_gap: float
    position_share: float
    boundary_length: float
    flip_agreement: float
    areas: list[float]
    confidence: float
    entropy: float
    error: float | None = None
    mean_mask_agreement: float | None = None
    two_means_agreement: float | None = None
    color_share: float | None = None
    place_gain: float | None = None
    place_share: float | None = None

    def checks(self, steps: int | None = None) -> list[Check]:
        """Return what was checked, with values and limits, and what was not, with the reason.

        After fewer than MIN_JUDGED_STEPS training steps no check of content counts as passed.
        """
        areas = "/".join(f"{area:.2f}" for area in self.areas)
        dead = [k for k, area in enumerate(self.areas) if area < MIN_AREA]
        collapsed = len(dead) == len(self.areas) - 1
        if collapsed:
            failures = [f"collapsed to one region: areas {areas}"]
        else:
            failures = [f"dead region {k}: its area is {self.areas[k]:.4f} < {MIN_AREA} (areas {areas})" for k in dead]
        checks = [Check("smallest area", min(self.areas), low=MIN_AREA, failures=tuple(failures))]
        if collapsed:  # all other quantities are degenerate
            reason = "since all pixels lie in one region"
            names = [name for name in CHECKS[1:] if "place" not in name or self.place_gain is not None]
            return checks + [Check(name, not_run=reason) for name in names]

        boundary_length = self.boundary_length / max(1e-6, 1 - sum(area**2 for area in self.areas))
        objects, position = self.place_gain is not None, []
        # Objects that fill the centre have a share of .82; the agreement with the mean mask is exact enough for them.
        max_position = math.inf if objects else MAX_POSITION_SHARE
        if self.position_share > max_position:
            position.append(
                f"split by position: position alone explains {self.position_share:.2f} > {MAX_POSITION_SHARE} of the "
                "masks' variance"
            )
        elif self.position_share < MIN_POSITION_SHARE:
            position.append(
                f"masks without any place: position explains {self.position_share:.3f} < {MIN_POSITION_SHARE} of "
                f"their variance, as in noise or near collapse (areas {areas})"
            )
        boundary = (
            f"dithered masks: their boundaries are {boundary_length:.2f} > {MAX_BOUNDARY_LENGTH} of those of the same "
            "pixels in random order"
        )
        flip = (
            f"masks do not turn with the image: agreement with the mirror image's is {self.flip_agreement:.2f} < "
            f"{MIN_FLIP_AGREEMENT}"
        )
        gap = (
            f"masks are not about content: they explain {self.eta_gap:.2f} < {MIN_ETA_GAP} more of their image's "
            "colour than another image's masks do (a good run may be lower where colour does not separate objects)"
        )
        mean = (
            f"split by position: the masks agree {self.mean_mask_agreement or 0:.2f} > {MAX_MEAN_MASK_AGREEMENT} with "
            f"{OWN_MEAN}"
        )
        place = (
            f"masks without objects: colours are {self.place_gain or 0:.3f} < {MIN_PLACE_GAIN} nats a pixel more "
            "probable with the regions at their places than with these places moved"
        )
        share = (
            f"masks without objects: {self.place_share or 0:.2f} < {MIN_PLACE_SHARE:.2f} of what the regions explain "
            "depends on their places, as in textures"
        )
        checks += [
            Check("position share", self.position_share, MIN_POSITION_SHARE, max_position, tuple(position)),
            _check_limit(MEAN_MASK, self.mean_mask_agreement, mean, high=MAX_MEAN_MASK_AGREEMENT),
            _check_limit("boundary length", boundary_length, boundary, high=MAX_BOUNDARY_LENGTH),
            _check_limit("flip agreement", self.flip_agreement, flip, low=MIN_FLIP_AGREEMENT),
        ]
        color = (
            f"masks are not about content: they explain {self.color_share or 0:.2f} < {MIN_COLOR_SHARE} of the colour "
            "that two colour clusters of each image explain"
        )
        if objects:  # right ones have an eta gap down to .07 and an explained colour down to .48: neither decides
            content = [
                _check_limit("eta gap", self.eta_gap, ""),
                _check_limit("place gain", self.place_gain, place, low=MIN_PLACE_GAIN, decisive=True),
                _check_limit("place share", self.place_share, share, low=MIN_PLACE_SHARE, decisive=True),
            ]
        elif self.error is None:
            content = [_check_limit("eta gap", self.eta_gap, gap, low=MIN_ETA_GAP, decisive=True)]
        else:
            reason = f"since regions of a mixture have no colours of their own (value {self.eta_gap:.2f})"
            content = [Check("eta gap", not_run=reason)]
        min_share = -math.inf if objects else MIN_COLOR_SHARE
        content += [
            _check_limit("explained colour", self.color_share, color, not objects, low=min_share),
            # Agreement with colour clusters is no failure: it says what the regions are.
            _check_limit("agreement with 2-means", self.two_means_agreement, ""),
        ]
        if steps is not None and steps < MIN_JUDGED_STEPS:
            reason = f"since it takes {MIN_JUDGED_STEPS} training steps, and there were {steps}"
            content = [
                check if check.failures or check.value is None else Check(check.name, not_run=reason)
                for check in content
            ]
        return checks + content

    def failures(self) -> list[str]:
        """Describe each failure with its figures; empty if the regions seem to follow the content."""
        return all_failures(self.checks())

    @property
    def ok(self) -> bool:
        """Whether there is no failure."""
        return not self.failures()

    def score(self) -> float:
        """Return a number to rank seeds by, higher is better: the eta gap, or minus the error if there is one.

        Every failed seed ranks below every healthy one.
        """
        rank = self.eta_gap if self.error is None else -self.error
        return rank if self.ok else rank - 2

    def to_dict(self, steps: int | None = None) -> dict[str, Any]:
        """Return the quantities, ``checks`` and ``failures`` after ``steps`` training steps for a line of the log."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return values | log_checks(self.checks(steps))


def _check_limit(
    name: str, value: float | None, failure: str, decisive: bool = False, low: float = -math.inf, high: float = math.inf
) -> Check:
    """Return a check that fails with one sentence beyond its limits ``low`` and ``high``."""
    if value is None:
        return Check(name, not_run="since it was not measured")
    failed = not low <= value <= high
    return Check(name, value, failures=(failure,) if failed else (), decisive=decisive, low=low, high=high)


@torch.no_grad()
def measure_alarms(images: Tensor, masks: Tensor, masks_of_flipped: Tensor, objects: bool = False) -> Alarms:
    """Measure the alarms, best on about a hundred images (by chance the position share of N independent masks is 1/N).

    Args:
        images: float [N, 3, H, W] in [-1, 1].
        masks: soft, [N, K, H, W], summing to 1 over K, as predicted at a low time step (t = 30).
        masks_of_flipped: [N, K, H, W], as predicted for ``images.flip(3)``, NOT flipped back.
        objects: whether region 0 is an object (masks="auto"). Then the place gain is measured, and it alone has to turn
            with the image: regions of the ground may change places.

    Raises:
        ConfigError: a single region, which has no alarms.
        DataError: fewer than 2 images, or unequal sizes.
    """
    count, regions = masks.shape[:2]
    if regions < 2:
        raise ConfigError("a model with regions=1 has no masks to watch; measure alarms from regions=2 upwards")
    if count < 2:
        raise DataError("alarms compare the masks of different images: give at least 2 images")
    if masks.shape != masks_of_flipped.shape or images.shape != (count, 3, *masks.shape[2:]):
        raise DataError(
            f"images {tuple(images.shape)}, masks {tuple(masks.shape)} and masks of the flipped images "
            f"{tuple(masks_of_flipped.shape)} must be [N,3,H,W], [N,K,H,W] and [N,K,H,W]"
        )
    images, masks = images.float(), masks.float()
    hard, hard_flipped = _one_hot(masks), _one_hot(masks_of_flipped).flip(3)
    pair = [torch.cat([m[:, :1], 1 - m[:, :1]], 1) for m in (hard, hard_flipped)] if objects else [hard, hard_flipped]
    entropy = -torch.special.xlogy(masks, masks).sum(1).mean() / math.log(regions)
    explained, clusters = _explained(images, hard), cluster_colors(images)
    return Alarms(
        eta_gap=float(explained - _explained(images, hard.roll(1, 0))),
        position_share=_position_share(hard),
        boundary_length=_boundary_length(hard),
        flip_agreement=_kappa(*pair),
        areas=hard.mean((0, 2, 3)).tolist(),
        confidence=float(masks.amax(1).mean()),
        entropy=float(entropy),
        mean_mask_agreement=_kappa(hard, _one_hot(hard.mean(0, keepdim=True)).expand_as(hard)),
        two_means_agreement=two_means_agreement(clusters, hard),
        color_share=float(explained / _explained(images, clusters).clamp_min(1e-6)),
        **(measure_place_gain(images, masks) if objects else {}),
    )


@torch.no_grad()
def measure_place_gain(images: Tensor, masks: Tensor) -> dict[str, float]:
    """Return the fields ``place_gain`` and ``place_share`` of :class:`Alarms`.

    An image's regions get the mean of the other images' masks as their prior, and their colours by EM. The same is done
    with this prior moved by half an image, to the right, down, and both. The colours are the same, so that the
    difference of the log likelihoods, the place gain, is about places alone: near 0 where nothing has a place, as in
    textures, and where regions are places themselves. Its share is of the gain of the regions over one Gaussian.

    Args:
        images: float [N, 3, H, W] in [-1, 1].
        masks: soft, [N, K, H, W].
    """
    side = min(PLACE_GAIN_SIDE, *images.shape[2:])
    colors, masks = scale_lab(resize(images, side, side)), resize(masks, side, side)
    prior = share_uniformly((masks.sum(0) - masks) / (len(masks) - 1))

    def score(prior: Tensor) -> float:
        return float(fit_mixture(colors, prior, EM_ROUNDS).logits.logsumexp(1).mean())

    half, placed = side // 2, score(prior)
    gain = placed - sum(score(prior.roll(shift, (2, 3))) for shift in ((half, 0), (0, half), (half, half))) / 3
    explained = placed - score(torch.ones_like(prior[:, :1]))
    return {"place_gain": gain, "place_share": max(0.0, gain) / max(explained, gain, 1e-6)}


def two_means_agreement(cluster: Tensor, hard: Tensor) -> float:
    """Return the mean over images of Cohen's kappa between regions and two colour clusters.

    Args:
        cluster: one-hot clusters [N, 2, H, W].
        hard: one-hot regions [N, K, H, W]; each counts as the cluster that most of its pixels are in.
    """
    shared = torch.einsum("nkhw,nchw->nkc", hard, cluster)
    assigned = _one_hot(shared.movedim(1, 2)).movedim(1, 2)
    regions = torch.einsum("nkhw,nkc->nchw", hard, assigned)
    return sum(_kappa(a[None], b[None]) for a, b in zip(regions, cluster, strict=True)) / len(hard)


def cluster_colors(images: Tensor) -> Tensor:
    """Return 2-means clusters of each image's colours, one-hot [N, 2, H, W]; they start as halves of the main axis."""
    colors = images.flatten(2) - images.mean((2, 3))[..., None]
    axis = torch.linalg.eigh(colors @ colors.mT).eigenvectors[:, :, -1:]
    first = (axis.mT @ colors).squeeze(1) > 0
    for _ in range(TWO_MEANS_ITERATIONS):
        members = torch.stack([first, ~first], 1).float()
        centres = colors @ members.mT / members.sum(2)[:, None].clamp_min(1)
        distance = (colors[:, :, None] - centres[..., None]).square().sum(1)
        first = distance[:, 0] < distance[:, 1]
    return torch.stack([first, ~first], 1).float().unflatten(2, images.shape[2:])


def _one_hot(masks: Tensor) -> Tensor:
    return F.one_hot(masks.argmax(1), masks.shape[1]).movedim(-1, 1).float()


def _explained(images: Tensor, hard: Tensor) -> Tensor:
    """Correlation ratio eta^2: between-region over total sum of squares of the colours, mean over images."""
    colours = images - images.mean((2, 3), keepdim=True)
    area = hard.sum((2, 3))
    sums = torch.einsum("nkhw,nchw->nkc", hard, colours)
    between = (sums.square().sum(2) / area.clamp_min(1)).sum(1)
    # An image of one colour has nothing to explain; the floor makes its share 0.
    return (between / colours.square().sum((1, 2, 3)).clamp_min(1e-6)).mean()


def _position_share(hard: Tensor) -> float:
    total = hard.var((0, 2, 3), unbiased=False).sum()
    by_position = hard.mean(0).var((1, 2), unbiased=False).sum()
    return float(by_position / total.clamp_min(1e-6))


def _boundary_length(hard: Tensor) -> float:
    label = hard.argmax(1)
    across = (label[:, :, 1:] != label[:, :, :-1]).float().mean()
    down = (label[:, 1:] != label[:, :-1]).float().mean()
    return float((across + down) / 2)


def _kappa(a: Tensor, b: Tensor) -> float:
    observed = (a * b).sum(1).mean()
    by_chance = (a.mean((0, 2, 3)) * b.mean((0, 2, 3))).sum()
    return float((observed - by_chance) / (1 - by_chance).clamp_min(1e-6))
