"""Figure 2.10: pictures and masks as they take shape from noise."""

from __future__ import annotations

import numpy as np

from factorkit.reproduce.experiment import Found
from factorkit.reproduce.generation import FACES, faces_experiment
from factorkit.reproduce.photos import train
from factorkit.reproduce.setup import Setup
from factorkit.segdiff.hierarchy import hard_labels
from factorkit.segdiff.previews import draw_trajectory_grid
from factorkit.utils.images import images_to_pixels

SHOWN, STEPS, COLUMNS = 4, 50, 10


def cell(setup: Setup, seed: int) -> Found:
    run = train(setup, "ours", seed, FACES)
    frames = run.generate(SHOWN, steps=min(STEPS, run.config.timesteps), seed=seed, trajectory=True).trajectory
    picked = [frames[i] for i in np.linspace(0, len(frames) - 1, min(COLUMNS, len(frames))).round().astype(int)]
    images = [images_to_pixels(f.images) for f in picked]
    labels = [hard_labels(f.masks, run.config.nesting).numpy() for f in picked]
    sheet = draw_trajectory_grid(images, labels, [f.t for f in picked])
    return Found(pictures=[setup.save(sheet, f"trajectory-seed{seed}.png")])


EXPERIMENT = faces_experiment("fig2.10", "refinement of pictures and masks along the diffusion", cell)
