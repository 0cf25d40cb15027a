"""Count true and false alarms over tiny runs of both models that are right or wrong by construction.

    python -m benchmarks.alarms --seeds 5

Right segdiff runs: the demo preset at 200 steps on flowers. Wrong ones: the same images with textures but without
objects, and runs of 2 steps. Right nerfdiff runs: true poses of the procedural scene. Wrong ones: exchanged poses, and
forward-facing noise. With ``--seeds 5`` there are 5 runs of each kind. Results go to benchmarks/results/alarms.json.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

import factorkit
from benchmarks.recording import commit, machine, read_results, write_result
from factorkit.data.procedural.scene import make_procedural_views
from factorkit.data.views.views import Views
from factorkit.report.content import judged_alarms, read_checks
from factorkit.utils.files import read_log

RESULTS = Path(__file__).with_name("results") / "alarms.json"
SEGDIFF = {"preset": "demo", "threads": 1, "progress": False, "sample_every": 0}
NERFDIFF = {
    "preset": "fast",
    "poses": "known",
    "resolution": 24,
    "field_steps": 60,
    "steps": 2,
    "num_rendered_views": 0,
    "sample_every": 0,
    "threads": 1,
    "progress": False,
}


def train_flowers(seed: int, folder: Path, steps: int) -> None:
    factorkit.train_segdiff(out=folder, seed=seed, steps=steps, **SEGDIFF)


def train_noise_images(seed: int, folder: Path) -> None:
    shape, generator = (64, 32, 32, 3), torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).numpy()
    factorkit.train_segdiff(noise, out=folder, seed=seed, steps=60, **SEGDIFF)


def train_object(seed: int, folder: Path, exchanged: bool) -> None:
    views = make_procedural_views(40, 24, seed=seed)
    if exchanged:
        order = torch.randperm(len(views), generator=torch.Generator().manual_seed(seed))
        views = replace(views, poses=views.poses[order])
    factorkit.train_nerfdiff(views, out=folder, seed=seed, **NERFDIFF)


def train_forward_noise(seed: int, folder: Path) -> None:
    generator = torch.Generator().manual_seed(seed)
    source = make_procedural_views(16, 24, seed=seed)
    poses = torch.eye(4).repeat(16, 1, 1)
    poses[:, :2, 3] = torch.rand(16, 2, generator=generator) - 0.5
    images = torch.rand(16, 3, 24, 24, generator=generator)
    views = Views(images, source.names, source.intrinsics, poses=poses, near=1.2, far=9.0, layout="forward")
    factorkit.train_nerfdiff(views, out=folder, seed=seed, **NERFDIFF)


KINDS: dict[str, tuple[bool, Callable[[int, Path], None]]] = {
    "segdiff flowers, 200 steps": (True, lambda seed, folder: train_flowers(seed, folder, 200)),
    "segdiff flowers, 2 steps": (False, lambda seed, folder: train_flowers(seed, folder, 2)),
    "segdiff noise": (False, train_noise_images),
    "nerfdiff object": (True, lambda seed, folder: train_object(seed, folder, False)),
    "nerfdiff object, exchanged poses": (False, lambda seed, folder: train_object(seed, folder, True)),
    "nerfdiff forward-facing noise": (False, train_forward_noise),
}


def run_kind(name: str, seeds: int) -> Iterator[dict]:
    """Yield the checks and failures of each seed."""
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            KINDS[name][1](seed, Path(folder) / "run")
            log = read_log(Path(folder) / "run")
            yield {"seed": seed, "failures": judged_alarms(log)[1], "checks": read_checks(log)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=0, help="runs of each kind; 0 prints the recorded table")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.kinds if args.seeds else ():
        rows = list(run_kind(name, args.seeds))
        write_result(RESULTS, name, {"right": KINDS[name][0], "rows": rows, "machine": machine(1), "commit": commit()})
    print("| runs | right | alarms | meaning |\n|---|---|---|---|")
    for name, record in read_results(RESULTS).items():
        alarms, right = sum(bool(row["failures"]) for row in record["rows"]), record["right"]
        meaning = "false alarms" if right else "true alarms"
        print(f"| {name} | {'yes' if right else 'no'} | {alarms} of {len(record['rows'])} | {meaning} |")


if __name__ == "__main__":
    main()
