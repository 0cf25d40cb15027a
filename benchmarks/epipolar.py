"""Measure the check of cameras by matched points on right and wrong cameras, without any training.

    python -m benchmarks.epipolar --data FOLDER [--sets "fern 504" "lego 200"]
    python -m benchmarks.epipolar

The first matches the views of each set that is not recorded yet in benchmarks/results/epipolar.json, and records the
share of matches near the epipolar lines for each camera fault and three seeds; FOLDER holds nerf_lego_200 and
llff_fern_504. The second prints the recorded table. The number of a set is the longer side of its images in pixels.
"block" is a rendered block on a floor whose texture repeats; "still" has a textured background that does not move, and
"arc" has 16 views of the block from so many degrees instead, of 256 pixels.
"turned" rotates each camera about its own centre, "orbit" about the centre of the scene, by so many degrees about a
random axis of each view; "one place" gives all views the pose of one of them, moved a little; the other faults are
those of benchmarks.alarms. Shares are recorded also where the check does not run, with the reason.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import roma
import torch
import torch.nn.functional as F

from benchmarks.alarm_inputs import damage
from benchmarks.recording import read_results, record_once
from factorkit.data.views.open import open_views
from factorkit.data.views.views import Views
from factorkit.nerfdiff.epipolar_check import MIN_EPIPOLAR_SHARE, judge_matches, match_views, measure_motion
from factorkit.nerfdiff.export.images import list_stored
from tests.nerfdiff.textured import make_intrinsics_of, orbit, render_photo

RESULTS = Path(__file__).with_name("results") / "epipolar.json"
SETS = (
    *("fern 504", "fern 200", "fern 128", "lego 200", "lego 128", "block 256", "block 128", "still 256"),
    *("arc 90", "arc 60", "arc 30"),
)
SEEDS = 3
RIGHT = ("true", "turned 0.5", "turned 1", "orbit 1", "orbit 2")
WRONG = (
    *("turned 2", "turned 5", "turned 13", "orbit 5", "orbit 13"),
    *("exchanged", "mirror", "half", "quarter", "random", "collapsed", "one place"),
    *("roll 13", "zoom 20", "uneven 20", "tilt 13"),
    *("focal 0.72", "focal 1.28", "focal 0.5", "backward"),
)


def make_views(name: str, data: Path) -> Views:
    """Return the views of a set with true cameras."""
    kind, _, side = name.partition(" ")
    if kind in ("fern", "lego"):
        folder, split = ("llff_fern_504", None) if kind == "fern" else ("nerf_lego_200", "train")
        return open_views(data / folder, split, int(side))
    size = (192, 256) if kind == "arc" else (int(side) * 3 // 4, int(side))
    degrees = np.linspace(0, float(side), 16) if kind == "arc" else np.arange(0, 360, 12.0)
    intrinsics, poses = make_intrinsics_of(size), orbit(degrees)
    photos = [render_photo(pose, intrinsics, size, still=kind == "still")[0] for pose in poses]
    pixels, names = torch.from_numpy(np.stack(photos)), [f"{i:02d}.png" for i in range(len(poses))]
    common = torch.from_numpy(intrinsics).float().repeat(len(poses), 1, 1)
    return Views(pixels.permute(0, 3, 1, 2).float() / 255, names, common, poses=torch.from_numpy(poses).float())


def change_cameras(views: Views, fault: str, seed: int, data: Path) -> Views:
    """Return views with one fault of their cameras."""
    kind, _, number = fault.partition(" ")
    if kind not in ("turned", "orbit", "one"):
        return damage(views, fault.replace("true", ""), seed, data)
    generator, poses = torch.Generator().manual_seed(seed), views.poses.double()
    axes = F.normalize(torch.randn(len(poses), 3, dtype=torch.float64, generator=generator), dim=1)
    if kind == "one":
        moved = poses[len(poses) // 2].repeat(len(poses), 1, 1)
        moved[:, :3, 3] += 0.01 * axes
        return replace(views, poses=moved)
    rotation = torch.eye(4, dtype=torch.float64).repeat(len(poses), 1, 1)
    rotation[:, :3, :3] = roma.rotvec_to_rotmat(axes * np.radians(float(number)))
    moved = rotation @ poses
    if kind == "turned":
        moved[:, :3, 3] = poses[:, :3, 3]
    return replace(views, poses=moved)


def score_set(name: str, data: Path) -> dict[str, Any]:
    """Match the views of a set once, and return the share of each fault and seed."""
    views, start = make_views(name, data), time.process_time()
    matches = match_views(list_stored(views))
    result: dict[str, Any] = {"cpu_seconds": time.process_time() - start, "pairs": len(matches.pairs), "shares": {}}
    result |= {"motion": measure_motion(matches.pairs, matches.intrinsics), "reason": matches.not_run}

    def score(fault: str, seed: int) -> float | None:
        changed = change_cameras(views, fault, seed, data)
        ratio = (changed.intrinsics[0] / views.intrinsics[0]).nan_to_num(1.0).double()
        cameras = {row: k * ratio for row, k in matches.intrinsics.items()}
        return judge_matches(matches._replace(intrinsics=cameras, not_run=""), changed.poses, views.names).check.value

    for fault in (*RIGHT, *WRONG):
        if views.layout == "forward" and fault.startswith("orbit"):
            continue  # their origin is among the cameras
        result["shares"][fault] = [score(fault, seed) for seed in range(SEEDS)]
    return result


def format_cell(shares: list[float] | None) -> str:
    """Return the least and the greatest share, bold where all are named."""
    if shares is None:
        return "-"
    text = " to ".join(sorted({f"{min(shares):.2f}", f"{max(shares):.2f}"}))
    return f"**{text}**" if max(shares) < MIN_EPIPOLAR_SHARE else text


def format_table(results: dict[str, dict[str, Any]]) -> str:
    """Return a line for each fault."""
    names = [name for name in SETS if name in results]
    lines = [f"| cameras | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for fault in (*RIGHT, *WRONG):
        lines.append(f"| {fault} | {' | '.join(format_cell(results[name]['shares'].get(fault)) for name in names)} |")
    lines.append(f"| check | {' | '.join('not run' if results[name]['reason'] else 'runs' for name in names)} |")
    lines.append(f"| motion, degrees | {' | '.join(format(results[name]['motion'], '.1f') for name in names)} |")
    lines.append(f"| pairs of views | {' | '.join(str(results[name]['pairs']) for name in names)} |")
    lines.append(f"| CPU seconds | {' | '.join(format(results[name]['cpu_seconds'], '.1f') for name in names)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the sets that are not recorded, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data sets; without it nothing is measured")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.sets if arguments.data else ():
        record_once(RESULTS, name, partial(score_set, name, arguments.data))
    print(format_table(read_results(RESULTS)))


if __name__ == "__main__":
    main()
