"""Table 2.2 and figures 2.4, 2.20: foreground on CUB."""

from __future__ import annotations

from factorkit.reproduce.foreground import cited, experiment

THESIS = "dissertation, table 2.2"

EXPERIMENT = experiment(
    name="table2.2",
    title="unsupervised foreground on CUB",
    data="birds: CUB-200-2011 with its segmentations, or a folder with images/ and masks/; without: drawn flowers",
    full="cub64",
    citations=(
        cited("GrabCut", THESIS, 0.723, 0.360, 0.487),
        cited("PerturbGAN", "Bielski and Favaro 2019, in the " + THESIS, None, 0.380, None),
        cited("ReDO", "Chen et al. 2019, in the " + THESIS, 0.845, 0.426, None),
        cited("IEM", "Savarese et al. 2021, in the " + THESIS, 0.886, 0.522, 0.660),
        cited("IEM+SegNet", "Savarese et al. 2021, in the " + THESIS, 0.893, 0.551, 0.687),
        # the dissertation does not have this row; both tables of the second paper that name it agree on the IoU
        cited("Layered GAN", "Yang et al. 2022, in Dombrowski et al. 2023, tables 1 and 3", 0.943, 0.697, None),
        cited("ours", THESIS, 0.896, 0.561, 0.694),
    ),
    figures=("fig2.4", "fig2.20"),
)
