"""Whether drawn images are images: their distance to photos, between that of other photos and that of noise.

Without labels and without weights from elsewhere: distances are Fréchet distances in fixed random features
(:mod:`factorkit.metrics.frechet`) to photos. The same number of other photos gives the best that can be reached, the
same photos with their pixels in random order give noise of the right colours. The share of the way from the first to
the second is 0 for perfect images and 1 for noise. It finds gross failures: images of half-trained runs, with the right
colours under moderate grain, pass (docs/generation.md).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factorkit.engine.run_folder import RunLog
from factorkit.metrics.frechet import frechet_distance, precision_recall, random_features
from factorkit.report.content import Check, judged_alarms, log_checks
from factorkit.segdiff.alarms import MIN_JUDGED_STEPS
from factorkit.utils.errors import DataError, format_count
from factorkit.utils.files import read_log
from factorkit.utils.rng import derived_seed

DRAWN_IMAGES = "drawn images"  # the check's name
MAX_NOISE_SHARE = 0.5  # success .2-.35, untrained 3-7, a colour or the mean image 3-9, smooth blobs 1.1-2
NUM_CHECKED = 32  # images drawn at the end of a training
NUM_CHECK_STEPS = 10  # denoising steps of these
MIN_CHECKED = 16  # images below which the distances mean little
MAX_REFERENCE = 1000  # photos that others are compared with


@dataclass(frozen=True)
class DrawnScores:
    """Scores of drawn images.

    Attributes:
        images: drawn, and photos and noise in their place.
        frechet: distance of the drawn images to the reference photos.
        frechet_photos: that of other photos.
        frechet_noise: that of these other photos with their pixels in random order.
        precision, recall: of the drawn images against the other photos.
        photos_precision, photos_recall: of reference photos, as many, in the place of the drawn images.
    """

    images: int
    frechet: float
    frechet_photos: float
    frechet_noise: float
    precision: float
    recall: float
    photos_precision: float
    photos_recall: float

    @property
    def noise_share(self) -> float:
        """Share of the way from photos (0) to noise (1)."""
        return (self.frechet - self.frechet_photos) / max(self.frechet_noise - self.frechet_photos, 1e-9)

    def check(self) -> Check:
        """Return the alarm of images that are noise."""
        failure = (
            f"drawn images are noise: their distance to the photos is {self.frechet:.3f}, beyond the middle between "
            f"{self.frechet_photos:.3f} of other photos and {self.frechet_noise:.3f} of shuffled pixels"
        )
        failed = self.noise_share > MAX_NOISE_SHARE
        return Check(
            DRAWN_IMAGES, self.noise_share, high=MAX_NOISE_SHARE, failures=(failure,) if failed else (), decisive=False
        )

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


def score_drawn(drawn: Tensor, reference: Tensor, others: Tensor) -> DrawnScores:
    """Score ``drawn`` images [n, 3, R, R] in [0, 1] against photos; ``others`` has as many, ``reference`` any number.

    Raises:
        DataError: too few images, or sides below 9 pixels.
    """
    generator = torch.Generator().manual_seed(derived_seed("shuffled pixels"))
    noise = torch.stack(
        [image.flatten(1)[:, torch.randperm(image[0].numel(), generator=generator)].view_as(image) for image in others]
    )
    photos, own, other, shuffled = map(random_features, (reference, drawn, others, noise))
    precision, recall = precision_recall(other, own)
    photos_precision, photos_recall = precision_recall(other, photos[: len(own)])
    return DrawnScores(
        images=len(drawn),
        frechet=frechet_distance(own, photos),
        frechet_photos=frechet_distance(other, photos),
        frechet_noise=frechet_distance(shuffled, photos),
        precision=precision,
        recall=recall,
        photos_precision=photos_precision,
        photos_recall=photos_recall,
    )


def log_check(folder: Path, step: int, check: Check) -> None:
    """Add a check to the newest alarms of a run, or replace it there."""
    alarms, _ = judged_alarms(read_log(folder))
    alarms = alarms if alarms is not None and alarms["step"] == step else {}
    checks = [record for record in alarms.get("checks", ()) if record.get("name") != check.name]
    failures = [failure for failure in alarms.get("failures", ()) if not failure.startswith(check.name)]
    added = log_checks([check])
    fields = {key: value for key, value in alarms.items() if key not in ("event", "time", "step")}
    fields |= {"checks": checks + added["checks"], "failures": failures + added["failures"]}
    with RunLog(folder) as log:
        log.event("alarms", step=step, **fields)


def skip_check(step: int, photos: int) -> Check | None:
    """Return the check of a run of too few training steps or photos to be judged by drawn images; None for others."""
    if step < MIN_JUDGED_STEPS:
        reason = f"since {format_count(step, 'step')} of training are fewer than {MIN_JUDGED_STEPS}"
    elif photos < 2 * MIN_CHECKED:
        reason = f"since {format_count(photos, 'photo')} are fewer than {2 * MIN_CHECKED}"
    else:
        return None
    return Check(DRAWN_IMAGES, not_run=reason)
