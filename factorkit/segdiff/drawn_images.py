"""Whether drawn images are images: their distance to photos, and their grain; no labels, no weights from elsewhere.

The distance finds gross failures. It is a Fréchet distance in fixed random features (:mod:`factorkit.metrics.frechet`),
as a share of the way from that of other photos (0) to that of photos with their pixels in random order (1).

The grain finds images with the right colours under the noise that a half-trained network leaves. It is the deviation of
the white noise that would give photos as much fine colour detail as drawn images have: the energy of the two finest
diagonal Haar bands of the colour differences, where photos have little and white noise as much as in any other band.

The structure finds texture of the right spectrum without content. Fine detail of photos is sparse: edges, and smooth
areas between them. That of a half-trained network is Gaussian. The ratio of mean magnitude to root mean square of each
Haar band of the brightness says which, whatever the amount of detail.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from factorkit.engine.run_log import RunLog
from factorkit.metrics.frechet import MIN_SIDE, frechet_distance, precision_recall, random_features
from factorkit.report.content import Check, judged_alarms, log_checks
from factorkit.segdiff.alarms import MIN_JUDGED_STEPS
from factorkit.utils.errors import DataError, format_count
from factorkit.utils.files import read_log
from factorkit.utils.images import pixels_to_images
from factorkit.utils.rng import derived_seed

DRAWN_IMAGES, GRAIN = "drawn images", "grain of drawn images"  # names of the checks
STRUCTURE = "structure of drawn images"
MAX_GRAIN = 0.055  # of pixels in [0, 1]: photos below .01, the demo .041, half-trained runs .058 to .1
MAX_NOISE_IN_DETAIL = 0.82  # photos 0, the demo .61, 800 steps .72 to .77, half-trained runs .86 to .94
GAUSSIAN_RATIO = (2 / math.pi) ** 0.5  # mean magnitude to root mean square of Gaussian noise
CHANCE_ERRORS = 3  # standard errors, of as many photos as drawn images, below which it is chance
GRAY = 1e-3  # largest colour difference of photos without colour
MAX_NOISE_SHARE = 0.5  # success .2-.35, untrained 3-7, a colour or the mean image 3-9, smooth blobs 1.1-2
NUM_CHECKED = 32  # images drawn at the end of a training
NUM_CHECK_STEPS = 10  # denoising steps of these
MIN_CHECKED = 16  # images below which the distances mean little
READING_BATCH_SIZE = 32  # photos
MAX_REFERENCE = 1000  # photos that others are compared with


@dataclass(frozen=True)
class DrawnScores:
    """Scores of drawn images.

    Attributes:
        images: drawn, and photos and noise in their place.
        side: of the images in pixels, as they are compared.
        frechet: distance of the drawn images to the reference photos.
        frechet_photos: that of other photos.
        frechet_noise: that of these other photos with their pixels in random order.
        precision, recall: of the drawn images against the other photos.
        photos_precision, photos_recall: of reference photos, as many, in the place of the drawn images.
        grain: deviation of the white noise by which the drawn images have more fine detail than the photos.
        grain_by_chance: that which as many photos have by chance, since photos differ in their fine detail.
        noise_in_detail: share of the way from the sparse fine detail of photos (0) to Gaussian noise (1).
        noise_in_detail_by_chance: that which as many photos have by chance.
    """

    images: int
    side: int
    frechet: float
    frechet_photos: float
    frechet_noise: float
    precision: float
    recall: float
    photos_precision: float
    photos_recall: float
    grain: float
    grain_by_chance: float
    noise_in_detail: float
    noise_in_detail_by_chance: float

    @property
    def noise_share(self) -> float:
        """Share of the way from photos (0) to noise (1)."""
        return (self.frechet - self.frechet_photos) / max(self.frechet_noise - self.frechet_photos, 1e-9)

    def checks(self) -> list[Check]:
        """Return the alarms of images that are noise."""
        distance = (
            f"drawn images are noise: their distance to the photos is {self.frechet:.3f}, beyond the middle between "
            f"{self.frechet_photos:.3f} of other photos and {self.frechet_noise:.3f} of shuffled pixels"
        )
        max_grain = max(MAX_GRAIN, self.grain_by_chance)
        grain = (
            f"{GRAIN}: they have the fine detail of photos under white noise of deviation {self.grain:.3f} (pixels in "
            f"[0, 1]; at most {max_grain:.3f}); train for more steps"
        )
        max_noise = max(MAX_NOISE_IN_DETAIL, self.noise_in_detail_by_chance)
        structure = (
            f"{STRUCTURE}: their fine detail is {self.noise_in_detail:.2f} of the way from photos to noise (at most "
            f"{max_noise:.2f}); train for more steps"
        )
        return [
            Check(name, value, high=high, failures=(failure,) if value > high else ())
            for name, value, high, failure in (
                (DRAWN_IMAGES, self.noise_share, MAX_NOISE_SHARE, distance),
                (GRAIN, self.grain, max_grain, grain),
                (STRUCTURE, self.noise_in_detail, max_noise, structure),
            )
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return all figures by name."""
        return {**dataclasses.asdict(self), "noise_share": self.noise_share}


def choose_photos(count: int, drawn: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which of ``count`` photos to compare with and which to put in the place of drawn images, apart.

    Raises:
        DataError: too few photos.
    """
    if count < 2 * MIN_CHECKED:
        raise DataError(f"{format_count(count, 'photo')}: drawn images are compared with at least {2 * MIN_CHECKED}")
    order = np.random.default_rng(derived_seed("drawn images")).permutation(count)
    drawn = min(drawn, count // 2)
    return np.sort(order[drawn:][:MAX_REFERENCE]), np.sort(order[:drawn])


def read_photos(pixels: np.ndarray, latent_factor: int) -> Tensor:
    """Return photos uint8 [N, R, R, 3] as :func:`score_drawn` averages them, [N, 3, r, r] in [0, 1]."""
    starts = range(0, len(pixels), READING_BATCH_SIZE)
    batches = (pixels_to_images(pixels[start : start + READING_BATCH_SIZE]) for start in starts)
    return torch.cat([average_squares(batch, latent_factor) for batch in batches])


def average_squares(images: Tensor, latent_factor: int) -> Tensor:
    """Return images [n, 3, R, R] averaged to R / latent_factor pixels a side, or a few more where these are below 9."""
    return F.avg_pool2d(images, max(1, min(latent_factor, images.shape[3] // MIN_SIDE)))


def score_drawn(drawn: Tensor, reference: Tensor, others: Tensor, latent_factor: int = 1) -> DrawnScores:
    """Score ``drawn`` images [n, 3, R, R] in [0, 1] against photos; ``others`` has as many, ``reference`` any number.

    They are compared after :func:`average_squares`, since a decoder of latents makes even noise smooth; photos may be
    averaged already.

    Raises:
        DataError: too few images, or sides below 9 pixels.
    """
    drawn = average_squares(drawn, latent_factor)
    reference, others = (F.avg_pool2d(photos, photos.shape[3] // drawn.shape[3]) for photos in (reference, others))
    generator = torch.Generator().manual_seed(derived_seed("shuffled pixels"))
    noise = torch.stack(
        [image.flatten(1)[:, torch.randperm(image[0].numel(), generator=generator)].view_as(image) for image in others]
    )
    photos, own, other, shuffled = map(random_features, (reference, drawn, others, noise))
    precision, recall = precision_recall(other, own)
    photos_precision, photos_recall = precision_recall(other, photos[: len(own)])
    known = torch.cat([reference, others])
    grain, grain_by_chance = measure_grain(drawn, known)
    noise_in_detail, noise_by_chance = measure_noise_in_detail(drawn, known)
    return DrawnScores(
        images=len(drawn),
        side=drawn.shape[3],
        frechet=frechet_distance(own, photos),
        frechet_photos=frechet_distance(other, photos),
        frechet_noise=frechet_distance(shuffled, photos),
        precision=precision,
        recall=recall,
        photos_precision=photos_precision,
        photos_recall=photos_recall,
        grain=grain,
        grain_by_chance=grain_by_chance,
        noise_in_detail=noise_in_detail,
        noise_in_detail_by_chance=noise_by_chance,
    )


def measure_grain(drawn: Tensor, photos: Tensor) -> tuple[float, float]:
    """Return the grain of ``drawn``, and that of as many photos by chance; both [n, 3, R, R] in [0, 1], R at least 4.

    Both are deviations of white noise. Fine detail of photos without colour is that of their brightness.
    """
    colored = bool(_color_differences(photos).abs().max() > GRAY)
    energies, usual = (
        _fine_energies(_color_differences(images) if colored else images.mean(1, keepdim=True))
        for images in (drawn, photos)
    )
    error = float(usual.std()) * (1 / len(drawn) + 1 / len(photos)) ** 0.5
    return max(0.0, float(energies.mean() - usual.mean())) ** 0.5, (CHANCE_ERRORS * error) ** 0.5


def _color_differences(images: Tensor) -> Tensor:
    """Return the two orthonormal directions across grey, [n, 2, R, R]."""
    r, g, b = images.unbind(1)
    return torch.stack([(r - g) / 2**0.5, (r + g - 2 * b) / 6**0.5], dim=1)


def _fine_energies(images: Tensor) -> Tensor:
    """Return the mean square of the two finest diagonal Haar bands of each image; for white noise its variance."""
    return torch.stack([bands[0].square().double().mean((1, 2, 3)) for bands in _haar_bands(images)]).mean(0)


def measure_noise_in_detail(drawn: Tensor, photos: Tensor) -> tuple[float, float]:
    """Return how far the fine detail of ``drawn`` is from photos (0) to noise (1), and what photos have by chance.

    Arguments as for :func:`measure_grain`. Photos whose detail is as Gaussian as noise have any value by chance.
    """
    ratio, usual = (_magnitude_ratios(images.mean(1, keepdim=True)) for images in (drawn, photos))
    room = max(GAUSSIAN_RATIO - float(usual.mean()), 1e-9)
    error = float(usual.std()) * (1 / len(drawn) + 1 / len(photos)) ** 0.5
    return float(ratio.mean() - usual.mean()) / room, CHANCE_ERRORS * error / room


def _magnitude_ratios(images: Tensor) -> Tensor:
    """Return mean magnitude to root mean square of the six finest Haar bands of each image, averaged; 0 without any."""
    flat = [band.flatten(1).double() for bands in _haar_bands(images) for band in bands]
    return torch.stack([x.abs().mean(1) / x.square().mean(1).sqrt().clamp_min(1e-9) for x in flat]).mean(0)


def _haar_bands(images: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the diagonal and the two other Haar bands of the finest level, then of the next."""
    for _ in range(2):
        images = images[..., : images.shape[-2] // 2 * 2, : images.shape[-1] // 2 * 2]
        a, b, c, d = (images[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
        yield (a - b - c + d) / 2, (a + b - c - d) / 2, (a - b + c - d) / 2
        images = (a + b + c + d) / 2


def log_drawn_checks(folder: Path, step: int, added: Sequence[Check]) -> None:
    """Add the checks of drawn images to the newest alarms of a run, in the place of earlier ones."""
    alarms, _ = judged_alarms(read_log(folder))
    alarms = alarms if alarms is not None and alarms["step"] == step else {}
    names = (DRAWN_IMAGES, GRAIN, STRUCTURE)
    checks = [record for record in alarms.get("checks", ()) if record.get("name") not in names]
    failures = [failure for failure in alarms.get("failures", ()) if not failure.startswith(names)]
    new = log_checks(added)
    fields = {key: value for key, value in alarms.items() if key not in ("event", "time", "step")}
    fields |= {"checks": checks + new["checks"], "failures": failures + new["failures"]}
    with RunLog(folder) as log:
        log.event("alarms", step=step, **fields)


def skip_checks(step: int, photos: int) -> list[Check]:
    """Return the check of a run of too few training steps or photos to be judged by drawn images; [] for others."""
    if step < MIN_JUDGED_STEPS:
        reason = f"since {format_count(step, 'step')} of training are fewer than {MIN_JUDGED_STEPS}"
    elif photos < 2 * MIN_CHECKED:
        reason = f"since {format_count(photos, 'photo')} are fewer than {2 * MIN_CHECKED}"
    else:
        return []
    return [Check(DRAWN_IMAGES, not_run=reason)]
