"""Figures 2.16 and 2.17: regions within regions, level by level."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from factorkit.data.datasets import make_procedural_dataset
from factorkit.data.masks import load_labelled
from factorkit.report.image_grid import draw_image_grid, overlay_enlarged
from factorkit.reproduce.experiment import CellResult, Experiment, Row, Setup, percent
from factorkit.reproduce.segdiff_runs import Trainings
from factorkit.segdiff.inference.segment import level_labels
from factorkit.utils.errors import ConfigError
from factorkit.utils.images import unit_to_uint8

NESTING = (3, 3)
GRID_IMAGES = 6


def _rows(setup: Setup) -> list[Row]:
    regions = setup.changes.get("regions", NESTING)
    if regions != NESTING:
        raise ConfigError(f"fig2.16 needs regions={NESTING}, not {regions!r}; leave regions= out")
    return [Row("two levels", partial(_compute, Trainings(setup, "flowers64")))]


def _compute(trainings: Trainings, seed: int) -> CellResult:
    setup = trainings.setup
    preset = "rooms32" if setup.scale == "small" else None  # the preset for two levels
    run = trainings.train("two levels", seed, preset=preset, regions=NESTING)
    truth, scores, numbers = None, run.scores or {}, {}
    if setup.data is None:
        dataset = make_procedural_dataset(run.config.resolution, nested=True)
        assert dataset.test_images is not None and dataset.test_masks is not None
        labelled = load_labelled(dataset.test_images, dataset.test_masks, run.config.resolution)
        images, truth = labelled.images[-GRID_IMAGES:], labelled.labels[-GRID_IMAGES:]
        numbers = {f"level{n}": value for n, value in enumerate(scores.get("accuracy", ()), start=1)}
        numbers |= {"within": scores["within"][-1]} if numbers else {}
    else:
        images = trainings.training_pixels(run.config, GRID_IMAGES)
    segmentation = run.segment(images)
    leaf_labels, coarse_masks = segmentation.labels, segmentation.level(1).masks
    assert isinstance(leaf_labels, Tensor) and isinstance(coarse_masks, Tensor), "all images have one size"
    labels, masks = leaf_labels.numpy(), coarse_masks.numpy()
    if numbers:  # draw regions in the colours of the classes that they are matched with
        labels, masks = np.asarray(scores["mapping"][1])[labels], masks[:, np.argsort(scores["mapping"][0])]
    rows = []
    for n, image in enumerate(images):
        true_levels = [] if truth is None else _outline_levels(image, truth[n])
        rows.append([image, *true_levels, *_outline_levels(image, labels[n]), *(unit_to_uint8(m) for m in masks[n])])
    captions = ["image", *([] if truth is None else ["things", "parts"]), "level 1", "level 2"]
    captions += [f"mask {i + 1}" for i in range(NESTING[0])]
    return CellResult(numbers, images=[setup.save_image(draw_image_grid(rows, captions), f"levels-seed{seed}.png")])


def _outline_levels(image: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    leaves = torch.from_numpy(labels)
    return [overlay_enlarged(image, level_labels(leaves, NESTING, level).numpy()) for level in (1, 2)]


EXPERIMENTS = (
    Experiment(
        name="fig2.16",
        title="two levels of regions within regions",
        data="3D Shapes, or any images, without scores; the default is procedural rooms of three things with three "
        "parts each",
        duration={"small": "11 minutes a seed on one CPU core", "gpu": "not measured", "full": "not measured"},
        columns=(
            percent("level1", "level 1 Acc"),
            percent("level2", "level 2 Acc"),
            percent("within", "level 2 within 1"),
        ),
        rows=_rows,
        figures=("fig2.17",),
        seeds=1,
        notes=("Accuracy of pixels; regions are matched one to one with classes, from the top down.",),
    ),
)
