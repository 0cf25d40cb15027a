"""Figure 2.18: the effect of the noise level on the segmentation of real images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from factorkit.report.image_grid import draw_image_grid
from factorkit.reproduce.experiment import SHARED_TRAINING_DURATION, CellResult, Experiment, Row, RowArrays, Setup
from factorkit.reproduce.segdiff_runs import FIXED, OurModel, Trainings, list_our_models, predict_regions, score_regions
from factorkit.utils.images import unit_to_uint8

PRESET = "cub64"
LEVELS = (0, 10, 20, 30, 40, 50, 60)  # of a schedule of 1000


def _rows(setup: Setup) -> list[Row]:
    trainings = Trainings(setup, PRESET)
    models = list_our_models(trainings)
    return [Row(f"{model.row}, t = {t}", partial(_score, trainings, model, t)) for model in models for t in LEVELS]


def _score(trainings: Trainings, model: OurModel, level: int, seed: int) -> CellResult:
    run, held_out = trainings.train(model.label, seed, **model.changes), trainings.labelled()
    t = level * run.config.timesteps // 1000
    return score_regions(held_out, predict_regions(run, held_out.labelled.images, t), run.config.nesting)


def _draw(setup: Setup, arrays: RowArrays) -> Sequence[str]:
    held_out = Trainings(setup, PRESET).labelled()
    rows = [list(held_out.labelled.images[held_out.shown])]
    rows += [[unit_to_uint8(mask) for mask in row["foreground"]] for row in arrays.values()]
    return [setup.save_image(draw_image_grid(rows, None, ["image", *arrays]), "levels.png")]


EXPERIMENTS = (
    Experiment(
        name="fig2.18",
        title="segmentation against the noise level t",
        data="birds: CUB-200-2011, or any folder with images/ and masks/; the default is procedural flowers",
        duration=SHARED_TRAINING_DURATION,
        columns=FIXED,
        rows=_rows,
        notes=("The dissertation shows images alone.",),
        draw=_draw,
    ),
)
