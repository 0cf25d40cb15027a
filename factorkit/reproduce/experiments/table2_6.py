"""Table 2.6: how the branches see the masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from factorkit.report.image_grid import draw_image_grid
from factorkit.reproduce.experiment import Citation, Experiment, Found, Row
from factorkit.reproduce.generation import DISTANCE, FID, NOTE, draw, fid, random_distance
from factorkit.reproduce.photos import FIXED, photos, region_labels, score_regions, train
from factorkit.reproduce.setup import Setup
from factorkit.utils.images import images_to_pixels, unit_to_uint8

if TYPE_CHECKING:
    from factorkit.reproduce.runner import Cells

FULL = "cub64"
THESIS = "dissertation, table 2.6, on CUB"
#: the row's name, what its training is called, and the argument; ours is table 2.1's and 2.2's own training
VARIANTS = (
    ("concat", "concat", "concat"),
    ("masking h_mid", "masked_mid", "masked_mid"),
    ("w/o weight sharing", "unshared", "unshared"),
    ("ours", "ours", "masked_skips"),
)
SHOWN = 8


def rows(setup: Setup) -> list[Row]:
    found = [Row(name, lambda s, seed, v=(label, way): cell(s, seed, *v)) for name, label, way in VARIANTS]
    return found + [
        Row(f"{name}: FID", lambda s, seed, v=(label, way): fid_cell(s, seed, *v), seeds=1)
        for name, label, way in VARIANTS
    ]


def trained(setup: Setup, seed: int, label: str, decoding: str):
    changes = {} if decoding == "masked_skips" else {"decoding": decoding}
    return train(setup, label, seed, FULL, **changes)


def cell(setup: Setup, seed: int, label: str, decoding: str) -> Found:
    run, known = trained(setup, seed, label, decoding), photos(setup, FULL)
    found = score_regions(known, region_labels(run, known.labelled.images), run.config.nesting)
    drawn = draw(setup, run, seed)
    generated = images_to_pixels(drawn.images[:SHOWN])
    numbers = {**found.scores, DISTANCE.key: random_distance(setup, run, drawn.images)}
    return Found(numbers, {**found.arrays, "generated": generated})


def fid_cell(setup: Setup, seed: int, label: str, decoding: str) -> Found:
    run = trained(setup, seed, label, decoding)
    return Found({FID.key: fid(setup, run, draw(setup, run, seed).images)})


def sheet(setup: Setup, cells: Cells) -> Sequence[str]:
    known = photos(setup, FULL)
    lines: list[list[np.ndarray]] = [list(known.labelled.images[known.shown])]
    names = ["image"]
    for name, _, _ in VARIANTS:
        if found := cells.arrays(name):
            lines += [[unit_to_uint8(mask) for mask in found["foreground"]], list(found["generated"])]
            names += [name, "  drawn from noise"]
    return [setup.save(draw_image_grid(lines, None, names), "decodings.png")]


EXPERIMENT = Experiment(
    name="table2.6",
    title="ablations of the decoding scheme",
    data="birds: CUB-200-2011, or any folder with images/ and masks/; without: drawn flowers",
    duration={
        "small": "10 minutes a seed on one CPU core",
        "gpu": "not measured",
        "full": "not measured (thesis: 50 000 steps on 8 V100 for each)",
    },
    columns=(*FIXED, DISTANCE, FID),
    rows=rows,
    citations=(
        Citation("concat", THESIS, {"iou": 0.207, "fid": 14.21}),
        Citation("masking h_mid", THESIS, {"iou": 0.202, "fid": 14.33}),
        Citation("w/o weight sharing", THESIS, {"iou": 0.505, "fid": 17.21}),
        Citation("ours", THESIS, {"iou": 0.561, "fid": 10.28}),
    ),
    seeds=2,
    notes=("At the scales small and gpu all rows share the regional form and change the decoding alone.", NOTE),
    draw=sheet,
)
