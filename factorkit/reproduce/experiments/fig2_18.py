"""Figure 2.18: what the noise level does to the segmentation of real pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from factorkit.report.image_grid import draw_image_grid
from factorkit.reproduce.experiment import Experiment, Found, Row
from factorkit.reproduce.photos import FIXED, photos, region_labels, score_regions, train
from factorkit.reproduce.setup import Setup
from factorkit.utils.images import unit_to_uint8

if TYPE_CHECKING:
    from factorkit.reproduce.runner import Cells

FULL = "cub64"
LEVELS = (0, 10, 20, 30, 40, 50, 60)  # of a schedule of 1000


def rows(setup: Setup) -> list[Row]:
    return [Row(f"t = {t}", lambda s, seed, t=t: cell(s, seed, t)) for t in LEVELS]


def cell(setup: Setup, seed: int, level: int) -> Found:
    run, known = train(setup, "ours", seed, FULL), photos(setup, FULL)
    t = level * run.config.timesteps // 1000
    return score_regions(known, region_labels(run, known.labelled.images, t), run.config.nesting)


def sheet(setup: Setup, cells: Cells) -> Sequence[str]:
    known = photos(setup, FULL)
    shown = {name: cells.arrays(name)["foreground"] for name, _ in cells.rows if cells.arrays(name)}
    lines = [
        list(known.labelled.images[known.shown]),
        *([unit_to_uint8(mask) for mask in masks] for masks in shown.values()),
    ]
    return [setup.save(draw_image_grid(lines, None, ["image", *shown]), "levels.png")]


EXPERIMENT = Experiment(
    name="fig2.18",
    title="segmentation against the noise level t",
    data="birds: CUB-200-2011, or any folder with images/ and masks/; without: drawn flowers",
    duration={
        "small": "3 minutes a seed on one CPU core, none after table2.1",
        "gpu": "not measured",
        "full": "not measured",
    },
    columns=FIXED,
    rows=rows,
    notes=("The dissertation shows pictures alone.",),
    draw=sheet,
)
