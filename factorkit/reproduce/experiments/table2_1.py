"""Table 2.1 and figures 2.3, 2.19: foreground on Flower."""

from __future__ import annotations

from factorkit.reproduce.foreground import cited, experiment

THESIS = "dissertation, table 2.1"

EXPERIMENT = experiment(
    name="table2.1",
    title="unsupervised foreground on Flower",
    data="flowers: Flowers-102 with its segmentations, or a folder with images/ and masks/; without: drawn flowers",
    full="flowers64",
    citations=(
        cited("GrabCut", THESIS, 0.820, 0.692, 0.791),
        cited("ReDO", "Chen et al. 2019, in the " + THESIS, 0.879, 0.764, None),
        cited("IEM", "Savarese et al. 2021, in the " + THESIS, 0.883, 0.768, 0.846),
        cited("IEM+SegNet", "Savarese et al. 2021, in the " + THESIS, 0.896, 0.789, 0.860),
        cited("ours", THESIS, 0.901, 0.797, 0.872),
    ),
    figures=("fig2.3", "fig2.19"),
)
