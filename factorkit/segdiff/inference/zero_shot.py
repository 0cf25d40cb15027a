"""Scores of a run on the labels of another data set (thesis, 2.4.3 and 2.5.4): each class by itself, by a label map.

The thesis segments the images of each VOC class by its class-conditional ImageNet model, conditioned on the nearest
ImageNet class, and scores that class alone as the object. Here, for each class of the data set, the images that contain
it are segmented under the class that the label map gives (unconditioned if none), and one mapping from regions to the
class is fitted on images that are not scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factorkit.data.datasets import open_dataset
from factorkit.data.layouts import voc2012
from factorkit.data.masks import LabelledImages, load_labelled
from factorkit.data.sources import Source
from factorkit.metrics.segmentation import fit_mapping, score_masks
from factorkit.segdiff.class_labels import find_label
from factorkit.segdiff.config import ResolvedSegdiffConfig
from factorkit.segdiff.inference.segment import hard_labels, level_labels, scored_level
from factorkit.utils.errors import ConfigError, DataError
from factorkit.utils.images import pixels_to_signed

#: Table 2.7: for each class of VOC the class of ImageNet (ILSVRC 2012, counted from 0 in the order of the synsets).
THESIS_LABELS = dict(
    zip(
        voc2012.CLASSES,
        (895, 671, 94, 814, 907, 779, 817, 281, 765, 346, 532, 153, 603, 670, 981, 883, 348, 831, 466, 664),
        strict=True,
    )
)
IMAGENET_CLASSES = 1000
Predictor = Callable[[int | None], Callable[[Tensor], Tensor]]  # condition, or None -> (images -> masks)


def score_zero_shot(
    config: ResolvedSegdiffConfig,
    predictor: Predictor,
    data: Any,
    *,
    split: str = "val",
    label_map: Mapping[str, Any] | None,
    num_fit_images: int,
    mask_set: str | None = None,
) -> dict[str, Any]:
    """Score each class of a data set whose masks contain classes.

    Args:
        predictor: returns the mask predictor for a condition.
        data: as for :func:`factorkit.data.open_dataset`.
        split: of the scored images; "all" for data sets without splits. The mappings are fitted on images of "train" if
            that is another split, else on the first ones of this split.
        label_map: class of the run, by name or number, for each class that conditions the model; None: the thesis's
            (table 2.7) for VOC and a run on the 1000 classes of ImageNet, and empty for other runs.
        num_fit_images: images of each class that fit its mapping, at most half of them if there is one split.
        mask_set: which masks, for a data set with several sets.

    Returns:
        A JSON-serialisable dictionary. ``classes``, by name: images, fitted_on, label (the condition), mapping (the
        regions that are this class), acc, iou, and miou, the mean IoU of the object and of its complement, each
        averaged over images; ``missing``: classes with too few images; acc, iou and miou: means over the scored
        classes; and for a hierarchy ``level``, whose regions are mapped.

    Raises:
        ConfigError: an unknown split, or a label map that does not fit the data or the run.
        DataError: no masks, or no class can be scored.
    """
    dataset = open_dataset(data, holdout="none", mask_set=mask_set)
    splits: dict[str, tuple[Source | None, Source | None]]
    splits = {name: (part.images, part.masks) for name, part in dataset.splits.items()}
    splits["all"] = dataset.test_images, dataset.test_masks
    if split not in splits:
        raise ConfigError(f"split={split!r}: {dataset.name} has {', '.join(splits)}")
    scored = _load_split(splits[split], config)
    if scored is None:
        raise DataError(f"{dataset.name}: {split!r} has no masks to score with")
    fitted = _load_split(splits.get("train", (None, None)), config) if split not in ("train", "all") else None
    names = _class_names(dataset.layout, mask_set, scored)
    conditions = _find_conditions(config, names, label_map)
    classes, missing = {}, []
    for number, name in names.items():
        condition = conditions.get(name)
        result = _score_class(config, predictor, condition, scored, fitted, number, num_fit_images)
        if result is None:
            missing.append(name)
        else:
            classes[name] = result | {"label": None if condition is None else config.class_names[condition]}
    if not classes:
        raise DataError(f"{dataset.name}: no class has two images, one to fit a mapping and one to score")
    means = {key: float(np.mean([result[key] for result in classes.values()])) for key in ("acc", "iou", "miou")}
    level = {"level": scored_level(config.nesting)[0]} if len(config.nesting) > 1 else {}
    return {"classes": classes, "missing": missing, "split": split, "data": dataset.name, **means, **level}


def _load_split(split: tuple[Source | None, Source | None], config: ResolvedSegdiffConfig) -> LabelledImages | None:
    images, masks = split
    if images is None or masks is None or not len(masks):
        return None
    return load_labelled(images, masks, config.resolution, ignore_label=config.ignore)


def _class_names(layout: str | None, mask_set: str | None, scored: LabelledImages) -> dict[int, str]:
    """Return the names of the labels; generic names of the labels that occur if the layout has none."""
    if layout == "voc-2012" and mask_set in (None, "class"):
        return dict(enumerate(voc2012.CLASSES, start=1))
    return {int(number): f"label {number}" for number in np.unique(scored.labels[scored.valid]) if number}


def _find_conditions(
    config: ResolvedSegdiffConfig, names: Mapping[int, str], label_map: Mapping[str, Any] | None
) -> dict[str, int]:
    """Return the run's class that conditions the model for each class of the data that has one."""
    if label_map is None:
        fits = len(config.class_names) == IMAGENET_CLASSES
        label_map = {name: THESIS_LABELS[name] for name in names.values() if name in THESIS_LABELS} if fits else {}
    elif not config.class_names:
        raise ConfigError("this run has no classes to map to; leave the label map out, or train with classes=")
    unknown = sorted(set(label_map) - set(names.values()))
    if unknown:
        wrong, known = ", ".join(map(repr, unknown)), ", ".join(names.values())
        raise ConfigError(f"the label map names {wrong}, but the data set's classes are {known}")
    return {name: find_label(label, config.class_names) for name, label in label_map.items()}


def _score_class(
    config: ResolvedSegdiffConfig,
    predictor: Predictor,
    condition: int | None,
    scored: LabelledImages,
    fitted: LabelledImages | None,
    number: int,
    num_fit_images: int,
) -> dict[str, Any] | None:
    """Score one class; None if there are too few images of it."""
    rows = images_with_label(scored, number)
    if fitted is not None and len(fit_rows := images_with_label(fitted, number)):
        source, fit_rows = fitted, fit_rows[:num_fit_images]
    else:
        source, fit_rows = scored, rows[: min(num_fit_images, len(rows) // 2)]
        rows = rows[len(fit_rows) :]
    if not len(fit_rows) or not len(rows):
        return None
    predict = predictor(condition)
    level, num_regions = scored_level(config.nesting)

    def segment(images: np.ndarray) -> np.ndarray:
        labels = hard_labels(predict(pixels_to_signed(torch.from_numpy(images))), config.nesting)
        return level_labels(labels, config.nesting, level).numpy()

    fit_truth = source.labels[fit_rows] == number
    mapping = fit_mapping(segment(source.images[fit_rows]), fit_truth, source.valid[fit_rows], num_regions)
    predicted = np.isin(segment(scored.images[rows]), mapping)
    truth, valid = scored.labels[rows] == number, scored.valid[rows]
    object_scores, rest_scores = score_masks(predicted, truth, valid), score_masks(~predicted, ~truth & valid, valid)
    return {
        "images": len(rows),
        "fitted_on": len(fit_rows),
        "mapping": list(mapping),
        "acc": object_scores["acc"],
        "iou": object_scores["iou"],
        "miou": (object_scores["iou"] + rest_scores["iou"]) / 2,
    }


def images_with_label(labelled: LabelledImages, number: int) -> np.ndarray:
    """Return the indices of the images in which a label occurs."""
    return np.flatnonzero(((labelled.labels == number) & labelled.valid).any((1, 2)))
