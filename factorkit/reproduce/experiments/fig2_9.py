"""Figure 2.9: what each mask and each branch holds of real pictures."""

from __future__ import annotations

from factorkit.reproduce.experiment import Experiment, Found, Row
from factorkit.reproduce.generation import as_pixels, real_pictures
from factorkit.reproduce.photos import train
from factorkit.reproduce.setup import Setup
from factorkit.segdiff.edit_sheets import branches_sheet

FULL = "ffhq64"
SHOWN = 6


def cell(setup: Setup, seed: int) -> Found:
    run = train(setup, "ours", seed, FULL)
    apart = run.branches(as_pixels(real_pictures(setup, run.config, SHOWN)))
    parts = as_pixels(apart.branches.flatten(0, 1)).reshape(*apart.branches.shape[:2], *apart.images.shape[2:], 3)
    sheet = branches_sheet(as_pixels(apart.noisy), as_pixels(apart.images), apart.masks.numpy(), parts)
    return Found(pictures=[setup.save(sheet, f"branches-seed{seed}.png")])


EXPERIMENT = Experiment(
    name="fig2.9",
    title="the regions' masks and branches on real pictures",
    data="faces: FFHQ, or any pictures; without: drawn flowers",
    duration={"small": "3 minutes a seed on one CPU core, none after table2.1", "gpu": "not measured",
              "full": "not measured"},
    columns=(),
    rows=lambda setup: [Row("ours", cell)],
    seeds=1,
)  # fmt: skip
