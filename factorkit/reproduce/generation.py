"""What the tables of generated images share: generation, and the distance to training images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from factorkit.metrics import frechet
from factorkit.reproduce.experiment import CellUnavailableError, Column
from factorkit.reproduce.segdiff_runs import Trainings
from factorkit.segdiff.config import ResolvedSegdiffConfig
from factorkit.segdiff.run import Generation, SegdiffRun
from factorkit.utils.errors import ConfigError
from factorkit.utils.images import pixels_to_images

#: Number of generated images, and of denoising steps (None for the whole schedule), by scale.
GENERATED: dict[str, tuple[int, int | None]] = {"small": (256, 25), "gpu": (5000, 50), "full": (50_000, None)}

DISTANCE = Column("frechet", "Fréchet, random features", 1.0, 3, lower=True)
FID = Column("fid", "FID", 1.0, 2, lower=True)
NOTE = (
    "Fréchet, random features: the distance of Heusel et al. 2017 between as many generated and training images, on a "
    "network of fixed random weights in place of Inception's. It is not FID: only the rows of one table compare. FID "
    "has its own rows, because it needs Inception's weights."
)


def generate(scale: str, run: SegdiffRun, seed: int) -> Generation:
    """Generate the images of a scale, by DDIM if in few steps and by DDPM for the whole schedule."""
    count, steps = GENERATED[scale]
    if steps is None:
        return run.generate(count, steps=None, sampler="ddpm", seed=seed)
    return run.generate(count, steps=min(steps, run.config.timesteps), seed=seed)


def random_distance(trainings: Trainings, run: SegdiffRun, images: Tensor) -> float:
    """Return the Fréchet distance of images [N, 3, R, R] to as many training images, in random features."""
    real = pixels_to_images(trainings.training_pixels(run.config, len(images)))
    features = frechet.random_features
    return frechet.frechet_distance(features(images[: len(real)]), features(real))


def fid(trainings: Trainings, run: SegdiffRun, images: Tensor) -> float:
    """Return the FID of images [N, 3, R, R] to as many training images.

    Raises:
        CellUnavailableError: Inception's weights are missing; the message names the file.
    """
    real = pixels_to_images(trainings.training_pixels(run.config, len(images)))
    try:
        return frechet.compute_fid(real, images[: len(real)], run.device)
    except ConfigError as error:
        raise CellUnavailableError(str(error)) from error


def count_multiply_adds(config: ResolvedSegdiffConfig) -> int:
    """Count the multiply-adds of one forward pass of one image, in convolutions and matrix products alone."""
    with torch.device("meta"):
        model = config.build().eval()
        image = torch.empty(1, 3, config.resolution, config.resolution)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(image, torch.zeros(1, dtype=torch.int64))
    return counter.get_total_flops() // 2
