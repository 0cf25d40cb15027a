"""Table 2.7, figures 2.13 and 2.28: zero-shot segmentation of PASCAL VOC, each class by itself.

The run is trained on the data of the setup (in the dissertation ImageNet with its classes) and scored on VOC.
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
from factorkit.report.image_grid import draw_image_grid, overlay_enlarged
from factorkit.reproduce.experiment import (
    CellResult,
    CellUnavailableError,
    Citation,
    Column,
    Experiment,
    Row,
    Setup,
    percent,
)
from factorkit.reproduce.segdiff_runs import Trainings
from factorkit.segdiff.inference.segment import hard_labels, level_labels, scored_level
from factorkit.segdiff.inference.zero_shot import images_with_label
from factorkit.segdiff.run import SegdiffRun
from factorkit.utils.images import pixels_to_signed

GRID_IMAGES = 6  # of each class
SOURCE = "dissertation, table 2.7, a model of 64 px and 500 000 steps"
# in the order of voc2012.CLASSES
PUBLISHED_ACC = "0.82 0.79 0.83 0.81 0.76 0.73 0.74 0.82 0.75 0.82 0.69 0.82 0.84 0.76 0.77 0.74 0.84 0.73 0.76 0.73"
PUBLISHED_MIOU = "0.57 0.47 0.58 0.51 0.47 0.54 0.48 0.66 0.64 0.45 0.62 0.67 0.53 0.52 0.46 0.46 0.64 0.51 0.56 0.47"


@dataclass(frozen=True)
class _ScoredRun:
    """A run, the images it was scored on, and its scores of all classes."""

    run: SegdiffRun
    labelled: LabelledImages
    scores: dict[str, Any]


def _rows(setup: Setup) -> list[Row]:
    return [Row(name, functools.partial(_score, Trainings(setup, "imagenet64"), name)) for name in voc2012.CLASSES]


def _score(trainings: Trainings, name: str, seed: int) -> CellResult:
    voc = trainings.setup.inputs.get("voc")
    if voc is None:
        raise CellUnavailableError("give the folder of PASCAL VOC 2012 (VOCdevkit), which is scored: --voc FOLDER")
    scored = _train_and_score(trainings, voc, seed)
    scores = scored.scores["classes"].get(name)
    if scores is None:
        raise CellUnavailableError(f"too few images of VOC show {name}")
    numbers = {key: float(scores[key]) for key in ("acc", "miou", "iou", "images")}
    path = trainings.setup.save_image(_draw(scored, name, scores), f"{name}-seed{seed}.png")
    return CellResult(numbers, images=[path])


_scored_runs: dict[tuple[Path, Path, str], _ScoredRun] = {}  # every row needs one class of the same run


def _train_and_score(trainings: Trainings, voc: Path, seed: int) -> _ScoredRun:
    data = trainings.setup.data
    has_classes = data is not None and open_dataset(data, holdout="none").class_names is not None
    label = "classes" if has_classes else "ours"
    key = (trainings.folder(label, seed), voc, trainings.setup.fingerprint)
    if key not in _scored_runs:
        changes: dict[str, Any] = {"classes": True} if has_classes else {}
        run = trainings.train(label, seed, **changes)
        val = open_dataset(voc, holdout="none").splits["val"]
        labelled = load_labelled(val.images, val.masks, run.config.resolution)
        _scored_runs[key] = _ScoredRun(run, labelled, run.evaluate_zero_shot(voc))
    return _scored_runs[key]


def _draw(scored: _ScoredRun, name: str, scores: dict[str, Any]) -> Image.Image:
    """Draw images that show a class, and the regions that are mapped to it."""
    config = scored.run.config
    images = scored.labelled.images[images_with_label(scored.labelled, voc2012.CLASSES.index(name) + 1)[-GRID_IMAGES:]]
    condition = None if scores["label"] is None else config.class_names.index(scores["label"])
    masks = scored.run.predictor(None, "fast", condition)(pixels_to_signed(torch.from_numpy(images)))
    labels = level_labels(hard_labels(masks, config.nesting), config.nesting, scored_level(config.nesting)[0])
    of_class = np.isin(labels.numpy(), scores["mapping"]).astype(np.int64)
    rows = [list(images), [overlay_enlarged(image, mask) for image, mask in zip(images, of_class, strict=True)]]
    return draw_image_grid(rows, None, ["image", name])


EXPERIMENTS = (
    Experiment(
        name="table2.7",
        title="zero-shot segmentation of PASCAL VOC by a mapping of labels",
        data="ImageNet in folders, or any images; with --voc PASCAL VOC 2012, which is scored",
        duration={"small": "not measured", "gpu": "not measured", "full": "not measured (thesis: 32 V100)"},
        columns=(
            percent("acc", "Acc"),
            percent("miou", "mIoU"),
            percent("iou", "IoU"),
            Column("images", "images", 1, 0),
        ),
        rows=_rows,
        citations=[
            Citation(name, SOURCE, {"acc": float(acc), "miou": float(miou)})
            for name, acc, miou in zip(voc2012.CLASSES, PUBLISHED_ACC.split(), PUBLISHED_MIOU.split(), strict=True)
        ],
        figures=("fig2.13", "fig2.28"),
        seeds=1,
        inputs=("voc",),
        notes=(
            "The images of val that show a class, cropped to their centred square; one mapping from regions to the "
            "class, fitted on up to 16 images of train. mIoU: the mean of the IoU of the class and of all else.",
            "A run on the 1000 classes of ImageNet is conditioned on the dissertation's class for each of VOC; others "
            "are not conditioned.",
        ),
    ),
)
