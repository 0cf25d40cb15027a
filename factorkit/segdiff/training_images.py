"""The images of a training: reading them, keeping some out, and identifying them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from factorkit.data.datasets import Dataset, make_procedural_dataset, open_dataset
from factorkit.data.prepare import PreparedImages, prepare
from factorkit.segdiff.task import NUM_PROBES
from factorkit.utils.errors import ConfigError, DataError, format_count

MIN_IMAGES = 8  # to train on some and evaluate others
DATA_NAME = "data.name"  # of a run's settings: the data's folder or file, which may move between resumes


def load_data(
    data: Any, resolution: int, holdout: str | int, mask_set: str | None, progress: bool, nested: bool = False
) -> tuple[Dataset, PreparedImages, np.ndarray]:
    """Return the data set, its training images at the model's resolution, and probe images for previews and alarms.

    Arguments as the settings of :class:`~factorkit.segdiff.config.SegdiffConfig`; ``nested`` chooses procedural images
    with regions within regions, where ``data`` is None.
    """
    if data is None:
        dataset = make_procedural_dataset(resolution, nested=nested)
    else:
        dataset = open_dataset(data, holdout=holdout, mask_set=mask_set)
    prepared = prepare(dataset.train, resolution, progress=progress)
    probe_images = prepared
    if dataset.test_images is not None and len(dataset.test_images) >= 2:
        probe_images = prepare(dataset.test_images, resolution, progress=progress)
    # Evenly spaced, so that a folder sorted by class shows all classes.
    chosen = np.linspace(0, len(probe_images) - 1, min(NUM_PROBES, len(probe_images))).round().astype(int)
    probes = probe_images.images[chosen]
    if len(probes) < 2:
        probes = np.concatenate([probes, probes])
    return dataset, prepared, probes


def hold_out(dataset: Dataset, images: np.ndarray, probes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return images to train on, and others to evaluate: held-out labelled ones, else up to a quarter of all.

    Raises:
        DataError: fewer than MIN_IMAGES images.
    """
    if len(images) < MIN_IMAGES:
        raise DataError(
            f"{format_count(len(images), 'image')}: too few to train on some and evaluate others; give {MIN_IMAGES}"
        )
    if dataset.test_images is None or len(dataset.test_images) < 2:
        held_out = np.linspace(0, len(images) - 1, min(NUM_PROBES, len(images) // 4)).round().astype(int)
        probes, images = images[held_out], np.delete(images, held_out, 0)
    return images, probes


def is_training_data(path: Path, description: Mapping[str, Any], config: Any) -> bool:
    """Return whether training with these settings on the data at a path takes the images that ``description`` is of.

    Args:
        path: anything that :func:`factorkit.data.open_source` accepts.
        description: what :func:`describe_data` returned.
        config: ``resolution``, ``holdout`` and ``mask_set`` are read.
    """
    try:
        dataset = open_dataset(path, holdout=config.holdout, mask_set=config.mask_set)
        if len(dataset.train) < description["images"]:
            return False
        own = describe_data(dataset, prepare(dataset.train, config.resolution, progress=False))
    except (ConfigError, DataError, KeyError):
        return False
    return all(own[name] == description.get(name) for name in ("images", "sha256"))


def describe_data(dataset: Dataset, prepared: PreparedImages, labels: np.ndarray | None = None) -> dict[str, Any]:
    """Identify the training images by content: number, a hash of a sample of their pixels, and one of all labels.

    The name of the folder or file is for people; a run resumes for the same images under any other (`DATA_NAME`).
    """
    digest = hashlib.sha256()
    for i in np.linspace(0, len(prepared) - 1, min(64, len(prepared))).round().astype(int):
        digest.update(np.ascontiguousarray(prepared.images[i]))
    description = {"name": dataset.name, "images": len(prepared), "sha256": digest.hexdigest()[:16]}
    if labels is not None:
        description["labels_sha256"] = hashlib.sha256(np.ascontiguousarray(labels)).hexdigest()[:16]
    return description
