"""Figures 2.9 to 2.12 and 2.27: branches, denoising steps, images of a class, and interpolation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image

from factorkit.reproduce.experiment import SHARED_TRAINING_DURATION, CellResult, CellUnavailableError, Experiment, Row
from factorkit.reproduce.segdiff_runs import Trainings
from factorkit.segdiff.inference.segment import hard_labels
from factorkit.segdiff.previews import (
    draw_branch_grid,
    draw_generation_grid,
    draw_interpolation_grid,
    draw_trajectory_grid,
)
from factorkit.utils.errors import ConfigError, DataError
from factorkit.utils.images import images_to_pixels

STEPS = 50  # denoising steps, at most
FACES, CLASSES = "ffhq64", "imagenet64"  # presets at full scale


def draw_branches(trainings: Trainings, seed: int) -> Image.Image:
    """Draw the masks and the branches of real images (figure 2.9)."""
    run = trainings.train("ours", seed)
    result = run.branches(trainings.training_pixels(run.config, 6))
    images, branches = images_to_pixels(result.images), images_to_pixels(result.branches)
    return draw_branch_grid(images_to_pixels(result.noisy), images, result.masks.numpy(), branches)


def draw_denoising(trainings: Trainings, seed: int) -> Image.Image:
    """Draw images and masks during denoising (figure 2.10)."""
    run = trainings.train("ours", seed)
    generation = run.generate(4, steps=min(STEPS, run.config.timesteps), seed=seed, trajectory=True)
    assert generation.trajectory is not None
    count = len(generation.trajectory)
    steps = [generation.trajectory[i] for i in np.linspace(0, count - 1, min(10, count)).round().astype(int)]
    images = [images_to_pixels(step.images) for step in steps]
    labels = [hard_labels(step.masks, run.config.nesting).numpy() for step in steps]
    return draw_trajectory_grid(images, labels, [step.t for step in steps])


def draw_classes(trainings: Trainings, seed: int) -> Image.Image:
    """Draw generated images of each class with their masks (figures 2.11 and 2.27)."""
    try:
        run = trainings.train("classes", seed, classes=True)
    except (ConfigError, DataError) as error:
        raise CellUnavailableError(f"the images must have classes: {error}") from error
    steps = min(STEPS, run.config.timesteps)
    generation = run.generate(16, steps=steps, seed=seed, classes="all", guidance=2.0)
    return draw_generation_grid(
        images_to_pixels(generation.images), generation.masks.numpy(), generation.labels.numpy()
    )


def draw_interpolation(trainings: Trainings, seed: int) -> Image.Image:
    """Draw the images between pairs of real images (figure 2.12)."""
    run = trainings.train("ours", seed)
    images = trainings.training_pixels(run.config, 6)
    a, b = np.split(images[: len(images) // 2 * 2], 2)
    result = run.interpolate(a, b, frames=9)
    return draw_interpolation_grid(a, b, images_to_pixels(result.images), result.labels.numpy(), result.shares.tolist())


def _figure(
    name: str,
    title: str,
    draw: Callable[[Trainings, int], Image.Image],
    file: str,
    *,
    preset: str = FACES,
    data: str = "faces: FFHQ, or any images; the default is procedural flowers",
    full_duration: str = "not measured",
    figures: tuple[str, ...] = (),
) -> Experiment:
    def compute(trainings: Trainings, seed: int) -> CellResult:
        return CellResult(images=[trainings.setup.save_image(draw(trainings, seed), f"{file}-seed{seed}.png")])

    return Experiment(
        name=name,
        title=title,
        data=data,
        duration=SHARED_TRAINING_DURATION | {"full": full_duration},
        rows=lambda setup: [Row("ours", partial(compute, Trainings(setup, preset)))],
        figures=figures,
        seeds=1,
    )


EXPERIMENTS = (
    _figure("fig2.9", "the regions' masks and branches on real images", draw_branches, "branches"),
    _figure("fig2.10", "images and masks during denoising", draw_denoising, "trajectory"),
    _figure(
        "fig2.11",
        "images of requested classes, with their masks",
        draw_classes,
        "classes",
        preset=CLASSES,
        data="ImageNet, Flowers-102 or CUB in their original layout, which gives the classes",
        full_duration="not measured (thesis: 500 000 steps on 32 V100)",
        figures=("fig2.27",),
    ),
    _figure(
        "fig2.12",
        "interpolation between real images, mixed at a quarter of the noise levels",
        draw_interpolation,
        "interpolation",
    ),
)
