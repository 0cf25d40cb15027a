"""Phone photos around an object in a room: cameras and held-out images, with given poses and without.

    python -m benchmarks.room --seeds 0 1 2 --size 128 --ways known sfm
    python -m benchmarks.room --seeds 0 --size 64 --exposure 0.08 --noise 0.01 --set appearance_dim=4

Each run is a training without the encoder on 49 photos of benchmarks/room_photos.py; 7 others are held out, with true
poses and unchanged exposure. Results are stored in benchmarks/results/room.json, and not made again; without --seeds
the table of all is printed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.recording import read_results, record_once
from benchmarks.room_photos import make_photos
from factorkit.data.views.views import Views
from factorkit.metrics.image import psnr
from factorkit.nerfdiff.train import train_nerfdiff
from factorkit.utils.files import read_log, timeline

RESULTS = Path(__file__).with_name("results") / "room.json"
WAYS = {"known": {"poses": "known"}, "sfm": {"search": "sfm"}}
NO_ENCODER = {"steps": 1, "num_rendered_views": 0}


def train_and_score(training: Views, held_out: Views, **settings: Any) -> dict[str, Any]:
    """Train on photos, and score cameras and images."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        run = train_nerfdiff(training, out=Path(folder) / "run", progress=False, device="cpu", **NO_ENCODER, **settings)
        seconds = time.process_time() - start
        scores, images = run.evaluate(held_out), run.views.resize(run.model.size).images
        alarms = timeline(read_log(Path(folder) / "run"), "alarms")[-1]
        return {
            "psnr": scores["psnr"],
            "psnr_training": psnr(run.render(run.poses, run.model.size).images, images).mean().item(),
            "rotation_median_deg": scores["rotation_median_deg"],
            "rotation_max_deg": scores["rotation_max_deg"],
            "registered": len(run.poses),
            "photos": len(training),
            "held_out_cross": alarms.get("held_out_cross"),
            "failures": alarms.get("failures", []),
            "field": run.config.field,
            "unbounded": run.config.unbounded,
            "processor_seconds": round(seconds),
        }


def measure(seed: int, light: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Train on the photos of a room, and score."""
    return train_and_score(*make_photos(seed, **light), **settings)


def format_table(results: dict[str, dict[str, Any]]) -> str:
    """Return a line for each run."""
    lines = [
        "| run | field | held out, dB | training, dB | degrees, median (largest) | registered | held-out error "
        "| alarms | s of CPU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, r in sorted(results.items()):
        cross = "-" if r["held_out_cross"] is None else f"{r['held_out_cross']:.2f}"
        lines.append(
            f"| {key} | {r['field']} | {r['psnr']:.2f} | {r['psnr_training']:.2f} | {r['rotation_median_deg']:.2f} "
            f"({r['rotation_max_deg']:.2f}) | {r['registered']} of {r['photos']} | {cross} | {len(r['failures'])} | "
            f"{r['processor_seconds']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="of the rooms; the training has seed 0")
    parser.add_argument("--size", type=int, default=128, help="pixels of the longer side")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=["known"])
    parser.add_argument("--exposure", type=float, default=0.0, help="brightness changes by up to this share")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation of the noise")
    parser.add_argument("--tiles", action="store_true", help="all things share a few textures that repeat")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="other settings, VALUE in JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    changes = {k: json.loads(v) for k, v in (entry.split("=", 1) for entry in args.set)}
    light = {name: getattr(args, name) for name in ("exposure", "noise", "tiles") if getattr(args, name)}
    for seed in args.seeds:
        for way in args.ways:
            words = [f"{args.size} px", way, *(f"{k}={v}" for k, v in (light | changes).items()), f"seed={seed}"]
            settings = {"resolution": args.size, **WAYS[way], **changes}
            record_once(RESULTS, " ".join(words), partial(measure, seed, light, **settings))
    print(format_table(read_results(RESULTS)))


if __name__ == "__main__":
    main()
