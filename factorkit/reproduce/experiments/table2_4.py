"""Table 2.4 and figures 2.6, 2.23: objects on ImageNet."""

from __future__ import annotations

from factorkit.reproduce.labels import cited, experiment

THESIS = "dissertation, table 2.4"

EXPERIMENT = experiment(
    name="table2.4",
    title="objects on ImageNet",
    data="objects: ImageNet with Pixel-ImageNet's masks, or a folder with images/ and masks/; without: drawn flowers",
    full="imagenet64",
    gpus="500 000 steps on 32 V100",
    citations=(
        cited("supervised U-Net", THESIS, 0.857, 0.741),
        cited("DatasetDDPM-unsup.", THESIS, 0.741, 0.604),
        cited("ours", THESIS, 0.807, 0.677),
    ),
    figures=("fig2.6", "fig2.23"),
)
