"""Turntables with structure from motion: a textured block with masks before a background that stands still.

    python -m benchmarks.sfm_captures --faults none all light exposure axis shift size roll pace clutter masks focal

The faults are those of benchmarks.captures. Photos and masks are files of 256 px, without EXIF; without the fault
"focal" the field of view is given. Each run is the whole training with search="sfm" at 32 px, but for its encoder.
Results are stored in benchmarks/results/sfm_captures.json, and not made again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.captures import FOV, expand_faults, make_cameras, spoil_masks
from benchmarks.recording import read_results, record_once
from factorkit.data.views.colmap import read_model
from factorkit.metrics.pose import pose_errors
from factorkit.nerfdiff.registered_views import MODEL_FOLDER, SFM_FOLDER
from factorkit.nerfdiff.stages.sfm import load_result
from factorkit.nerfdiff.train import train_nerfdiff
from factorkit.rendering import intrinsics_from_fov
from factorkit.utils.files import read_log, timeline
from tests.nerfdiff.textured import render_photo

RESULTS = Path(__file__).with_name("results") / "sfm_captures.json"
#: of the training: a grid without encoder
SETTINGS: dict[str, Any] = {"resolution": 32, "field": "grid", "field_steps": 300, "steps": 1, "num_rendered_views": 0}


def write_turntable(
    folder: Path, faults: Collection[str] = (), *, seed: int = 0, count: int = 60, side: int = 256
) -> Tensor:
    """Write photos of the block to ``photos`` and masks to ``masks`` of a folder, and return the true poses [V, 4, 4].

    Args:
        folder: of both.
        faults: names of :data:`benchmarks.captures.FAULTS`, but not flat, or WALKS; "all" is its ALL.
        seed: of the faults, of the first azimuth and of the elevation.
        count: number of photos.
        side: of the photos in pixels.
    """
    on, generator = expand_faults(faults), torch.Generator().manual_seed(seed)
    if "flat" in on:
        raise ValueError("flat: the object of these photos has one height")
    poses, light, gain = make_cameras(on, generator, count, seed)
    k = intrinsics_from_fov(FOV, side, side).double().numpy()
    lamps = light.numpy() if "light" in on else [None] * count
    photos = [
        render_photo(pose, k, (side, side), still=True, light=lamp)
        for pose, lamp in zip(poses.double().numpy(), lamps, strict=True)
    ]
    masks = spoil_masks(torch.stack([torch.from_numpy(mask)[None].float() for _, mask in photos]), on, generator)
    for name in ("photos", "masks"):
        (folder / name).mkdir(parents=True)
    for i, ((pixels, _), mask) in enumerate(zip(photos, masks, strict=True)):
        name = f"frame_{i:03d}.png"
        Image.fromarray((pixels * gain[i].numpy()).clip(0, 255).round().astype(np.uint8)).save(folder / "photos" / name)
        Image.fromarray((mask[0] * 255).byte().numpy()).save(folder / "masks" / name)
    return poses


def find_cameras(folder: Path, poses: Tensor, focal: bool, seed: int, **changes: Any) -> dict[str, Any]:
    """Train from the photos of a folder, and score the cameras before and after the refinement.

    Args:
        folder: of photos and masks.
        poses: true ones, [V, 4, 4].
        focal: whether the field of view is given.
        seed: of the training.
        **changes: to the settings.
    """
    start = time.process_time()
    run = train_nerfdiff(
        folder / "photos",
        masks=folder / "masks",
        out=folder / "run",
        fov=FOV if focal else None,
        search="sfm",
        seed=seed,
        device="cpu",
        progress=False,
        **SETTINGS | changes,
    )
    seconds = time.process_time() - start
    result = load_result(folder / "run" / SFM_FOLDER)
    assert result is not None
    names = [f"frame_{i:03d}.png" for i in range(len(poses))]
    cameras = read_model(folder / "run" / MODEL_FOLDER).cameras
    rows = [names.index(name) for name in run.views.names]
    found = torch.from_numpy(np.stack([cameras[name].pose for name in run.views.names])).float()
    before, after = pose_errors(found, poses[rows]), pose_errors(run.poses.cpu(), poses[rows])
    side = Image.open(folder / "photos" / names[0]).width
    k = cameras[run.views.names[0]].intrinsics(side, side)
    alarms = timeline(read_log(folder / "run"), "alarms")[-1]
    return {
        "registered": len(result.registered),
        "views": len(result.registered) + len(result.unregistered),
        "sfm_median_deg": before.rotation_median_deg,
        "sfm_largest_deg": float(before.rotation_degrees.max()),
        "median_deg": after.rotation_median_deg,
        "largest_deg": float(after.rotation_degrees.max()),
        "focal_ratio": float(k[0, 0] / intrinsics_from_fov(FOV, side, side)[0, 0]),
        "held_out_cross": alarms.get("held_out_cross"),
        "failures": alarms["failures"],
        "processor_seconds": round(seconds),
    }


def measure(name: str, seed: int) -> dict[str, Any]:
    """Find and score the cameras of photos with faults that are joined by +, or none."""
    faults = expand_faults(() if name == "none" else name.split("+"))
    with tempfile.TemporaryDirectory() as folder:
        poses = write_turntable(Path(folder), faults, seed=seed)
        return find_cameras(Path(folder), poses, "focal" not in faults, seed)


def format_table(results: dict[str, dict[str, Any]]) -> str:
    """Return a line for each run."""
    lines = [
        "| run | registered | degrees of structure from motion, median (largest) | refined | focal length / true | "
        "held-out error | alarms | s of CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, r in results.items():
        cross = "-" if r["held_out_cross"] is None else f"{r['held_out_cross']:.2f}"
        lines.append(
            f"| {key} | {r['registered']} of {r['views']} | {r['sfm_median_deg']:.2f} ({r['sfm_largest_deg']:.1f}) | "
            f"{r['median_deg']:.2f} ({r['largest_deg']:.1f}) | {r['focal_ratio']:.3f} | {cross} | "
            f"{len(r['failures'])} | {r['processor_seconds']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="*", default=[], help="names, several joined by +, none or all")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for seed in args.seeds:
        for name in args.faults:
            record_once(RESULTS, f"{name} seed={seed}", partial(measure, name, seed))
    print(format_table(read_results(RESULTS)))


if __name__ == "__main__":
    main()
