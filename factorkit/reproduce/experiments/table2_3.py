"""Table 2.3 and figures 2.5, 2.21, 2.22: parts of faces on CelebA."""

from __future__ import annotations

from factorkit.reproduce.labels import cited, experiment

THESIS = "dissertation, table 2.3"

EXPERIMENT = experiment(
    name="table2.3",
    title="parts of faces on CelebA",
    data="faces: CelebAMask-HQ with its three segments, or a folder with images/ and masks/; without: drawn flowers",
    full="ffhq64",
    gpus="500 000 steps on 8 V100",
    citations=(
        cited("supervised U-Net", THESIS, 0.957, 0.902),
        cited("DatasetDDPM-unsup.", THESIS, 0.785, 0.693),
        cited("ours", THESIS, 0.879, 0.803),
    ),
    figures=("fig2.5", "fig2.21", "fig2.22"),
    notes=("The dissertation trains on FFHQ and scores on CelebAMask-HQ; here both are splits of the data given.",),
)
