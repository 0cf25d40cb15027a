"""Tables 2.1 and 2.2, figures 2.3, 2.4 and 2.18 to 2.20: foreground without labels, beside trivial predictors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from factorkit.metrics.baselines import BASELINES
from factorkit.report.image_grid import draw_image_grid
from factorkit.reproduce.experiment import (
    SHARED_TRAINING_DURATION,
    CellResult,
    CellUnavailableError,
    Citation,
    Experiment,
    Row,
    RowArrays,
    Setup,
)
from factorkit.reproduce.segdiff_runs import (
    BEST,
    FIXED,
    OurModel,
    Trainings,
    list_our_models,
    predict_regions,
    score_foreground,
    score_regions,
)
from factorkit.utils.images import unit_to_uint8

TRIVIAL = {
    "all foreground": "all_foreground",
    "mean mask of the fitting images": "mean_mask",
    "GrabCut": "grabcut",
    "2-means of an image": "two_means_image",
    "2-means of the set": "two_means_set",
}
MIXTURE = OurModel("ours, masks by mixture, K = 3", "mixture", {"masks": "mixture", "regions": 3})
NOTES = (
    "Acc, IoU, DICE: one mapping from regions to foreground for the whole set, fitted on the first labelled images, "
    "which are not scored. Best: the better of the two for each image by its own label, as ReDO and IEM score, and "
    "with K regions the best union of them; an upper bound beside the first.",
    "The cited rows are of their own splits and resolutions, each scored as its paper did: ReDO and IEM by the better "
    "polarity.",
)
LEVELS_PRESET = "cub64"
LEVELS = (0, 10, 20, 30, 40, 50, 60)  # of a schedule of 1000
TABLE_1, TABLE_2 = "dissertation, table 2.1", "dissertation, table 2.2"


def _score_trivial(trainings: Trainings, baseline: str, seed: int) -> CellResult:
    held_out = trainings.labelled()
    labelled, n = held_out.labelled, held_out.num_fit_images
    try:
        foreground = BASELINES[baseline](labelled.images, labelled.foreground[:n], labelled.valid[:n])
    except ImportError as error:
        raise CellUnavailableError(f"{error}; install the extra: pip install 'factorkit[baselines]'") from error
    return score_foreground(held_out, np.asarray(foreground))


def _score_ours(trainings: Trainings, model: OurModel, seed: int) -> CellResult:
    run, held_out = trainings.train(model.label, seed, **model.changes), trainings.labelled(**model.changes)
    return score_regions(held_out, predict_regions(run, held_out.labelled.images), run.config.nesting)


def _rows(setup: Setup, preset: str) -> list[Row]:
    trainings = Trainings(setup, preset)
    trivial = [Row(row, partial(_score_trivial, trainings, name), 1) for row, name in TRIVIAL.items()]
    # The model of the scale and the mixture have all seeds, the others one.
    ours, *others = list_our_models(trainings)
    return [
        *trivial,
        Row(ours.row, partial(_score_ours, trainings, ours)),
        *(Row(model.row, partial(_score_ours, trainings, model), 1) for model in others),
        Row(MIXTURE.row, partial(_score_ours, trainings, MIXTURE)),
    ]


def _draw(setup: Setup, arrays: RowArrays, preset: str) -> Sequence[str]:
    """Draw the first scored images with their masks and the foreground of every row."""
    held_out = Trainings(setup, preset).labelled()
    images, truth = held_out.labelled.images[held_out.shown], held_out.labelled.foreground[held_out.shown]
    masks = [truth, *(row["foreground"] for row in arrays.values())]
    rows = [list(images), *([unit_to_uint8(mask) for mask in row] for row in masks)]
    return [setup.save_image(draw_image_grid(rows, None, ["image", "truth", *arrays]), "foreground.png")]


def _cite(row: str, source: str, acc: float | None, iou: float | None, dice: float | None) -> Citation:
    values = {"best_acc": acc, "best_iou": iou, "best_dice": dice}
    return Citation(row, source, {key: value for key, value in values.items() if value is not None})


def _table(preset: str, **fields: Any) -> Experiment:
    small = "5 minutes a seed for the default on one CPU core, up to 4 for each other row"
    full = "not measured (thesis: 50 000 steps on 8 V100)"
    return Experiment(
        duration={**SHARED_TRAINING_DURATION, "small": small, "full": full},
        columns=(*FIXED, *BEST),
        notes=NOTES,
        rows=partial(_rows, preset=preset),
        draw=partial(_draw, preset=preset),
        **fields,
    )


def _level_rows(setup: Setup) -> list[Row]:
    trainings = Trainings(setup, LEVELS_PRESET)
    models = list_our_models(trainings)
    return [
        Row(f"{model.row}, t = {t}", partial(_score_level, trainings, model, t)) for model in models for t in LEVELS
    ]


def _score_level(trainings: Trainings, model: OurModel, level: int, seed: int) -> CellResult:
    run, held_out = trainings.train(model.label, seed, **model.changes), trainings.labelled()
    t = level * run.config.timesteps // 1000
    return score_regions(held_out, predict_regions(run, held_out.labelled.images, t), run.config.nesting)


def _draw_levels(setup: Setup, arrays: RowArrays) -> Sequence[str]:
    held_out = Trainings(setup, LEVELS_PRESET).labelled()
    rows = [list(held_out.labelled.images[held_out.shown])]
    rows += [[unit_to_uint8(mask) for mask in row["foreground"]] for row in arrays.values()]
    return [setup.save_image(draw_image_grid(rows, None, ["image", *arrays]), "levels.png")]


EXPERIMENTS = (
    _table(
        "flowers64",
        name="table2.1",
        title="unsupervised foreground on Flower",
        data="flowers: Flowers-102 with its segmentations, or a folder with images/ and masks/; the default is "
        "procedural flowers",
        citations=(
            _cite("GrabCut", TABLE_1, 0.820, 0.692, 0.791),
            _cite("ReDO", "Chen et al. 2019, in the " + TABLE_1, 0.879, 0.764, None),
            _cite("IEM", "Savarese et al. 2021, in the " + TABLE_1, 0.883, 0.768, 0.846),
            _cite("IEM+SegNet", "Savarese et al. 2021, in the " + TABLE_1, 0.896, 0.789, 0.860),
            _cite("ours", TABLE_1, 0.901, 0.797, 0.872),
        ),
        figures=("fig2.3", "fig2.19"),
    ),
    _table(
        "cub64",
        name="table2.2",
        title="unsupervised foreground on CUB",
        data="birds: CUB-200-2011 with its segmentations, or a folder with images/ and masks/; the default is "
        "procedural flowers",
        citations=(
            _cite("GrabCut", TABLE_2, 0.723, 0.360, 0.487),
            _cite("PerturbGAN", "Bielski and Favaro 2019, in the " + TABLE_2, None, 0.380, None),
            _cite("ReDO", "Chen et al. 2019, in the " + TABLE_2, 0.845, 0.426, None),
            _cite("IEM", "Savarese et al. 2021, in the " + TABLE_2, 0.886, 0.522, 0.660),
            _cite("IEM+SegNet", "Savarese et al. 2021, in the " + TABLE_2, 0.893, 0.551, 0.687),
            # not in the dissertation; both tables of the second paper that name it agree on the IoU
            _cite("Layered GAN", "Yang et al. 2022, in Dombrowski et al. 2023, tables 1 and 3", 0.943, 0.697, None),
            _cite("ours", TABLE_2, 0.896, 0.561, 0.694),
        ),
        figures=("fig2.4", "fig2.20"),
    ),
    Experiment(
        name="fig2.18",
        title="segmentation against the noise level t",
        data="birds: CUB-200-2011, or any folder with images/ and masks/; the default is procedural flowers",
        duration=SHARED_TRAINING_DURATION,
        columns=FIXED,
        rows=_level_rows,
        notes=("The dissertation shows images alone.",),
        draw=_draw_levels,
    ),
)
