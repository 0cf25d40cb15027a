"""Figure 2.12: the way between two real pictures."""

from __future__ import annotations

from factorkit.reproduce.experiment import Experiment, Found, Row
from factorkit.reproduce.generation import as_pixels, real_pictures
from factorkit.reproduce.photos import train
from factorkit.reproduce.setup import Setup
from factorkit.segdiff.edit_sheets import interpolation_sheet

FULL = "ffhq64"
PAIRS, FRAMES, STEPS = 3, 9, 50


def cell(setup: Setup, seed: int) -> Found:
    run = train(setup, "ours", seed, FULL)
    real = as_pixels(real_pictures(setup, run.config, 2 * PAIRS))
    pairs = len(real) // 2
    way = run.interpolate(real[:pairs], real[pairs : 2 * pairs], frames=FRAMES, steps=STEPS, seed=seed)
    frames = as_pixels(way.images.flatten(0, 1)).reshape(pairs, FRAMES, *real.shape[1:])
    sheet = interpolation_sheet(real[:pairs], real[pairs : 2 * pairs], frames, way.labels.numpy(), way.shares.tolist())
    return Found(pictures=[setup.save(sheet, f"interpolation-seed{seed}.png")])


EXPERIMENT = Experiment(
    name="fig2.12",
    title="interpolation between real pictures, mixed at a quarter of the noise levels",
    data="faces: FFHQ, or any pictures; without: drawn flowers",
    duration={"small": "3 minutes a seed on one CPU core, none after table2.1", "gpu": "not measured",
              "full": "not measured"},
    columns=(),
    rows=lambda setup: [Row("ours", cell)],
    seeds=1,
)  # fmt: skip
