"""Table 2.7 and figures 2.13, 2.28: zero-shot segmentation of PASCAL VOC, each class by itself.

Two data sets meet here: the run is trained on the setup's (the dissertation's: ImageNet, told its classes), and scored
on the VOC given by ``voc``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from factorkit.data.datasets import open_dataset
from factorkit.data.layouts import voc2012
from factorkit.data.masks import LabelledImages, load_labelled
from factorkit.report.image_grid import draw_image_grid
from factorkit.reproduce.experiment import Citation, Column, Experiment, Found, NotRun, Row, percent
from factorkit.reproduce.photos import run_folder, train
from factorkit.reproduce.setup import Setup
from factorkit.segdiff.hierarchy import hard_labels, level_labels, scored_level
from factorkit.segdiff.inference.zero_shot import showing
from factorkit.segdiff.previews import overlay_enlarged
from factorkit.segdiff.run import SegdiffRun
from factorkit.utils.images import pixels_to_signed

FULL = "imagenet64"
SHOWN = 6  # pictures of each class
THESIS = (
    (0.82, 0.57),
    (0.79, 0.47),
    (0.83, 0.58),
    (0.81, 0.51),
    (0.76, 0.47),
    (0.73, 0.54),
    (0.74, 0.48),
    (0.82, 0.66),
    (0.75, 0.64),
    (0.82, 0.45),
    (0.69, 0.62),
    (0.82, 0.67),
    (0.84, 0.53),
    (0.76, 0.52),
    (0.77, 0.46),
    (0.74, 0.46),
    (0.84, 0.64),
    (0.73, 0.51),
    (0.76, 0.56),
    (0.73, 0.47),
)
SOURCE = "dissertation, table 2.7, a model of 64 px and 500 000 steps"


def rows(setup: Setup) -> list[Row]:
    return [Row(name, functools.partial(cell, name=name)) for name in voc2012.CLASSES]


def cell(setup: Setup, seed: int, name: str) -> Found:
    voc = setup.inputs.get("voc")
    if voc is None:
        raise NotRun("give the folder of PASCAL VOC 2012 (VOCdevkit), which is scored: --voc FOLDER")
    found = _scored(setup, seed, voc)
    one = found.scores["classes"].get(name)
    if one is None:
        raise NotRun(f"too few pictures of VOC show {name}")
    numbers = {key: float(one[key]) for key in ("acc", "miou", "iou", "images")}
    return Found(numbers, pictures=[setup.save(_sheet(found, name, one), f"{name}-seed{seed}.png")])


@dataclass(frozen=True)
class _Scored:
    """A run, the pictures it was scored on, and its scores of all classes."""

    run: SegdiffRun
    labelled: LabelledImages
    scores: dict[str, Any]


_known: dict[tuple[Path, Path, str], _Scored] = {}  # every row asks for one class of the same


def _scored(setup: Setup, seed: int, voc: Path) -> _Scored:
    named = setup.data is not None and open_dataset(setup.data, holdout="none").class_names is not None
    label = "classes" if named else "ours"
    key = (run_folder(setup, label, seed, FULL), voc, setup.identity)
    if key not in _known:
        run = train(setup, label, seed, FULL, **({"classes": True} if named else {}))
        val = open_dataset(voc, holdout="none").splits["val"]
        labelled = load_labelled(val.images, val.masks, run.config.resolution)
        _known[key] = _Scored(run, labelled, run.evaluate_zero_shot(voc))
    return _known[key]


def _sheet(found: _Scored, name: str, one: dict[str, Any]) -> Image.Image:
    """Pictures that show a class, and what the run takes for it."""
    config = found.run.config
    rows = showing(found.labelled, voc2012.CLASSES.index(name) + 1)[-SHOWN:]
    images = found.labelled.images[rows]
    told = None if one["told"] is None else config.class_names.index(one["told"])
    masks = found.run.predictor(None, "fast", told)(pixels_to_signed(torch.from_numpy(images)))
    labels = level_labels(hard_labels(masks, config.nesting), config.nesting, scored_level(config.nesting)[0])
    taken = np.isin(labels.numpy(), one["mapping"]).astype(np.int64)
    lines = [list(images), [overlay_enlarged(image, labels) for image, labels in zip(images, taken, strict=True)]]
    return draw_image_grid(lines, None, ["image", name])


EXPERIMENT = Experiment(
    name="table2.7",
    title="zero-shot segmentation of PASCAL VOC by a mapping of labels",
    data="ImageNet in folders, or any images; with --voc PASCAL VOC 2012, which is scored",
    duration={"small": "not measured", "gpu": "not measured", "full": "not measured (thesis: 32 V100)"},
    columns=(percent("acc", "Acc"), percent("miou", "mIoU"), percent("iou", "IoU"), Column("images", "images", 1, 0)),
    rows=rows,
    citations=tuple(
        Citation(name, SOURCE, {"acc": acc, "miou": miou})
        for name, (acc, miou) in zip(voc2012.CLASSES, THESIS, strict=True)
    ),
    figures=("fig2.13", "fig2.28"),
    seeds=1,
    inputs=("voc",),
    notes=(
        "The pictures of val that show a class, cut to their centred square; one mapping from regions to the class, "
        "fitted on up to 16 pictures of train. mIoU: the mean of the IoU of the class and of all else.",
        "A run on the 1000 classes of ImageNet is told the dissertation's class for each of VOC; others are told none.",
    ),
)
