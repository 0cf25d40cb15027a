"""What tables 2.5 and 2.6 and the figures of drawn pictures share: drawing, and how far from real ones it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from factorkit.data.datasets import make_procedural_dataset, open_dataset
from factorkit.data.prepare import prepare
from factorkit.metrics import frechet
from factorkit.reproduce.experiment import TRAINED_ONCE, Column, Experiment, Found, NotRun, Row
from factorkit.reproduce.setup import Setup
from factorkit.segdiff.config import SegdiffConfig
from factorkit.segdiff.run import Generation, SegdiffRun
from factorkit.utils.errors import ConfigError
from factorkit.utils.images import pixels_to_images

#: pictures drawn, and denoising steps for each
DRAWN = {"small": (256, 25), "gpu": (5000, 50), "full": (50_000, None)}
FACES = "ffhq64"  # the preset, at full scale, of figures of faces

DISTANCE = Column("frechet", "Fréchet, random features", 1.0, 3, lower=True)
FID = Column("fid", "FID", 1.0, 2, lower=True)
NOTE = (
    "Fréchet, random features: the distance of Heusel et al. 2017 between as many generated and training pictures, on "
    "a network of fixed random weights in place of Inception's. It is no FID: only the rows of one table compare. FID "
    "stands in rows of its own, for it needs Inception's weights."
)


def draw(setup: Setup, run: SegdiffRun, seed: int) -> Generation:
    """The pictures of the scale from noise, by DDIM where it draws in few steps."""
    count, steps = DRAWN[setup.scale]
    if steps is None:
        return run.generate(count, steps=None, sampler="ddpm", seed=seed)
    return run.generate(count, steps=min(steps, run.config.timesteps), seed=seed)


def real_pictures(setup: Setup, config: SegdiffConfig, count: int) -> Tensor:
    """Training pictures [count, 3, R, R] in [0, 1], evenly spaced; fewer where there are no more."""
    if setup.data is None:
        source = make_procedural_dataset(config.resolution).train
    else:
        source = open_dataset(setup.data, holdout=config.holdout, mask_set=config.mask_set).train
    images = prepare(source, config.resolution, progress=setup.progress).images
    picked = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int)
    return pixels_to_images(images[picked])


def random_distance(setup: Setup, run: SegdiffRun, images: Tensor) -> float:
    """Fréchet distance of drawn pictures [N, 3, R, R] to as many training pictures, in random features."""
    real = real_pictures(setup, run.config, len(images))
    features = frechet.random_features
    return frechet.frechet_distance(features(images[: len(real)]), features(real))


def fid(setup: Setup, run: SegdiffRun, images: Tensor) -> float:
    """FID of drawn pictures to as many training pictures.

    Raises:
        NotRun: torch-fidelity or its weights are not here; the message says which file goes where.
    """
    real = real_pictures(setup, run.config, len(images))
    try:
        return frechet.compute_fid(real, images[: len(real)], run.device)
    except ConfigError as error:
        raise NotRun(str(error)) from error


def multiply_adds(config: SegdiffConfig) -> int:
    """Of one forward pass of one picture, convolutions and matrix products alone."""
    with torch.device("meta"):
        model = config.build().eval()
        picture = torch.empty(1, 3, config.resolution, config.resolution)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(picture, torch.zeros(1, dtype=torch.int64))
    return counter.get_total_flops() // 2


def faces_experiment(name: str, title: str, cell: Callable[[Setup, int], Found]) -> Experiment:
    """A figure that the dissertation draws of FFHQ, and ``cell`` of table 2.1's training."""
    data = "faces: FFHQ, or any pictures; without: drawn flowers"
    return Experiment(name, title, data, TRAINED_ONCE, (), lambda setup: [Row("ours", cell)], seeds=1)
