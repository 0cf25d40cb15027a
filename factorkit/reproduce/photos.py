"""What the experiments of chapter 2 share: photographs, trainings, labelled images and their scores."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from factorkit.data.datasets import Dataset, make_procedural_dataset, open_dataset
from factorkit.data.masks import LabelledImages, load_labelled
from factorkit.metrics.segmentation import evaluate_masks, score_masks
from factorkit.reproduce.experiment import Found, NotRun, percent
from factorkit.reproduce.setup import Setup
from factorkit.segdiff.config import PRESETS, SegdiffConfig, preset_config
from factorkit.segdiff.evaluate import score_foreground
from factorkit.segdiff.hierarchy import hard_labels, level_labels
from factorkit.segdiff.run import SegdiffRun
from factorkit.segdiff.task import predict_masks
from factorkit.segdiff.train import train_segdiff
from factorkit.utils.images import pixels_to_signed

SHOWN = 8  # images in a picture

#: The protocol of this package: one mapping from regions to foreground, fitted on labelled images that are not scored.
FIXED = (percent("acc", "Acc"), percent("iou", "IoU"), percent("dice", "DICE"))
#: The protocol of ReDO and IEM: the better polarity of every image, by its own label.
BEST = (percent("best_acc", "best Acc"), percent("best_iou", "best IoU"), percent("best_dice", "best DICE"))

# At 64 px and C = 128 a step of 32 images is about 23 TFLOP, so that this many fit in a few minutes of a fast GPU.
_GPU: dict[str, Any] = {
    "model_channels": 128,
    "num_res_blocks": 3,
    "attention_resolutions": (16, 8),
    "norm_groups": 32,
    "threads": None,
    "steps": 2000,
    "batch_size": 32,
    "learning_rate": 3e-4,
    "warmup_steps": 100,
    "ema_decay": 0.995,
    "checkpoint_every": 500,
    "sample_every": 1000,
}


def recipe(setup: Setup, full: str = "flowers64") -> tuple[str, dict[str, Any]]:
    """Preset and changes of a training at the setup's scale; ``full`` is the thesis' own preset.

    Of presets with equal settings (cub64 is flowers64) it is the first, so that equal trainings are one.
    """
    first = next(name for name, settings in PRESETS.items() if settings == PRESETS[full])
    preset, changes = {"small": ("fast32", {}), "gpu": ("fast64", _GPU), "full": (first, {})}[setup.scale]
    return preset, {**changes, "device": setup.device, **setup.options, **setup.changes}


def config_of(setup: Setup, full: str = "flowers64", **changes: Any) -> SegdiffConfig:
    """The resolved configuration of :func:`train` with the same arguments."""
    preset, settings = recipe(setup, full)
    return preset_config(preset, **{**settings, **changes}).resolved()


def run_folder(setup: Setup, label: str, seed: int, full: str = "flowers64") -> Path:
    """Where the training ``label`` lies; at the full scale, where experiments differ in their preset, by that too."""
    preset, _ = recipe(setup, full)
    return setup.run_folder(f"{preset}-{label}" if setup.scale == "full" else label, seed)


def train(setup: Setup, label: str, seed: int, full: str = "flowers64", **changes: Any) -> SegdiffRun:
    """Train, or take up, the run that every experiment of this folder and preset calls ``label``."""
    preset, settings = recipe(setup, full)
    return train_segdiff(
        setup.data,
        out=run_folder(setup, label, seed, full),
        preset=preset,
        seed=seed,
        progress=setup.progress,
        **{**settings, **changes},
    )


@dataclass(frozen=True)
class Photos:
    """The labelled images that are scored, at the model's resolution; the first ``fit`` of them fit the mapping."""

    dataset: Dataset
    labelled: LabelledImages
    num_fit_images: int

    @property
    def shown(self) -> slice:
        """The scored images that pictures show."""
        return slice(self.num_fit_images, self.num_fit_images + SHOWN)


def photos(setup: Setup, full: str = "flowers64", **changes: Any) -> Photos:
    """The labelled images, kept out of training.

    Raises:
        NotRun: the data have no masks.
    """
    config = config_of(setup, full, **changes)
    options = (config.resolution, config.holdout, config.mask_set, config.ignore, config.num_fit_images)
    return _photos(setup.data, setup.identity, *options)


@functools.lru_cache(maxsize=2)
def _photos(
    data: Path | None,
    identity: str,
    resolution: int,
    holdout: str | int,
    mask_set: str | None,
    ignore: int | None,
    num_fit_images: int,
) -> Photos:
    if data is None:
        dataset = make_procedural_dataset(resolution)
    else:
        dataset = open_dataset(data, holdout=holdout, mask_set=mask_set)
    if dataset.test_images is None:
        raise NotRun(f"{dataset.name} has no masks to score with; give a folder with images/ and masks/")
    labelled = load_labelled(dataset.test_images, dataset.test_masks, resolution, ignore_label=ignore)
    return Photos(dataset, labelled, max(1, min(num_fit_images, len(labelled) // 2)))


def region_labels(run: SegdiffRun, images: np.ndarray, t: int | None = None) -> np.ndarray:
    """The most probable region of each pixel, int64 [N, R, R], of pictures uint8 [N, R, R, 3], at level t."""
    t = run.config.segment_t if t is None else t
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.config.precision == "bf16"):
        masks = predict_masks(run.model, pixels_to_signed(torch.from_numpy(images)), t, run.schedule)
    return hard_labels(masks, run.config.nesting).numpy()


def score_regions(photos: Photos, labels: np.ndarray, nesting: Sequence[int]) -> Found:
    """Both protocols for a run's label maps [N, R, R] of all labelled images; what the mapping calls foreground is
    shown. A hierarchy is scored at the level that ``level`` among the scores says."""
    found = score_foreground(labels, photos.labelled, nesting, photos.num_fit_images)
    numbers = {key: found[key] for key in ("acc", "iou", "dice")}
    numbers |= {f"best_{key}": found[f"oracle_{key}"] for key in ("acc", "iou", "dice")}
    if "level" in found:
        numbers["level"] = found["level"]
        labels = level_labels(labels, nesting, found["level"])
    return Found(numbers, {"foreground": np.isin(labels[photos.shown], found["mapping"])})


def score_foreground(photos: Photos, predicted: np.ndarray) -> Found:
    """Both protocols for boolean masks [N, R, R] that say themselves what is foreground."""
    labelled, num_fit_images = photos.labelled, photos.num_fit_images
    numbers = score_masks(
        predicted[num_fit_images:], labelled.foreground[num_fit_images:], labelled.valid[num_fit_images:]
    )
    best = evaluate_masks(predicted.astype(np.int64), labelled.foreground, labelled.valid, 2, num_fit_images)
    numbers |= {f"best_{key}": best[f"oracle_{key}"] for key in ("acc", "iou", "dice")}
    return Found(numbers, {"foreground": predicted[photos.shown]})
