"""Table 2.3 and figures 2.5, 2.21, 2.22: parts of faces on CelebA."""

from __future__ import annotations

from functools import partial

from factorkit.reproduce import labels
from factorkit.reproduce.experiment import Citation, Experiment

FULL = "ffhq64"
THESIS = "dissertation, table 2.3"

EXPERIMENT = Experiment(
    name="table2.3",
    title="parts of faces on CelebA",
    data="faces: CelebAMask-HQ with its three segments, or a folder with images/ and masks/; without: drawn flowers",
    duration={
        "small": "5 minutes a seed on one CPU core", "gpu": "not measured",
        "full": "not measured (thesis: 500 000 steps on 8 V100)",
    },
    columns=labels.COLUMNS,
    rows=partial(labels.rows, full=FULL),
    citations=(
        Citation("supervised U-Net", THESIS, {"acc": 0.957, "miou": 0.902}),
        Citation("DatasetDDPM-unsup.", THESIS, {"acc": 0.785, "miou": 0.693}),
        Citation("ours", THESIS, {"acc": 0.879, "miou": 0.803}),
    ),
    figures=("fig2.5", "fig2.21", "fig2.22"),
    seeds=1,
    notes=(
        *labels.NOTES,
        "The dissertation trains on FFHQ and scores on CelebAMask-HQ; here both are splits of the data given.",
    ),
    draw=partial(labels.draw, full=FULL),
)
