"""Tables 2.3 and 2.4: regions as classes, beside a taught U-Net and clusters of a plain DDPM's features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from factorkit.data.masks import load_labelled
from factorkit.data.prepare import prepare
from factorkit.metrics.class_matching import IGNORE_LABEL, count_overlaps, match_classes, score_classes
from factorkit.metrics.segmentation import MAX_REGIONS
from factorkit.report.image_grid import draw_image_grid
from factorkit.reproduce.experiment import TRAINED_ONCE, Citation, Experiment, Found, NotRun, Row, percent
from factorkit.reproduce.photos import SHOWN, Photos, config_of, photos, region_labels, run_folder, train
from factorkit.reproduce.setup import Setup
from factorkit.segdiff.baselines.datasetddpm import DatasetDDPM
from factorkit.segdiff.baselines.supervised import ClassUNet, predict_classes, train_supervised
from factorkit.segdiff.previews import overlay_enlarged
from factorkit.segdiff.run import SegdiffRun
from factorkit.utils.errors import ConfigError

if TYPE_CHECKING:
    from factorkit.reproduce.runner import Cells

CLUSTERS = 3  # of k-means, as in the dissertation
CLUSTERED = 200  # unlabelled images the clusters are fitted on
SUPERVISED, CLUSTERING, OURS = "supervised U-Net", "DatasetDDPM-unsup.", "ours"

COLUMNS = (percent("acc", "Acc"), percent("miou", "mIoU"))
NOTES = (
    "Acc and mIoU over all pixels of the scored images. Regions and clusters are matched to classes by the Hungarian "
    "method on the first half of the labelled images, left-over ones to the class they share most with; the second "
    "half is scored.",
    "The supervised U-Net is taught with the split train where the data have one with masks, else with that first "
    "half. DatasetDDPM clusters the features of a plain DDPM trained here for as many steps as ours.",
)


@dataclass(frozen=True)
class Classes:
    """The labelled images as classes: the first ``half`` of them fit, the others are scored."""

    photos: Photos
    truth: np.ndarray
    count: int
    half: int

    def score(self, labels: np.ndarray, regions: int) -> tuple[dict[str, float], np.ndarray]:
        """Acc and mIoU of label maps [N, R, R] of all labelled images, and the class of each region."""
        mapping = match_classes(count_overlaps(labels[: self.half], self.truth[: self.half], regions, self.count))
        counts = count_overlaps(labels[self.half :], self.truth[self.half :], regions, self.count)
        return score_classes(counts, mapping), mapping

    @property
    def shown(self) -> slice:
        return slice(self.half, self.half + SHOWN)


def classes_of(setup: Setup, full: str) -> Classes:
    """The labelled images with their classes: the values of their masks, in order, but the ignored one.

    Raises:
        NotRun: no masks, or more values than classes can be matched.
    """
    known = photos(setup, full)
    labelled = known.labelled
    truth, values = _truth(labelled.labels, labelled.valid, None)
    if len(values) > MAX_REGIONS:
        raise NotRun(f"the masks hold {len(values)} values, more than the {MAX_REGIONS} that are matched as classes")
    return Classes(known, truth, len(values), len(labelled) // 2)


def _truth(labels: np.ndarray, valid: np.ndarray, values: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    values = np.unique(labels[valid]) if values is None else values
    places = np.searchsorted(values, labels).clip(0, len(values) - 1)
    return np.where(valid & (values[places] == labels), places, IGNORE_LABEL), values


def taught(setup: Setup, seed: int, full: str) -> ClassUNet:
    """The supervised U-Net, trained or taken up."""
    known = classes_of(setup, full)
    config = config_of(setup, full, seed=seed)
    images, truth = known.photos.labelled.images[: known.half], known.truth[: known.half]
    split = known.photos.dataset.splits.get("train")
    if split is not None and split.masks is not None:
        labelled = load_labelled(split.images, split.masks, config.resolution, ignore_label=config.ignore)
        values = np.unique(known.photos.labelled.labels[known.photos.labelled.valid])
        images, truth = labelled.images, _truth(labelled.labels, labelled.valid, values)[0]
    folder = run_folder(setup, "supervised", seed, full)
    return train_supervised(images, truth, known.count, config, folder, setup.progress)


def plain(setup: Setup, seed: int, full: str) -> SegdiffRun:
    """The plain DDPM of as many steps as ours, trained or taken up."""
    return train(setup, "plain", seed, full, regions=1)


def clusters(setup: Setup, run: SegdiffRun, seed: int, full: str) -> DatasetDDPM:
    """Clusters of a plain DDPM's features, fitted on unlabelled training images.

    Raises:
        NotRun: scikit-learn is not installed.
    """
    images = prepare(photos(setup, full).dataset.train, run.config.resolution, progress=setup.progress).images
    picked = np.linspace(0, len(images) - 1, min(CLUSTERED, len(images))).round().astype(int)
    try:
        return DatasetDDPM(run, np.array(images[picked]), CLUSTERS, seed)
    except ConfigError as error:
        raise NotRun(str(error)) from error


def our_regions(setup: Setup, full: str) -> int | tuple[int, ...]:
    """K of ours: the scale's own, and no fewer than there are classes; a hierarchy gets more at its deepest level."""
    config, count = config_of(setup, full), classes_of(setup, full).count
    if config.num_leaf_regions >= count:
        return config.regions
    *coarser, _ = config.nesting
    return (*coarser, -(-count // math.prod(coarser))) if coarser else count


def our_run(setup: Setup, seed: int, full: str) -> SegdiffRun:
    """The factorized model with a region for every class; where it is the scale's own, that of table 2.1."""
    regions = our_regions(setup, full)
    if regions == config_of(setup, full).regions:
        return train(setup, "ours", seed, full)
    named = regions if isinstance(regions, int) else "x".join(map(str, regions))
    return train(setup, f"regions={named}", seed, full, regions=regions)


def rows(setup: Setup, full: str) -> list[Row]:
    """The rows of both tables; ``full`` is the thesis' preset for the data."""

    def cell(labels: np.ndarray, regions: int, s: Setup) -> Found:
        known = classes_of(s, full)
        numbers, mapping = known.score(labels, regions)
        return Found(numbers, {"classes": mapping[labels[known.shown]]})

    def supervised(s: Setup, seed: int) -> Found:
        model, known = taught(s, seed, full), classes_of(s, full)
        labels = predict_classes(model, known.photos.labelled.images)
        rest = slice(known.half, None)
        counts = count_overlaps(labels[rest], known.truth[rest], known.count, known.count)
        return Found(score_classes(counts, np.arange(known.count)), {"classes": labels[known.shown]})

    def clustered(s: Setup, seed: int) -> Found:
        return cell(clusters(s, plain(s, seed, full), seed, full).segment(photos(s, full).labelled.images), CLUSTERS, s)

    def ours(s: Setup, seed: int) -> Found:
        run = our_run(s, seed, full)
        return cell(region_labels(run, photos(s, full).labelled.images), run.config.num_leaf_regions, s)

    return [Row(SUPERVISED, supervised), Row(CLUSTERING, clustered), Row(OURS, ours)]


def draw(setup: Setup, cells: Cells, full: str) -> Sequence[str]:
    """The first scored images with the truth and every row's classes of seed 0 (figures 2.5, 2.6)."""
    known = classes_of(setup, full)
    images, truth = known.photos.labelled.images[known.shown], known.truth[known.shown].clip(0)
    shown = {name: cells.arrays(name)["classes"] for name, _ in cells.rows if cells.arrays(name)}
    lines = [[overlay_enlarged(i, c) for i, c in zip(images, found, strict=True)] for found in (truth, *shown.values())]
    return [setup.save(draw_image_grid([list(images), *lines], None, ["image", "truth", *shown]), "classes.png")]


def cited(row: str, source: str, acc: float, miou: float) -> Citation:
    """A published row."""
    return Citation(row, source, {"acc": acc, "miou": miou})


def experiment(*, full: str, gpus: str, notes: Sequence[str] = (), **told: Any) -> Experiment:
    """One of the two tables; ``told`` are the fields that are its own."""
    small, thesis = "5 minutes a seed on one CPU core", f"not measured (thesis: {gpus})"
    return Experiment(
        duration={**TRAINED_ONCE, "small": small, "full": thesis},
        columns=COLUMNS,
        rows=partial(rows, full=full),
        seeds=1,
        notes=(*NOTES, *notes),
        draw=partial(draw, full=full),
        **told,
    )
