"""A run on the labels of another data set (thesis 2.4.3, 2.5.4): every class scored by itself, by a mapping of labels.

The dissertation segments the pictures of each VOC class with its class-conditional ImageNet model, told the ImageNet
class nearest to it, and scores that class alone as the object. So here: for each class of the data set the pictures
that show it are segmented by a model that is told the run's class of the label map (nothing where there is none), and
one mapping from regions to that class is fitted on pictures that are not scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factorkit.data.datasets import Split, open_dataset
from factorkit.data.layouts import voc2012
from factorkit.data.masks import LabelledImages, load_labelled
from factorkit.metrics.segmentation import fit_mapping, score_masks
from factorkit.segdiff.class_labels import find_label
from factorkit.segdiff.config import ResolvedSegdiffConfig
from factorkit.segdiff.hierarchy import hard_labels, level_labels, scored_level
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
Predictor = Callable[[int | None], Callable[[Tensor], Tensor]]  # of a class the model is told, or none: images to masks


def zero_shot_scores(
    config: ResolvedSegdiffConfig,
    predictor: Predictor,
    data: Any,
    *,
    split: str = "val",
    label_map: Mapping[str, Any] | None,
    num_fit_images: int,
    mask_set: str | None = None,
) -> dict[str, Any]:
    """Score each class of a data set whose masks hold classes.

    Args:
        data: as :func:`factorkit.data.open_dataset` takes it.
        split: whose pictures are scored; "all" where the data set has no splits. The mappings are fitted on pictures
            of "train", where that is another split, else on the first ones of this split.
        label_map: the run's class, by name or number, of each class that the model is to be told; None: the
            dissertation's (table 2.7) for VOC and a run on the 1000 classes of ImageNet, and nothing for other runs.
        num_fit_images: pictures of each class that fit its mapping, at most half of them where there is one split.
        mask_set: of a data set with several sets of masks, which.

    Returns:
        A dictionary fit for JSON: ``classes``, by name: images, fitted_on, told, mapping (the regions that are this
        class), acc, iou, and miou, the mean of the IoU of the object and of everything else, each the mean over images;
        ``missing``, classes without enough pictures to score; acc, iou and miou, means over the classes scored; and of
        a hierarchy ``level``, whose regions are mapped.

    Raises:
        ConfigError: no such split, or a label map that does not fit the data or the run.
        DataError: no masks, or no class can be scored.
    """
    dataset = open_dataset(data, holdout="none", mask_set=mask_set)
    splits = {**dataset.splits, "all": Split(dataset.test_images, dataset.test_masks)}
    if split not in splits:
        raise ConfigError(f"split={split!r}: {dataset.name} has {', '.join(splits)}")
    scored = splits[split]
    if scored.images is None or scored.masks is None or not len(scored.masks):
        raise DataError(f"{dataset.name}: {split!r} has no masks to score with")
    labelled = load_labelled(scored.images, scored.masks, config.resolution, ignore_label=config.ignore)
    other = dataset.splits.get("train") if split not in ("train", "all") else None
    fitted = None
    if other is not None and other.masks is not None and len(other.masks):
        fitted = load_labelled(other.images, other.masks, config.resolution, ignore_label=config.ignore)
    names = _names(dataset.layout, mask_set, labelled)
    told = _told(config, names, label_map)
    found, missing = {}, []
    for number, name in names.items():
        one = _of_class(config, predictor, labelled, fitted, number, told.get(name), num_fit_images)
        if one is None:
            missing.append(name)
        else:
            found[name] = one | {"told": config.class_names[told[name]] if name in told else None}
    if not found:
        raise DataError(f"{dataset.name}: no class has two pictures, one to fit a mapping and one to score")
    means = {key: float(np.mean([one[key] for one in found.values()])) for key in ("acc", "iou", "miou")}
    level = {"level": scored_level(config.nesting)[0]} if len(config.nesting) > 1 else {}
    return {"classes": found, "missing": missing, "split": split, "data": dataset.name, **means, **level}


def _names(layout: str | None, mask_set: str | None, labelled: LabelledImages) -> dict[int, str]:
    """The names of the labels; where nobody says them, of those that are there."""
    if layout == "voc-2012" and mask_set in (None, "class"):
        return dict(enumerate(voc2012.CLASSES, start=1))
    return {int(number): f"label {number}" for number in np.unique(labelled.labels[labelled.valid]) if number}


def _told(
    config: ResolvedSegdiffConfig, names: Mapping[int, str], label_map: Mapping[str, Any] | None
) -> dict[str, int]:
    """The class of the run that the model is told, for each class of the data that has one."""
    if label_map is None:
        fits = len(config.class_names) == IMAGENET_CLASSES
        label_map = {name: THESIS_LABELS[name] for name in names.values() if name in THESIS_LABELS} if fits else {}
    elif not config.class_names:
        raise ConfigError("this run knows no classes to map to; leave the label map out, or train with classes=")
    unknown = sorted(set(label_map) - set(names.values()))
    if unknown:
        wrong, there = ", ".join(map(repr, unknown)), ", ".join(names.values())
        raise ConfigError(f"the label map names {wrong}, but the data set's classes are {there}")
    return {name: find_label(wanted, config.class_names) for name, wanted in label_map.items()}


def _of_class(
    config: ResolvedSegdiffConfig,
    predictor: Predictor,
    labelled: LabelledImages,
    fitted: LabelledImages | None,
    number: int,
    told: int | None,
    num_fit_images: int,
) -> dict[str, Any] | None:
    """The scores of one class; None where there are too few pictures of it."""
    shown = showing(labelled, number)
    rows = shown
    if fitted is not None and len(known := showing(fitted, number)):
        source, chosen = fitted, known[:num_fit_images]
    else:
        source, chosen = labelled, shown[: min(num_fit_images, len(shown) // 2)]
        rows = shown[len(chosen) :]
    if not len(chosen) or not len(rows):
        return None
    predict = predictor(told)
    level, count = scored_level(config.nesting)

    def regions(of: LabelledImages, at: np.ndarray) -> np.ndarray:
        labels = hard_labels(predict(pixels_to_signed(torch.from_numpy(of.images[at]))), config.nesting)
        return level_labels(labels, config.nesting, level).numpy()

    truth = lambda of, at: (of.labels[at] == number, of.valid[at])  # noqa: E731
    mapping = fit_mapping(regions(source, chosen), *truth(source, chosen), count)
    predicted = np.isin(regions(labelled, rows), mapping)
    foreground, valid = truth(labelled, rows)
    of_object, of_rest = score_masks(predicted, foreground, valid), score_masks(~predicted, ~foreground & valid, valid)
    return {
        "images": len(rows),
        "fitted_on": len(chosen),
        "mapping": list(mapping),
        "acc": of_object["acc"],
        "iou": of_object["iou"],
        "miou": (of_object["iou"] + of_rest["iou"]) / 2,
    }


def showing(labelled: LabelledImages, number: int) -> np.ndarray:
    """The pictures in which a class is seen."""
    return np.flatnonzero(((labelled.labels == number) & labelled.valid).any((1, 2)))
