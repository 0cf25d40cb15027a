"""How well a run's regions go with labels, those of its own kind of pictures and those of another data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from factorkit.data.masks import LabelledImages, load_labelled
from factorkit.metrics.baselines import score_baselines
from factorkit.metrics.class_matching import nested_accuracy
from factorkit.metrics.segmentation import evaluate_masks
from factorkit.segdiff.hierarchy import hard_labels, level_labels, scored_level
from factorkit.segdiff.inference.segment import Quality
from factorkit.segdiff.inference.zero_shot import score_zero_shot
from factorkit.utils import distributed
from factorkit.utils.errors import ConfigError
from factorkit.utils.images import pixels_to_signed

if TYPE_CHECKING:
    from factorkit.segdiff.run import SegdiffRun


def label_scores(
    run: SegdiffRun,
    images: Any,
    masks: Any,
    *,
    num_fit_images: int | None,
    ignore: int | None,
    baselines: bool,
    t: int | None,
    size: int | None,
    quality: str | Quality,
    nesting: Sequence[int] | None,
) -> dict[str, Any]:
    """What :meth:`~factorkit.segdiff.run.SegdiffRun.evaluate` answers."""
    config = run.config
    check_scorable(run)
    predict, size = in_shares(run.predictor(t, quality)), size or config.resolution
    ignore = config.ignore if ignore is None else ignore
    small = labelled = load_labelled(images, masks, size, ignore_label=ignore)
    if size != config.resolution:
        small = load_labelled(images, masks, config.resolution, ignore_label=ignore)
    soft = predict(pixels_to_signed(torch.from_numpy(small.images)))
    if size != config.resolution:
        soft = F.interpolate(soft, size=(size, size), mode="bilinear", align_corners=False)
    if num_fit_images is None:
        num_fit_images = max(1, min(config.num_fit_images, len(labelled) // 2))
    found = hard_labels(soft, config.nesting).numpy()
    if nesting is None:
        scores = foreground_scores(found, labelled, config.nesting, num_fit_images)
    else:
        scores = nested_accuracy(
            found, labelled.labels, config.nesting, nesting, valid=labelled.valid, num_fit_images=num_fit_images
        )
    scores |= {"confidence": soft.amax(1).mean().item(), "size": size, "step": run.step}
    if baselines and nesting is None:
        scores["baselines"] = distributed.run_on_first(
            lambda: score_baselines(labelled.images, labelled.foreground, labelled.valid, num_fit_images)
        )
    return scores


def foreground_scores(
    found: np.ndarray, labelled: LabelledImages, nesting: Sequence[int], num_fit_images: int
) -> dict[str, Any]:
    """:func:`~factorkit.metrics.segmentation.evaluate_masks` of labels [N, R, R] of the deepest level.

    Of a hierarchy they are scored, and ``mapping`` and ``areas`` said, at the level that ``level`` names: the deepest
    with few enough regions (:func:`~factorkit.segdiff.hierarchy.scored_level`).
    """
    level, count = scored_level(nesting)
    labels = level_labels(found, nesting, level)
    scores = evaluate_masks(labels, labelled.foreground, labelled.valid, count, num_fit_images)
    return scores if len(nesting) == 1 else scores | {"level": level}


def class_scores(
    run: SegdiffRun, data: Any, *, num_fit_images: int | None, t: int | None, quality: str | Quality, **options: Any
) -> dict[str, Any]:
    """What :meth:`~factorkit.segdiff.run.SegdiffRun.evaluate_zero_shot` answers."""
    check_scorable(run)
    told = {**options, "num_fit_images": num_fit_images or run.config.num_fit_images}
    return score_zero_shot(run.config, lambda label: in_shares(run.predictor(t, quality, label)), data, **told)


def in_shares(predict: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same, each process of a run looking at its share of the images."""
    return lambda images: distributed.map_shares(lambda rows: predict(images[rows]), len(images))


def check_scorable(run: SegdiffRun) -> None:
    """Refuse the plain DDPM in words."""
    if run.config.num_leaf_regions == 1:
        raise ConfigError("this run was trained with regions=1, the plain DDPM: it has no regions to score")
