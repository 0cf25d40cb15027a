"""Figures 2.16 and 2.17: regions within regions, level by level."""

from __future__ import annotations

import numpy as np

from factorkit.data.datasets import make_procedural_dataset
from factorkit.data.masks import load_labelled
from factorkit.report.image_grid import draw_image_grid
from factorkit.reproduce.experiment import Experiment, Found, Row, percent
from factorkit.reproduce.generation import real_pictures
from factorkit.reproduce.photos import recipe, run_folder
from factorkit.reproduce.setup import Setup
from factorkit.segdiff.hierarchy import level_labels
from factorkit.segdiff.previews import overlay_enlarged
from factorkit.segdiff.run import SegdiffRun
from factorkit.segdiff.train import train_segdiff
from factorkit.utils.errors import ConfigError
from factorkit.utils.images import images_to_pixels, unit_to_uint8

NESTING = (3, 3)
SHOWN = 6


def nested(setup: Setup, seed: int) -> SegdiffRun:
    """The run of two levels; at the small scale by the preset made for it."""
    preset, settings = recipe(setup)
    preset = "rooms32" if setup.scale == "small" else preset
    return train_segdiff(
        setup.data,
        out=run_folder(setup, "two levels", seed),
        preset=preset,
        seed=seed,
        progress=setup.progress,
        **{**settings, "regions": NESTING},
    )


def rows(setup: Setup) -> list[Row]:
    given = setup.changes.get("regions", NESTING)
    if given != NESTING:
        raise ConfigError(f"fig2.16 is drawn of regions={NESTING}, not of {given!r}; leave regions= out")
    return [Row("two levels", cell)]


def cell(setup: Setup, seed: int) -> Found:
    run = nested(setup, seed)
    truth, numbers = None, {}
    if setup.data is None:
        dataset = make_procedural_dataset(run.config.resolution, nested=True)
        labelled = load_labelled(dataset.test_images, dataset.test_masks, run.config.resolution)
        images, truth = labelled.images[-SHOWN:], labelled.labels[-SHOWN:]
        scores = run.scores or {}
        numbers = {f"level{n}": value for n, value in enumerate(scores.get("accuracy", ()), start=1)}
        numbers |= {"within": scores["within"][-1]} if numbers else {}
    else:
        images = images_to_pixels(real_pictures(setup, run.config, SHOWN))
    found = run.segment(images)
    labels, masks = found.labels.numpy(), found.level(1).masks.numpy()
    if numbers:  # regions in the colours of the classes they are matched with
        order = np.argsort(scores["mapping"][0])
        labels, masks = np.asarray(scores["mapping"][1])[labels], masks[:, order]
    lines = []
    for n, image in enumerate(images):
        true = [] if truth is None else _levels(image, truth[n])
        lines.append([image, *true, *_levels(image, labels[n]), *(unit_to_uint8(mask) for mask in masks[n])])
    columns = ["image", *([] if truth is None else ["things", "parts"]), "level 1", "level 2"]
    columns += [f"mask {i + 1}" for i in range(NESTING[0])]
    return Found(numbers, pictures=[setup.save(draw_image_grid(lines, columns), f"levels-seed{seed}.png")])


def _levels(image: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """The image with the regions of each level upon it."""
    return [overlay_enlarged(image, level_labels(labels, NESTING, level)) for level in (1, 2)]


EXPERIMENT = Experiment(
    name="fig2.16",
    title="two levels of regions within regions",
    data="3D Shapes, or any pictures, without scores; without: drawn rooms of three things with three parts each",
    duration={"small": "11 minutes a seed on one CPU core", "gpu": "not measured", "full": "not measured"},
    columns=(percent("level1", "level 1 Acc"), percent("level2", "level 2 Acc"), percent("within", "level 2 within 1")),
    rows=rows,
    figures=("fig2.17",),
    seeds=1,
    notes=("Accuracy of pixels; regions are matched one to one with classes, from the top down.",),
)
