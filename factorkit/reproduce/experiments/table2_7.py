"""Table 2.7: zero-shot segmentation of PASCAL VOC, each class by itself.

Two data sets meet here: the run is trained on the setup's (the dissertation's: ImageNet, told its classes), and scored
on the VOC that the environment names.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from factorkit.data.datasets import open_dataset
from factorkit.data.layouts import voc2012
from factorkit.reproduce.experiment import Citation, Column, Experiment, Found, NotRun, Row, percent
from factorkit.reproduce.photos import train
from factorkit.reproduce.setup import Setup
from factorkit.segdiff.run import SegdiffRun

FULL = "imagenet64"
VOC = "FACTORKIT_VOC"  # the variable that names its folder
THESIS = (
    (0.82, 0.57), (0.79, 0.47), (0.83, 0.58), (0.81, 0.51), (0.76, 0.47), (0.73, 0.54), (0.74, 0.48), (0.82, 0.66),
    (0.75, 0.64), (0.82, 0.45), (0.69, 0.62), (0.82, 0.67), (0.84, 0.53), (0.76, 0.52), (0.77, 0.46), (0.74, 0.46),
    (0.84, 0.64), (0.73, 0.51), (0.76, 0.56), (0.73, 0.47),
)  # fmt: skip
SOURCE = "dissertation, table 2.7, a model of 64 px and 500 000 steps"


def rows(setup: Setup) -> list[Row]:
    return [Row(name, functools.partial(cell, name=name)) for name in voc2012.CLASSES]


def cell(setup: Setup, seed: int, name: str) -> Found:
    voc = os.environ.get(VOC)
    if not voc:
        raise NotRun(f"set {VOC} to the folder of PASCAL VOC 2012 (VOCdevkit), which is scored")
    one = _scores(setup.run_folder("voc", seed), voc, lambda: _run(setup, seed))["classes"].get(name)
    if one is None:
        raise NotRun(f"too few pictures of VOC show {name}")
    return Found({key: float(one[key]) for key in ("acc", "miou", "iou", "images")})


def _run(setup: Setup, seed: int) -> SegdiffRun:
    """The setup's run, told of its classes where the data have any."""
    named = setup.data is not None and open_dataset(setup.data, holdout="none").class_names is not None
    return train(setup, "told classes" if named else "ours", seed, FULL, **({"classes": True} if named else {}))


_known: dict[tuple[Path, str], dict[str, Any]] = {}  # of all classes, for every row asks for one of them


def _scores(key: Path, voc: str, run: Callable[[], SegdiffRun]) -> dict[str, Any]:
    if (key, voc) not in _known:
        _known[key, voc] = run().evaluate_zero_shot(voc)
    return _known[key, voc]


EXPERIMENT = Experiment(
    name="table2.7",
    title="zero-shot segmentation of PASCAL VOC by a mapping of labels",
    data=f"ImageNet in folders, or any pictures; and VOC 2012, where {VOC} says",
    duration={"small": "not measured", "gpu": "not measured", "full": "not measured (thesis: 32 V100)"},
    columns=(percent("acc", "Acc"), percent("miou", "mIoU"), percent("iou", "IoU"), Column("images", "images", 1, 0)),
    rows=rows,
    citations=tuple(
        Citation(name, SOURCE, {"acc": acc, "miou": miou})
        for name, (acc, miou) in zip(voc2012.CLASSES, THESIS, strict=True)
    ),
    seeds=1,
    notes=(
        "The pictures of val that show a class, cut to their centred square; one mapping from regions to the class, "
        "fitted on up to 16 pictures of train. mIoU: the mean of the IoU of the class and of all else.",
        "A run on the 1000 classes of ImageNet is told the dissertation's class for each of VOC; others are told none.",
    ),
)
