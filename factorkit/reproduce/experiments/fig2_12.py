"""Figure 2.12: the way between two real pictures."""

from __future__ import annotations

from factorkit.reproduce.experiment import Found
from factorkit.reproduce.generation import FACES, faces_experiment, real_pictures
from factorkit.reproduce.photos import train
from factorkit.reproduce.setup import Setup
from factorkit.segdiff.editing.grids import interpolation_sheet
from factorkit.utils.images import images_to_pixels

PAIRS, FRAMES, STEPS = 3, 9, 50


def cell(setup: Setup, seed: int) -> Found:
    run = train(setup, "ours", seed, FACES)
    real = images_to_pixels(real_pictures(setup, run.config, 2 * PAIRS))
    pairs = len(real) // 2
    way = run.interpolate(real[:pairs], real[pairs : 2 * pairs], frames=FRAMES, steps=STEPS, seed=seed)
    frames = images_to_pixels(way.images.flatten(0, 1)).reshape(pairs, FRAMES, *real.shape[1:])
    sheet = interpolation_sheet(real[:pairs], real[pairs : 2 * pairs], frames, way.labels.numpy(), way.shares.tolist())
    return Found(pictures=[setup.save(sheet, f"interpolation-seed{seed}.png")])


TITLE = "interpolation between real pictures, mixed at a quarter of the noise levels"
EXPERIMENT = faces_experiment("fig2.12", TITLE, cell)
