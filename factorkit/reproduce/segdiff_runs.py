"""What the experiments of chapter 2 share: trainings, labelled images and their scores."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from factorkit.data.datasets import Dataset, make_procedural_dataset, open_dataset
from factorkit.data.masks import LabelledImages, load_labelled
from factorkit.data.prepare import prepare
from factorkit.engine.config import autocast
from factorkit.metrics.segmentation import evaluate_masks, score_masks
from factorkit.reproduce.experiment import CellResult, CellUnavailableError, Setup, percent
from factorkit.segdiff.backbones import UNetBackbone
from factorkit.segdiff.config import PIXELS, ResolvedSegdiffConfig, SegdiffConfig, preset_config
from factorkit.segdiff.evaluate import score_foreground_regions
from factorkit.segdiff.inference.segment import hard_labels, level_labels, predict_masks
from factorkit.segdiff.presets import PRESETS
from factorkit.segdiff.run import SegdiffRun
from factorkit.segdiff.train import train_segdiff
from factorkit.utils.images import pixels_to_signed

GRID_IMAGES = 8  # images of an image grid
METRICS = ("acc", "iou", "dice")

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


class OurModel(NamedTuple):
    """A form of our model that tables show beside the others.

    Attributes:
        row: its name in tables.
        label: of its training.
        changes: to the settings of the scale.
    """

    row: str
    label: str
    changes: dict[str, Any]


@dataclass(frozen=True)
class Trainings:
    """The trainings of an experiment, at the scale of its setup.

    Attributes:
        setup: of the experiment.
        full_preset: the preset of the thesis, which is used at full scale.
    """

    setup: Setup
    full_preset: str

    @property
    def preset(self) -> str:
        """The preset at this scale. Of presets with equal settings the first, so that equal trainings are shared."""
        first = next(name for name, settings in PRESETS.items() if settings == PRESETS[self.full_preset])
        return {"small": "fast32", "gpu": "fast64", "full": first}[self.setup.scale]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that override the preset."""
        changes = _GPU if self.setup.scale == "gpu" else {}
        if self.setup.changes.get("backbone", "unet") != "unet":
            changes = {key: value for key, value in changes.items() if key not in UNetBackbone.OWN}
        return {**changes, "device": self.setup.device, **self.setup.options, **self.setup.changes}

    def config(self, **changes: Any) -> ResolvedSegdiffConfig:
        """Return the resolved configuration of :meth:`train` with the same changes."""
        return preset_config(self.preset, **{**self.settings, **changes}).resolved()

    @property
    def chooses_regions(self) -> bool:
        """Whether :meth:`train` without regions= chooses K by the images."""
        return preset_config(self.preset, **self.settings).regions is None

    def folder(self, label: str, seed: int) -> Path:
        """Return the folder of the training ``label``. At full scale, where presets differ, its name has the preset."""
        return self.setup.run_folder(f"{self.preset}-{label}" if self.setup.scale == "full" else label, seed)

    def train(
        self, label: str, seed: int, *, preset: str | None = None, classes: Any = None, **changes: Any
    ) -> SegdiffRun:
        """Train, or resume or load, the run that every experiment with this preset calls ``label``."""
        preset, settings = preset or self.preset, {**self.settings, **changes}
        # Always given: a folder of an earlier version, where the default was another, is refused instead of resumed.
        settings["masks"], _ = preset_config(preset, **settings).choose_masks()
        settings.setdefault("latent", PIXELS)  # in which the thesis, and all that tables compare, works
        return train_segdiff(
            self.setup.data,
            out=self.folder(label, seed),
            preset=preset,
            seed=seed,
            progress=self.setup.progress,
            classes=classes,
            **settings,
        )

    def labelled(self, **changes: Any) -> HeldOutImages:
        """Load the labelled images, which are kept out of training.

        Raises:
            CellUnavailableError: the data have no masks.
        """
        config = self.config(**changes)
        options = (config.resolution, config.holdout, config.mask_set, config.ignore, config.num_fit_images)
        return _load_labelled(self.setup.data, self.setup.fingerprint, *options)

    def training_pixels(self, config: SegdiffConfig, count: int) -> np.ndarray:
        """Load evenly spaced training images, uint8 [count, R, R, 3]; fewer if there are no more."""
        if self.setup.data is None:
            source = make_procedural_dataset(config.resolution).train
        else:
            source = open_dataset(self.setup.data, holdout=config.holdout, mask_set=config.mask_set).train
        images = prepare(source, config.resolution, progress=self.setup.progress).images
        rows = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int)
        return np.array(images[rows])


def list_our_models(trainings: Trainings) -> list[OurModel]:
    """Return the model of the scale, whose training is called "ours", and the others of ours to show beside it."""
    config = trainings.config()
    objects, network, thesis = "ours, objects (the default)", "ours, masks of the network", "ours, the thesis' form"
    if config.form == "thesis":
        regional = [(objects, "objects", "auto"), (network, "regional", "network")][len(config.nesting) > 1 :]
        changes = [OurModel(row, label, {"form": "regional", "masks": masks}) for row, label, masks in regional]
        return [OurModel(thesis, "ours", {}), *changes]
    row = {"auto": objects, "network": network}.get(config.masks, f"ours, masks by {config.masks}")
    others = [] if config.masks == "network" else [OurModel(network, "network", {"masks": "network"})]
    if config.backbone == "unet":  # the thesis' form is a U-Net
        others.append(OurModel(thesis, "thesis", {"form": "thesis", "masks": "network"}))
    return [OurModel(row, "ours", {}), *others]


@dataclass(frozen=True)
class HeldOutImages:
    """Labelled images at the resolution of the model; the first of them fit the mapping, the others are scored."""

    dataset: Dataset
    labelled: LabelledImages
    num_fit_images: int

    @property
    def shown(self) -> slice:
        """The scored images in image grids."""
        return slice(self.num_fit_images, self.num_fit_images + GRID_IMAGES)


@functools.lru_cache(maxsize=2)
def _load_labelled(
    data: Path | None,
    fingerprint: str,
    resolution: int,
    holdout: str | int,
    mask_set: str | None,
    ignore: int | None,
    num_fit_images: int,
) -> HeldOutImages:
    if data is None:
        dataset = make_procedural_dataset(resolution)
    else:
        dataset = open_dataset(data, holdout=holdout, mask_set=mask_set)
    if dataset.test_images is None or dataset.test_masks is None:
        raise CellUnavailableError(f"{dataset.name} has no masks to score with; give a folder with images/ and masks/")
    labelled = load_labelled(dataset.test_images, dataset.test_masks, resolution, ignore_label=ignore)
    return HeldOutImages(dataset, labelled, max(1, min(num_fit_images, len(labelled) // 2)))


def predict_regions(run: SegdiffRun, images: np.ndarray, t: int | None = None) -> np.ndarray:
    """Predict the most probable region of each pixel, int64 [N, R, R], of uint8 [N, R, R, 3] at noise level t."""
    t = run.config.segment_t if t is None else t
    assert t is not None, "the configuration of a run is resolved"
    with autocast(run.config, run.device):
        masks = predict_masks(run.model, pixels_to_signed(torch.from_numpy(images)), t, run.schedule)
    return hard_labels(masks, run.config.nesting).numpy()


def score_regions(held_out: HeldOutImages, labels: np.ndarray, nesting: Sequence[int]) -> CellResult:
    """Score the label maps [N, R, R] of all labelled images in both protocols.

    A hierarchy is scored at the level that is named ``level`` among the scores. The array is the predicted foreground.
    """
    scores = score_foreground_regions(labels, held_out.labelled, nesting, held_out.num_fit_images)
    numbers = {key: scores[key] for key in METRICS} | {f"best_{key}": scores[f"oracle_{key}"] for key in METRICS}
    if "level" in scores:
        numbers["level"] = scores["level"]
        labels = level_labels(torch.from_numpy(labels), nesting, scores["level"]).numpy()
    return CellResult(numbers, {"foreground": np.isin(labels[held_out.shown], scores["mapping"])})


def score_foreground(held_out: HeldOutImages, foreground: np.ndarray) -> CellResult:
    """Score boolean foreground masks [N, R, R] in both protocols."""
    labelled, n = held_out.labelled, held_out.num_fit_images
    numbers = score_masks(foreground[n:], labelled.foreground[n:], labelled.valid[n:])
    best = evaluate_masks(foreground.astype(np.int64), labelled.foreground, labelled.valid, 2, n)
    numbers |= {f"best_{key}": best[f"oracle_{key}"] for key in METRICS}
    return CellResult(numbers, {"foreground": foreground[held_out.shown]})
