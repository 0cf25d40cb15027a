"""Figures 2.11, 2.27: pictures of a class, with their masks."""

from __future__ import annotations

from factorkit.reproduce.experiment import Experiment, Found, NotRun, Row
from factorkit.reproduce.photos import train
from factorkit.reproduce.setup import Setup
from factorkit.segdiff.previews import draw_generation_grid
from factorkit.utils.errors import ConfigError, DataError
from factorkit.utils.images import images_to_pixels

FULL = "imagenet64"
SHOWN, STEPS, GUIDANCE = 16, 50, 2.0


def cell(setup: Setup, seed: int) -> Found:
    try:
        run = train(setup, "classes", seed, FULL, classes=True)
    except (ConfigError, DataError) as error:
        raise NotRun(f"it takes pictures with classes: {error}") from error
    steps = min(STEPS, run.config.timesteps)
    drawn = run.generate(SHOWN, steps=steps, seed=seed, classes="all", guidance=GUIDANCE)
    sheet = draw_generation_grid(images_to_pixels(drawn.images), drawn.masks.numpy(), drawn.labels.numpy())
    return Found(pictures=[setup.save(sheet, f"classes-seed{seed}.png")])


EXPERIMENT = Experiment(
    name="fig2.11",
    title="pictures of asked-for classes, with their masks",
    data="ImageNet, Flowers-102 or CUB in their authors' layout, which says the classes",
    duration={
        "small": "3 minutes a seed on one CPU core",
        "gpu": "not measured",
        "full": "not measured (thesis: 500 000 steps on 32 V100)",
    },
    columns=(),
    rows=lambda setup: [Row("ours", cell)],
    figures=("fig2.27",),
    seeds=1,
)
