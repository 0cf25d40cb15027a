"""Score predicted regions against foreground or nested labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from factorkit.data.files import format_examples
from factorkit.data.masks import LabelledImages, load_labelled
from factorkit.metrics.baselines import score_baselines
from factorkit.metrics.segmentation import evaluate_masks, nested_accuracy
from factorkit.segdiff.config import ResolvedSegdiffConfig
from factorkit.segdiff.inference.segment import hard_labels, level_labels, scored_level
from factorkit.utils import distributed
from factorkit.utils.errors import DataError
from factorkit.utils.images import pixels_to_signed

VERDICT_BASELINES = ("mean_mask", "two_means_image")  # position and colour: the verdict needs both


def score_labelled_images(
    config: ResolvedSegdiffConfig,
    predict: Callable[[Tensor], Tensor],
    images: Any,
    masks: Any,
    *,
    num_fit_images: int | None = None,
    ignore: int | None = None,
    foreground: Sequence[int] | None = None,
    mask_threshold: int | None = None,
    baselines: bool = False,
    size: int | None = None,
    nesting: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Score the masks that ``predict`` returns for images [N, 3, h, w] in [-1, 1].

    The other arguments are those of :meth:`factorkit.segdiff.run.SegdiffRun.evaluate`.
    """
    size = size or config.resolution
    if foreground is None and mask_threshold is None:
        foreground, mask_threshold = config.foreground, config.mask_threshold
    if nesting is not None:  # every label counts, so there is no foreground to decide on
        foreground, mask_threshold = (), None
    values: dict[str, Any] = {
        "ignore_label": config.ignore if ignore is None else ignore,
        "foreground": foreground,
        "mask_threshold": mask_threshold,
    }
    small = labelled = load_labelled(images, masks, size, **values)
    if size != config.resolution:
        small = load_labelled(images, masks, config.resolution, **values)
    blank = [name for name, valid in zip(labelled.names, labelled.valid, strict=True) if not valid.any()]
    if blank:
        raise DataError(
            f"{format_examples(blank)}: no pixel to score, every one is ignored. Leave these images out, or correct "
            "--ignore"
        )
    soft = predict(pixels_to_signed(torch.from_numpy(small.images)))
    if size != config.resolution:
        soft = F.interpolate(soft, size=(size, size), mode="bilinear", align_corners=False)
    count = max(1, min(config.num_fit_images, len(labelled) // 2)) if num_fit_images is None else num_fit_images
    labels = hard_labels(soft, config.nesting).numpy()
    scores: dict[str, Any]
    if nesting is None:
        scores = score_foreground_regions(labels, labelled, config.nesting, count)
    else:
        scores = nested_accuracy(
            labels, labelled.labels, config.nesting, nesting, valid=labelled.valid, num_fit_images=count
        )
    scores |= {"confidence": soft.amax(1).mean().item(), "size": size}
    if nesting is None:
        names = None if baselines else VERDICT_BASELINES
        scores["baselines"] = distributed.run_on_first(
            lambda: score_baselines(labelled.images, labelled.foreground, labelled.valid, count, names)
        )
    return scores


def score_foreground_regions(
    labels: np.ndarray, labelled: LabelledImages, nesting: Sequence[int], num_fit_images: int
) -> dict[str, Any]:
    """Score labels [N, R, R] of the deepest level by :func:`~factorkit.metrics.segmentation.evaluate_masks`.

    In a hierarchy one level is scored, which ``level`` names: the deepest with few enough regions to map
    (:func:`~factorkit.segdiff.inference.segment.scored_level`).
    """
    level, count = scored_level(nesting)
    labels = level_labels(labels, nesting, level)
    scores = evaluate_masks(labels, labelled.foreground, labelled.valid, count, num_fit_images)
    return scores if len(nesting) == 1 else scores | {"level": level}


def share_images(predict: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function that splits its images among the processes of a distributed run."""
    return lambda images: distributed.map_shares(lambda rows: predict(images[rows]), len(images))
