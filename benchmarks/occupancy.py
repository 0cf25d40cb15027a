"""What leaving out empty space saves a field's training: one thread, the procedural scene, true poses.

python -m benchmarks.occupancy grid hashgrid mlp
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from factorkit.data.procedural.scene import make_procedural_views
from factorkit.nerfdiff.stages.pipeline import Training
from factorkit.nerfdiff.train import train_nerfdiff

#: what a short training of each field takes on a CPU
SETTINGS = {
    "grid": {},
    "hashgrid": {"field_learning_rate": 0.01, "tv_weight": 0.0, "views_per_step": 4, "field_steps": 200},
    "mlp": {
        "field_learning_rate": 5e-4,
        "tv_weight": 0.0,
        "views_per_step": 4,
        "rays_per_view": 64,
        "field_steps": 200,
    },
    "siren": {
        "field_learning_rate": 2e-4,
        "tv_weight": 0.0,
        "views_per_step": 4,
        "rays_per_view": 64,
        "field_steps": 200,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fields", nargs="+", choices=SETTINGS)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--samples", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    training, held_out = make_procedural_views(80, args.size), make_procedural_views(12, args.size, seed=1)
    for field in args.fields:
        for occupancy in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                settings = {"field": field, "samples_per_ray": args.samples, "occupancy": occupancy, **SETTINGS[field]}
                print(measured(training, held_out, Path(folder), settings), flush=True)


def measured(training, held_out, folder: Path, settings: dict) -> str:
    """A line: milliseconds of the processor a step, and the held-out PSNR."""
    taken, plain = {}, Training.train_stage

    def timed(self, name, *rest, **more):
        start = time.process_time()
        result = plain(self, name, *rest, **more)
        taken[name] = time.process_time() - start
        return result

    Training.train_stage = timed
    try:
        run = train_nerfdiff(
            training,
            out=folder,
            preset="fast",
            resolution=max(training.size),
            poses="known",
            steps=1,
            num_rendered_views=0,
            progress=False,
            **settings,
        )
    finally:
        Training.train_stage = plain
    grid, steps = run.model.field.occupancy, run.config.field_steps
    share = "" if grid is None else f", {float(grid.share_occupied()):.0%} of the box left"
    score = run.evaluate(held_out)["psnr"]
    words = f"{settings['field']:<9} occupancy={grid is not None!s:<5}"
    return f"{words} {1e3 * taken['fit'] / steps:7.1f} ms a step, {score:.2f} dB after {steps}{share}"


if __name__ == "__main__":
    main()
