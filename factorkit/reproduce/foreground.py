"""Tables 2.1 and 2.2: foreground found without labels, beside predictors that learn nothing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from factorkit.metrics.baselines import BASELINES
from factorkit.report.image_grid import draw_image_grid
from factorkit.reproduce.experiment import TRAINED_ONCE, Citation, Experiment, Found, NotRun, Row
from factorkit.reproduce.photos import BEST, FIXED, photos, region_labels, score_foreground, score_regions, train
from factorkit.reproduce.setup import Setup
from factorkit.utils.images import unit_to_uint8

if TYPE_CHECKING:
    from factorkit.reproduce.runner import Cells

TRIVIAL = {
    "all foreground": "all_foreground",
    "mean mask of the fitting images": "mean_mask",
    "GrabCut": "grabcut",
    "2-means of an image": "two_means_image",
    "2-means of the set": "two_means_set",
}
OURS, THESIS, MIXTURE = "ours, regional form", "ours, the thesis' form", "ours, masks by mixture, K = 3"

NOTES = (
    "Acc, IoU, DICE: one mapping from regions to foreground for the whole set, fitted on the first labelled images, "
    "which are not scored. Best: the better of the two for each image by its own label, as ReDO and IEM score, and "
    "with K regions the best union of them; an upper bound beside the first.",
    "The cited rows are of their own splits and resolutions, each scored as its paper did: ReDO and IEM by the better "
    "polarity.",
)


def trivial(name: str, setup: Setup, full: str) -> Found:
    """Score a predictor of :data:`factorkit.metrics.baselines.BASELINES`."""
    known = photos(setup, full)
    labelled, num_fit_images = known.labelled, known.num_fit_images
    try:
        predicted = BASELINES[name](
            labelled.images, labelled.foreground[:num_fit_images], labelled.valid[:num_fit_images]
        )
    except ImportError as error:
        raise NotRun(f"{error}; install the extra: pip install 'factorkit[baselines]'") from error
    return score_foreground(known, np.asarray(predicted))


def ours(setup: Setup, seed: int, full: str, label: str = "ours", **changes: object) -> Found:
    """Train a factorized model and score its regions."""
    run = train(setup, label, seed, full, **changes)
    known = photos(setup, full, **changes)
    return score_regions(known, region_labels(run, known.labelled.images), run.config.nesting)


def rows(setup: Setup, full: str) -> list[Row]:
    """The rows of both tables; ``full`` is the thesis' preset for the data."""
    found = [Row(title, lambda s, _, name=name: trivial(name, s, full), seeds=1) for title, name in TRIVIAL.items()]
    # the scale's own form from every seed, the other one beside it from one: at full scale the thesis' comes first
    name, other, form = (THESIS, OURS, "regional") if setup.scale == "full" else (OURS, THESIS, "thesis")
    return [
        *found,
        Row(name, lambda s, seed: ours(s, seed, full)),
        Row(other, lambda s, seed: ours(s, seed, full, form, form=form), seeds=1),
        Row(MIXTURE, lambda s, seed: ours(s, seed, full, "mixture", masks="mixture", regions=3)),
    ]


def draw(setup: Setup, cells: Cells, full: str) -> Sequence[str]:
    """The first scored images with the truth and every row's foreground of seed 0 (figures 2.3, 2.4)."""
    known = photos(setup, full)
    shown = [(name, cells.arrays(name)["foreground"]) for name, _ in cells.rows if cells.arrays(name)]
    images, truth = known.labelled.images[known.shown], known.labelled.foreground[known.shown]
    lines = [
        list(images),
        [unit_to_uint8(t) for t in truth],
        *([unit_to_uint8(mask) for mask in masks] for _, masks in shown),
    ]
    sheet = draw_image_grid(lines, None, ["image", "truth", *(name for name, _ in shown)])
    return [setup.save(sheet, "foreground.png")]


def cited(row: str, source: str, acc: float | None, iou: float | None, dice: float | None) -> Citation:
    """A published row, in the protocol it was scored in."""
    values = {"best_acc": acc, "best_iou": iou, "best_dice": dice}
    return Citation(row, source, {key: value for key, value in values.items() if value is not None})


def experiment(*, full: str, **told: Any) -> Experiment:
    """One of the two tables; ``told`` are the fields that are its own."""
    small, thesis = "7 minutes a seed on one CPU core", "not measured (thesis: 50 000 steps on 8 V100)"
    return Experiment(
        duration={**TRAINED_ONCE, "small": small, "full": thesis},
        columns=(*FIXED, *BEST),
        notes=NOTES,
        rows=partial(rows, full=full),
        draw=partial(draw, full=full),
        **told,
    )
