"""Tables 2.3 and 2.4, figures 2.5, 2.6 and 2.21 to 2.23: regions as classes, beside two other methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from factorkit.data.masks import load_labelled
from factorkit.data.prepare import prepare
from factorkit.metrics.segmentation import IGNORE_LABEL, MAX_REGIONS, count_overlaps, match_classes, score_classes
from factorkit.report.image_grid import draw_image_grid, overlay_enlarged
from factorkit.reproduce.experiment import (
    SHARED_TRAINING_DURATION,
    CellResult,
    CellUnavailableError,
    Citation,
    Experiment,
    Row,
    RowArrays,
    Setup,
    percent,
)
from factorkit.reproduce.segdiff_runs import (
    GRID_IMAGES,
    HeldOutImages,
    OurModel,
    Trainings,
    list_our_models,
    predict_regions,
)
from factorkit.segdiff.baselines.datasetddpm import DatasetDDPM
from factorkit.segdiff.baselines.supervised import ClassNetwork, predict_classes, train_supervised
from factorkit.segdiff.run import SegdiffRun
from factorkit.utils.errors import ConfigError, format_count

NUM_CLUSTERS = 3  # of k-means, as in the dissertation
CLUSTERED_IMAGES = 200  # unlabelled images that the clusters are fitted on
NOTES = (
    "Acc and mIoU over all pixels of the scored images. Regions and clusters are matched to classes by the Hungarian "
    "method on the first half of the labelled images, remaining ones to the class they share most with; the second "
    "half is scored.",
    "The supervised U-Net is trained on the split train if the data have one with masks, else on that first half. "
    "DatasetDDPM clusters the features of a plain DDPM that is trained here for as many steps as ours.",
)


@dataclass(frozen=True)
class ClassLabels:
    """Labelled images with the classes of their pixels. The first half fits the matching, the rest is scored."""

    held_out: HeldOutImages
    labels: np.ndarray
    num_classes: int

    @property
    def half(self) -> int:
        """Number of images that fit the matching."""
        return len(self.labels) // 2

    @property
    def images(self) -> np.ndarray:
        """All labelled images, uint8 [N, R, R, 3]."""
        return self.held_out.labelled.images

    @property
    def shown(self) -> slice:
        """The scored images in image grids."""
        return slice(self.half, self.half + GRID_IMAGES)

    def match(self, regions: np.ndarray, num_regions: int) -> np.ndarray:
        """Match regions [N, R, R] of all labelled images to classes; returns the class of each region."""
        n = self.half
        return match_classes(count_overlaps(regions[:n], self.labels[:n], num_regions, self.num_classes))

    def score(self, regions: np.ndarray, num_regions: int) -> CellResult:
        """Score the regions [N, R, R] of all labelled images by Acc and mIoU."""
        mapping, n = self.match(regions, num_regions), self.half
        counts = count_overlaps(regions[n:], self.labels[n:], num_regions, self.num_classes)
        return CellResult(score_classes(counts, mapping), {"classes": mapping[regions[self.shown]]})


def load_class_labels(trainings: Trainings) -> ClassLabels:
    """Load the labelled images. Their classes are the values of the masks in order, without the ignored one.

    Raises:
        CellUnavailableError: no masks, or more values than can be matched to classes.
    """
    held_out = trainings.labelled()
    values = np.unique(held_out.labelled.labels[held_out.labelled.valid])
    if len(values) > MAX_REGIONS:
        raise CellUnavailableError(
            f"the masks hold {format_count(len(values), 'value')}; at most {MAX_REGIONS} can be matched as classes"
        )
    return ClassLabels(held_out, _number(held_out.labelled.labels, held_out.labelled.valid, values), len(values))


def _number(labels: np.ndarray, valid: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Replace each label by its index in ``values``, others by IGNORE_LABEL."""
    indices = np.searchsorted(values, labels).clip(0, len(values) - 1)
    return np.where(valid & (values[indices] == labels), indices, IGNORE_LABEL)


def train_class_unet(trainings: Trainings, seed: int) -> ClassNetwork:
    """Train, or resume or load, the supervised U-Net."""
    classes, config = load_class_labels(trainings), trainings.config(seed=seed, masks="network")
    images, labels = classes.images[: classes.half], classes.labels[: classes.half]
    split = classes.held_out.dataset.splits.get("train")
    if split is not None and split.masks is not None:
        labelled = load_labelled(split.images, split.masks, config.resolution, ignore_label=config.ignore)
        known = classes.held_out.labelled
        images = labelled.images
        labels = _number(labelled.labels, labelled.valid, np.unique(known.labels[known.valid]))
    folder, progress = trainings.folder("supervised", seed), trainings.setup.progress
    return train_supervised(images, labels, classes.num_classes, config, folder, progress)


def train_plain(trainings: Trainings, seed: int) -> SegdiffRun:
    """Train, or resume or load, the plain DDPM for as many steps as ours."""
    return trainings.train("plain", seed, regions=1)


def fit_clusters(trainings: Trainings, run: SegdiffRun, seed: int) -> DatasetDDPM:
    """Fit clusters of a plain DDPM's features on unlabelled training images.

    Raises:
        CellUnavailableError: scikit-learn is not installed.
    """
    source, progress = trainings.labelled().dataset.train, trainings.setup.progress
    images = prepare(source, run.config.resolution, progress=progress).images
    rows = np.linspace(0, len(images) - 1, min(CLUSTERED_IMAGES, len(images))).round().astype(int)
    try:
        return DatasetDDPM(run, np.array(images[rows]), NUM_CLUSTERS, seed)
    except ConfigError as error:
        raise CellUnavailableError(str(error)) from error


def choose_our_regions(trainings: Trainings) -> int | tuple[int, ...] | None:
    """Return K of our model: that of the scale, but at least one region per class, in a hierarchy at its last level.

    None: the training chooses it, 2 or 3, which is open only for two classes.
    """
    config, num_classes = trainings.config(), load_class_labels(trainings).num_classes
    if config.num_leaf_regions >= num_classes:
        return None if num_classes <= 2 and trainings.chooses_regions else config.regions
    *coarser, _ = config.nesting
    return (*coarser, -(-num_classes // math.prod(coarser))) if coarser else num_classes


def train_ours(model: OurModel, trainings: Trainings, seed: int) -> SegdiffRun:
    """Train, or resume or load, our model with a region for every class; that of table 2.1 if its K is the same."""
    regions, label = choose_our_regions(trainings), model.label
    if regions is None or (regions == trainings.config().regions and not trainings.chooses_regions):
        return trainings.train(label, seed, **model.changes)
    text = str(regions) if isinstance(regions, int) else "x".join(map(str, regions))
    label = f"regions={text}" if label == "ours" else f"{label}-regions={text}"
    return trainings.train(label, seed, **model.changes, regions=regions)


def _score_supervised(trainings: Trainings, seed: int) -> CellResult:
    model, classes = train_class_unet(trainings, seed), load_class_labels(trainings)
    labels, n, count = predict_classes(model, classes.images), classes.half, classes.num_classes
    overlaps = count_overlaps(labels[n:], classes.labels[n:], count, count)
    return CellResult(score_classes(overlaps, np.arange(count)), {"classes": labels[classes.shown]})


def _score_clusters(trainings: Trainings, seed: int) -> CellResult:
    clusters, classes = fit_clusters(trainings, train_plain(trainings, seed), seed), load_class_labels(trainings)
    return classes.score(clusters.segment(classes.images), NUM_CLUSTERS)


def _score_ours(model: OurModel, trainings: Trainings, seed: int) -> CellResult:
    run, classes = train_ours(model, trainings, seed), load_class_labels(trainings)
    return classes.score(predict_regions(run, classes.images), run.config.num_leaf_regions)


def _rows(setup: Setup, preset: str) -> list[Row]:
    trainings = Trainings(setup, preset)
    return [
        Row("supervised U-Net", partial(_score_supervised, trainings)),
        Row("DatasetDDPM-unsup.", partial(_score_clusters, trainings)),
        *(Row(model.row, partial(_score_ours, model, trainings)) for model in list_our_models(trainings)),
    ]


def _draw(setup: Setup, arrays: RowArrays, preset: str) -> Sequence[str]:
    """Draw the first scored images with their classes and those of every row."""
    known = load_class_labels(Trainings(setup, preset))
    images = known.images[known.shown]
    labels = [known.labels[known.shown].clip(0), *(row["classes"] for row in arrays.values())]
    rows = [
        list(images),
        *([overlay_enlarged(image, of) for image, of in zip(images, row, strict=True)] for row in labels),
    ]
    return [setup.save_image(draw_image_grid(rows, None, ["image", "truth", *arrays]), "classes.png")]


def _table(preset: str, hardware: str, numbers: dict[str, tuple[float, float]], **fields: Any) -> Experiment:
    source = f"dissertation, {fields['name'].replace('table', 'table ')}"
    small, full = "5 minutes a seed on one CPU core", f"not measured (thesis: {hardware})"
    return Experiment(
        duration={**SHARED_TRAINING_DURATION, "small": small, "full": full},
        columns=(percent("acc", "Acc"), percent("miou", "mIoU")),
        rows=partial(_rows, preset=preset),
        citations=[Citation(row, source, {"acc": acc, "miou": miou}) for row, (acc, miou) in numbers.items()],
        seeds=1,
        draw=partial(_draw, preset=preset),
        **fields,
    )


EXPERIMENTS = (
    _table(
        "ffhq64",
        "500 000 steps on 8 V100",
        {"supervised U-Net": (0.957, 0.902), "DatasetDDPM-unsup.": (0.785, 0.693), "ours": (0.879, 0.803)},
        name="table2.3",
        title="parts of faces on CelebA",
        data="faces: CelebAMask-HQ with its three segments, or a folder with images/ and masks/; the default is "
        "procedural flowers",
        figures=("fig2.5", "fig2.21", "fig2.22"),
        notes=(
            *NOTES,
            "The dissertation trains on FFHQ and scores on CelebAMask-HQ; here both are splits of the given data.",
        ),
    ),
    _table(
        "imagenet64",
        "500 000 steps on 32 V100",
        {"supervised U-Net": (0.857, 0.741), "DatasetDDPM-unsup.": (0.741, 0.604), "ours": (0.807, 0.677)},
        name="table2.4",
        title="objects on ImageNet",
        data="objects: ImageNet with Pixel-ImageNet's masks, or a folder with images/ and masks/; the default is "
        "procedural flowers",
        figures=("fig2.6", "fig2.23"),
        notes=NOTES,
    ),
)
