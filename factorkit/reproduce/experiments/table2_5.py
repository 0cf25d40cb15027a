"""Table 2.5 and figures 2.7, 2.8, 2.24 to 2.26: pictures and masks drawn from noise, beside the plain DDPM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from factorkit.metrics.class_matching import count_overlaps, score_classes
from factorkit.report.image_grid import draw_image_grid
from factorkit.reproduce import labels
from factorkit.reproduce.experiment import Citation, Column, Experiment, Found, Row, percent
from factorkit.reproduce.generation import DISTANCE, FID, NOTE, draw, fid, multiply_adds, random_distance
from factorkit.reproduce.photos import SHOWN, config_of, region_labels, train
from factorkit.reproduce.setup import Setup
from factorkit.segdiff.baselines.supervised import predict_classes
from factorkit.segdiff.previews import overlay_enlarged
from factorkit.segdiff.run import SegdiffRun
from factorkit.utils.images import images_to_pixels

if TYPE_CHECKING:
    from factorkit.reproduce.runner import Cells

FULL = "flowers64"
THESIS = "dissertation, table 2.5"
SETS = ("Flower-64", "Flower-128", "CUB-64", "CUB-128", "FFHQ-64", "FFHQ-128", "ImageNet-64")
CITED = {
    "DDPM": (15.81, 14.62, 14.45, 14.01, 13.72, 13.35, 7.02),
    "ours": (13.33, 11.50, 10.91, 10.28, 12.02, 10.79, 6.54),
}
STEPS, COMPUTE, OURS = "plain DDPM, equal steps", "plain DDPM, equal compute", "ours"


def longer(setup: Setup) -> int:
    """Steps of a plain DDPM that cost as many multiply-adds as ours."""
    ours, plain = config_of(setup, FULL, regions=labels.our_regions(setup, FULL)), config_of(setup, FULL, regions=1)
    return round(ours.steps * multiply_adds(ours) / multiply_adds(plain))


def plain_compute(setup: Setup, seed: int) -> SegdiffRun:
    return train(setup, "plain-compute", seed, FULL, regions=1, steps=longer(setup))


def rows(setup: Setup) -> list[Row]:
    runs = {
        STEPS: lambda s, seed: labels.plain(s, seed, FULL),
        COMPUTE: plain_compute,
        OURS: lambda s, seed: labels.our_run(s, seed, FULL),
    }
    found = [Row(name, lambda s, seed, run=run: cell(s, seed, run(s, seed))) for name, run in runs.items()]
    return found + [
        Row(f"{name}: FID", lambda s, seed, run=run: fid_cell(s, seed, run(s, seed)), seeds=1)
        for name, run in runs.items()
    ]


def cell(setup: Setup, seed: int, run: SegdiffRun) -> Found:
    """Distance, and how far the masks agree with what the supervised U-Net finds in the same pictures."""
    drawn = draw(setup, run, seed)
    pixels = images_to_pixels(drawn.images)
    known, reference = labels.classes_of(setup, FULL), predict_classes(labels.taught(setup, seed, FULL), pixels)
    real = known.photos.labelled.images
    if run.config.num_leaf_regions > 1:
        regions, found, on_real = run.config.num_leaf_regions, drawn.labels.numpy(), region_labels(run, real)
    else:
        training = labels.clusters(setup, run, seed, FULL)
        regions, found, on_real = labels.CLUSTERS, training.segment(pixels), training.segment(real)
    _, mapping = known.score(on_real, regions)
    agreement = score_classes(count_overlaps(found, reference, regions, known.count), mapping)["acc"]
    numbers = {DISTANCE.key: random_distance(setup, run, drawn.images), "consistency": agreement, "steps": run.step}
    return Found(numbers, {"images": pixels[:SHOWN], "classes": mapping[found[:SHOWN]]})


def fid_cell(setup: Setup, seed: int, run: SegdiffRun) -> Found:
    return Found({FID.key: fid(setup, run, draw(setup, run, seed).images), "steps": run.step})


def sheet(setup: Setup, cells: Cells) -> Sequence[str]:
    lines, names = [], []
    for name in (STEPS, COMPUTE, OURS):
        if found := cells.arrays(name):
            pairs = zip(found["images"], found["classes"], strict=True)
            lines += [list(found["images"]), [overlay_enlarged(image, classes) for image, classes in pairs]]
            names += [name, "  its masks"]
    return [setup.save(draw_image_grid(lines, None, names), "generated.png")] if lines else []


EXPERIMENT = Experiment(
    name="table2.5",
    title="pictures and masks drawn from noise",
    data="any of Flower, CUB, FFHQ, ImageNet, or a folder with images/ and masks/; without: drawn flowers",
    duration={
        "small": "12 minutes a seed on one CPU core",
        "gpu": "not measured",
        "full": "not measured (thesis: 50 000 to 500 000 steps on 8 to 32 V100)",
    },
    columns=(DISTANCE, FID, percent("consistency", "Acc of masks"), Column("steps", "steps", 1.0, 0)),
    rows=rows,
    citations=tuple(
        Citation(f"{row}, {name}", THESIS, {"fid": value})
        for row, values in CITED.items()
        for name, value in zip(SETS, values, strict=True)
    ),
    figures=("fig2.7", "fig2.8", "fig2.24", "fig2.25", "fig2.26"),
    seeds=1,
    notes=(
        NOTE,
        "Acc of masks: the share of pixels on which the masks of generated pictures agree with the supervised U-Net's; "
        "ours drawn with the picture, the plain DDPM's by DatasetDDPM afterwards. Both are mapped on real pictures.",
        "Equal compute: a plain DDPM trained for as many more steps as ours costs more multiply-adds a picture.",
    ),
    draw=sheet,
)
