"""Table 2.6: ablations of how the branches use the masks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from factorkit.report.image_grid import draw_image_grid
from factorkit.reproduce.experiment import CellResult, Citation, Experiment, Row, RowArrays, Setup
from factorkit.reproduce.experiments.generated_images import DISTANCE, FID, NOTE, fid, generate, random_distance
from factorkit.reproduce.segdiff_runs import (
    FIXED,
    GRID_IMAGES,
    OurModel,
    Trainings,
    list_our_models,
    predict_regions,
    score_regions,
)
from factorkit.utils.images import images_to_pixels, unit_to_uint8

PRESET = "cub64"
DECODINGS = {"concat": "concat", "masking h_mid": "masked_mid", "w/o weight sharing": "unshared"}
PUBLISHED = {  # IoU and FID on CUB
    "concat": (0.207, 14.21),
    "masking h_mid": (0.202, 14.33),
    "w/o weight sharing": (0.505, 17.21),
    "ours": (0.561, 10.28),
}


def _rows(setup: Setup) -> list[Row]:
    trainings = Trainings(setup, PRESET)
    models = [OurModel(row, name, {"masks": "network", "decoding": name}) for row, name in DECODINGS.items()]
    models += list_our_models(trainings)
    rows = [Row(model.row, partial(_score, trainings, model)) for model in models]
    return rows + [Row(f"{model.row}: FID", partial(_score_fid, trainings, model), 1) for model in models]


def _score(trainings: Trainings, model: OurModel, seed: int) -> CellResult:
    run, held_out = trainings.train(model.label, seed, **model.changes), trainings.labelled()
    foreground = score_regions(held_out, predict_regions(run, held_out.labelled.images), run.config.nesting)
    images = generate(trainings.setup.scale, run, seed).images
    scores = {**foreground.scores, DISTANCE.key: random_distance(trainings, run, images)}
    return CellResult(scores, {**foreground.arrays, "generated": images_to_pixels(images[:GRID_IMAGES])})


def _score_fid(trainings: Trainings, model: OurModel, seed: int) -> CellResult:
    run = trainings.train(model.label, seed, **model.changes)
    return CellResult({FID.key: fid(trainings, run, generate(trainings.setup.scale, run, seed).images)})


def _draw(setup: Setup, arrays: RowArrays) -> Sequence[str]:
    held_out = Trainings(setup, PRESET).labelled()
    rows: list[list[np.ndarray]] = [list(held_out.labelled.images[held_out.shown])]
    captions = ["image"]
    for name, row in arrays.items():
        rows += [[unit_to_uint8(mask) for mask in row["foreground"]], list(row["generated"])]
        captions += [name, "  generated from noise"]
    return [setup.save_image(draw_image_grid(rows, None, captions), "decodings.png")]


EXPERIMENTS = (
    Experiment(
        name="table2.6",
        title="ablations of the decoding scheme",
        data="birds: CUB-200-2011, or any folder with images/ and masks/; the default is procedural flowers",
        duration={
            "small": "10 minutes a seed on one CPU core",
            "gpu": "not measured",
            "full": "not measured (thesis: 50 000 steps on 8 V100 for each)",
        },
        columns=(*FIXED, DISTANCE, FID),
        rows=_rows,
        citations=[
            Citation(name, "dissertation, table 2.6, on CUB", {"iou": iou, "fid": value})
            for name, (iou, value) in PUBLISHED.items()
        ],
        seeds=2,
        notes=(
            "At the scales small and gpu the rows have the regional form with masks of the network, and differ in the "
            "decoding alone. The default is shown beside them: its masks do not depend on the decoding.",
            NOTE,
        ),
        draw=_draw,
    ),
)
