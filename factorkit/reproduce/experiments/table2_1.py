"""Table 2.1 and figures 2.3, 2.19: foreground on Flower."""

from __future__ import annotations

from functools import partial

from factorkit.reproduce import foreground
from factorkit.reproduce.experiment import Citation, Experiment
from factorkit.reproduce.photos import BEST, FIXED

FULL = "flowers64"
THESIS = "dissertation, table 2.1"


def cited(row: str, source: str, acc: float | None, iou: float | None, dice: float | None) -> Citation:
    """A published row, in the protocol it was scored in."""
    values = {"best_acc": acc, "best_iou": iou, "best_dice": dice}
    return Citation(row, source, {key: value for key, value in values.items() if value is not None})


EXPERIMENT = Experiment(
    name="table2.1",
    title="unsupervised foreground on Flower",
    data="flowers: Flowers-102 with its segmentations, or a folder with images/ and masks/; without: drawn flowers",
    duration={
        "small": "3 minutes a seed on one CPU core", "gpu": "not measured",
        "full": "not measured (thesis: 50 000 steps on 8 V100)",
    },
    columns=(*FIXED, *BEST),
    rows=partial(foreground.rows, full=FULL),
    citations=(
        cited("GrabCut", THESIS, 0.820, 0.692, 0.791),
        cited("ReDO", "Chen et al. 2019, in the " + THESIS, 0.879, 0.764, None),
        cited("IEM", "Savarese et al. 2021, in the " + THESIS, 0.883, 0.768, 0.846),
        cited("IEM+SegNet", "Savarese et al. 2021, in the " + THESIS, 0.896, 0.789, 0.860),
        cited("ours", THESIS, 0.901, 0.797, 0.872),
    ),
    figures=("fig2.3", "fig2.19"),
    notes=foreground.NOTES,
    draw=partial(foreground.draw, full=FULL),
)
