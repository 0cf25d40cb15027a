"""Figure 2.9: what each mask and each branch holds of real pictures."""

from __future__ import annotations

from factorkit.reproduce.experiment import Found
from factorkit.reproduce.generation import FACES, faces_experiment, real_pictures
from factorkit.reproduce.photos import train
from factorkit.reproduce.setup import Setup
from factorkit.segdiff.editing.grids import branches_sheet
from factorkit.utils.images import images_to_pixels

SHOWN = 6


def cell(setup: Setup, seed: int) -> Found:
    run = train(setup, "ours", seed, FACES)
    apart = run.branches(images_to_pixels(real_pictures(setup, run.config, SHOWN)))
    parts = images_to_pixels(apart.branches.flatten(0, 1)).reshape(
        *apart.branches.shape[:2], *apart.images.shape[2:], 3
    )
    sheet = branches_sheet(images_to_pixels(apart.noisy), images_to_pixels(apart.images), apart.masks.numpy(), parts)
    return Found(pictures=[setup.save(sheet, f"branches-seed{seed}.png")])


EXPERIMENT = faces_experiment("fig2.9", "the regions' masks and branches on real pictures", cell)
