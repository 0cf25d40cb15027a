"""Table 2.4 and figures 2.6, 2.23: objects on ImageNet."""

from __future__ import annotations

from functools import partial

from factorkit.reproduce import labels
from factorkit.reproduce.experiment import Citation, Experiment

FULL = "imagenet64"
THESIS = "dissertation, table 2.4"

EXPERIMENT = Experiment(
    name="table2.4",
    title="objects on ImageNet",
    data="objects: ImageNet with Pixel-ImageNet's masks, or a folder with images/ and masks/; without: drawn flowers",
    duration={
        "small": "5 minutes a seed on one CPU core", "gpu": "not measured",
        "full": "not measured (thesis: 500 000 steps on 32 V100)",
    },
    columns=labels.COLUMNS,
    rows=partial(labels.rows, full=FULL),
    citations=(
        Citation("supervised U-Net", THESIS, {"acc": 0.857, "miou": 0.741}),
        Citation("DatasetDDPM-unsup.", THESIS, {"acc": 0.741, "miou": 0.604}),
        Citation("ours", THESIS, {"acc": 0.807, "miou": 0.677}),
    ),
    figures=("fig2.6", "fig2.23"),
    seeds=1,
    notes=labels.NOTES,
    draw=partial(labels.draw, full=FULL),
)
