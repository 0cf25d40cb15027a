"""Stand-ins for real captures: a turntable of the procedural scene, with faults of real captures switched on.

    python -m benchmarks.captures --faults none light exposure axis shift size roll pace clutter masks focal all
    python -m benchmarks.captures --faults half half+all two-turns three-quarters spiral
    python -m benchmarks.captures --faults close+flat close+flat+shift+pace --views 119
    python -m benchmarks.captures --faults all --seeds 0 1 2 --set 'ordered="no"'

Each run is the search for the cameras at 32 px with the preset "fast", without the encoder. Results are stored in
benchmarks/results/captures.json, and not made again; without --faults the table of all is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from benchmarks.recording import read_results, record_once
from factorkit.data.procedural.scene import STEP, make_scene_field
from factorkit.data.procedural.scene import _make_occupancy as make_occupancy
from factorkit.data.views.views import Views, resize_area
from factorkit.metrics.pose import is_mirrored, pose_errors
from factorkit.nerfdiff.config import preset_config
from factorkit.nerfdiff.scene import open_scene
from factorkit.nerfdiff.stages.pipeline import Training
from factorkit.nerfdiff.stages.pose_search import DictionarySearch
from factorkit.nerfdiff.train import choose_capture_settings
from factorkit.rendering import OccupancySampling, image_rays, intrinsics_from_fov, look_at, render
from factorkit.utils.files import read_log

RESULTS = Path(__file__).with_name("results") / "captures.json"
RADIUS, FOV, VIEWS = 4.0, 35.0, 60
HEIGHT_OF_FLAT = 0.35
RENDERED_SIDE = 64  # pixels, before the masks are made wrong
FAULTS = {
    "light": "the lights stay with the camera while the object turns",
    "exposure": "brightness and white balance change from view to view (15% and 5%)",
    "axis": "the object stands beside the turntable's axis, by 15% of its size",
    "shift": "the camera does not look at the axis: up to 12% of the image in each direction, another in each view",
    "size": "the distance of the camera changes by up to 20%",
    "roll": "the camera turns about its axis by up to 6 degrees",
    "pace": "steps between views vary from 0.3 to 1.7 of their mean, elevations by 8 degrees",
    "clutter": "the masks are 3% of the image too wide and show a cluttered background",
    "masks": "in 5% of the views the mask lacks half of the object",
    "focal": "the given focal length is 25% too short",
    "stops": "the turntable goes three times as fast in parts of the turn, and stops twice for 5 views; not in all",
    "close": "elevations vary from -7 to 57 degrees, distances by 30%; most views cut the object; not in all",
    "flat": "the object has 35% of its height; not in all",
}
ALL = tuple(name for name in FAULTS if name not in ("stops", "close", "flat"))
#: other than one whole turn at one elevation: what it is, turns, what is added to the elevation at a share of the views
WALKS: dict[str, tuple[str, float, Callable[[Tensor], Tensor]]] = {
    "half": ("half of a turn", 0.5, lambda share: 0 * share),
    "three-quarters": ("three quarters of a turn", 0.75, lambda share: 0 * share),
    "two-turns": ("two turns, the second one 20 degrees higher", 2.0, lambda share: 20.0 * (share > 0.5) - 5),
    "spiral": ("one and a half turns that rise by 30 degrees", 1.5, lambda share: 30 * share - 10),
}


class Cameras(NamedTuple):
    """Cameras of a capture, and what changes with them.

    Attributes:
        poses: [V, 4, 4].
        light: direction to the light [V, 3].
        gain: of the colours, [V, 3].
    """

    poses: Tensor
    light: Tensor
    gain: Tensor


def expand_faults(faults: Collection[str]) -> set[str]:
    """Return the names of faults and walks, those of "all" in its place."""
    if unknown := set(faults) - {*FAULTS, *WALKS, "all"}:
        raise ValueError(f"faults {sorted(unknown)}: choose from {', '.join([*FAULTS, *WALKS])}, all")
    return {*faults, *ALL} if "all" in faults else set(faults)


def make_cameras(on: Collection[str], generator: torch.Generator, count: int, seed: int) -> Cameras:
    """Return the cameras of a turntable, in order; see :func:`make_capture`."""

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator) - 1

    def where(fault: str, values: Tensor) -> Tensor:
        return values if fault in on else torch.zeros_like(values)

    pace = 1 + where("pace", 0.7 * uniform(count))
    if "stops" in on:
        pace = pace * _uneven_pace(count, seed)
    walk = [WALKS[name] for name in WALKS if name in on]
    _, turns, rise = walk[0] if walk else ("one turn", 1.0, torch.zeros_like)
    share = pace.cumsum(0) / pace.sum()
    azimuth = (turns * share + torch.rand(1, generator=generator)) * 2 * math.pi
    elevation = 25 + 10 * uniform(1) + rise(share) + where("pace", 8 * (azimuth + uniform(1) * math.pi).sin())
    elevation = elevation.deg2rad()
    distance = RADIUS * (1 + where("size", 0.2 * uniform(count)))
    if "close" in on:
        elevation = torch.deg2rad(25 + 32 * _vary(count, seed))
        distance = distance * (0.67 + 0.2 * _vary(count, seed + 1))
    direction = torch.stack([elevation.cos() * azimuth.cos(), elevation.cos() * azimuth.sin(), elevation.sin()], 1)
    turn = uniform(1) * math.pi
    axis = where("axis", 0.25 * torch.stack([turn.cos(), turn.sin(), 0 * turn], 1)).expand(count, 3)
    up = torch.tensor([0.0, 0.0, 1.0])
    poses = look_at(axis + distance[:, None] * direction, axis, up)
    field_of_view = math.tan(math.radians(FOV / 2))
    right, down = (where("shift", 0.24 * field_of_view * uniform(2, count))).unbind()
    roll = where("roll", math.radians(6) * uniform(count))
    poses[:, :3, :3] = poses[:, :3, :3] @ _rotations(down, right, roll)
    light = torch.tensor([0.37, 0.23, 0.9]).expand(count, 3)
    if "light" in on:  # as the camera would see it from azimuth 0
        c, s = azimuth.cos(), azimuth.sin()
        light = torch.stack([0.8 * c - 0.4 * s, 0.8 * s + 0.4 * c, torch.full_like(c, 0.6)], 1)
    gain = (where("exposure", 0.15 * uniform(count, 1)) + where("exposure", 0.05 * uniform(count, 3))).exp()
    return Cameras(poses, light, gain)


def spoil_masks(masks: Tensor, on: Collection[str], generator: torch.Generator) -> Tensor:
    """Return masks [V, 1, S, S] with the faults of masks."""
    count, side = len(masks), masks.shape[-1]
    if "clutter" in on:
        reach = round(0.03 * side)
        masks = torch.nn.functional.max_pool2d(masks, 2 * reach + 1, stride=1, padding=reach)
    if "masks" in on:
        masks = masks.clone()
        for i in torch.randperm(count, generator=generator)[: math.ceil(0.05 * count)].tolist():
            left = int((masks[i, 0].sum(0).cumsum(0) < masks[i].sum() / 2).sum())
            masks[i, :, :, :left] = 0
    return masks


def make_capture(faults: Collection[str] = (), *, seed: int = 0, count: int = VIEWS, size: int = 32) -> Views:
    """Return views of the procedural scene on a turntable, in order, with masks and true poses.

    Args:
        faults: names of :data:`FAULTS`, and at most one of :data:`WALKS`; "all" is :data:`ALL`.
        seed: of the faults, of the first azimuth and of the elevation (15 to 35 degrees).
        count: number of views.
        size: side of the images in pixels.
    """
    on, generator = expand_faults(faults), torch.Generator().manual_seed(seed)
    poses, light, gain = make_cameras(on, generator, count, seed)
    intrinsics = intrinsics_from_fov(FOV, RENDERED_SIDE, RENDERED_SIDE)
    height = HEIGHT_OF_FLAT if "flat" in on else 1.0
    rendered = [_render(pose, intrinsics, own, height) for pose, own in zip(poses, light, strict=True)]
    color, opacity = (torch.stack(parts) for parts in zip(*rendered, strict=True))
    background = torch.zeros(1, 3, RENDERED_SIDE, RENDERED_SIDE)
    if "clutter" in on:
        background = interpolate(torch.rand(1, 3, 8, 8, generator=generator), RENDERED_SIDE, mode="bicubic").clamp(0, 1)
    masks = spoil_masks(opacity, on, generator)
    images = ((color + (1 - opacity) * background) * gain[:, :, None, None]).clamp(0, 1)
    images = images * masks + (1 - masks)
    stored = intrinsics.clone()
    stored[[0, 1], [0, 1]] *= 0.75 if "focal" in on else 1.0
    return Views(
        images=resize_area(images, size, size).clamp(0, 1),
        masks=resize_area(masks, size, size).clamp(0, 1),
        poses=poses,
        intrinsics=(stored * torch.tensor([size / RENDERED_SIDE, size / RENDERED_SIDE, 1.0])[:, None]).repeat(
            count, 1, 1
        ),
        names=[f"frame_{i:03d}.png" for i in range(count)],
        background=torch.ones(3),
        has_focal="focal" not in on,
    )


def _uneven_pace(count: int, seed: int) -> Tensor:
    """Return the relative pace [count] of a turntable that is slow, fast, slow and fast, and stops while it is slow."""
    pace = torch.ones(count)
    first, quarter = seed * 7 % count, count // 4  # the first view of a slow part, and the views of a part
    for start in (first, first + 2 * quarter):
        pace[torch.arange(start + quarter, start + 2 * quarter) % count] = 3.0
        pace[torch.arange(start + quarter // 3, start + quarter // 3 + count // 12) % count] = 0.0
    return pace


def _vary(count: int, seed: int) -> Tensor:
    """Return numbers [count] from -1 to 1 that vary slowly, as height and distance of a camera in a hand do."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.arange(count) / count
    waves = [torch.sin(2 * math.pi * (k * share + torch.rand(1, generator=generator))) for k in (1, 2, 3)]
    total = torch.stack(waves).sum(0)
    low, high = total.aminmax()
    return 2 * (total - low) / (high - low) - 1


def _rotations(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    import roma

    tilt, turn = torch.stack([x, y, 0 * z], 1), torch.stack([0 * z, 0 * z, z], 1)
    return roma.rotvec_to_rotmat(tilt) @ roma.rotvec_to_rotmat(turn)


@torch.no_grad()
def _render(pose: Tensor, intrinsics: Tensor, light: Tensor, height: float) -> tuple[Tensor, Tensor]:
    """Return colour on black [3, H, W] and opacity [1, H, W] of the scene with a share of its height."""
    rays = image_rays(pose, intrinsics, RENDERED_SIDE, RENDERED_SIDE)
    scale = torch.tensor([1.0, 1.0, height])
    rays = rays._replace(origins=rays.origins / scale, directions=normalize(rays.directions / scale, dim=-1))
    sampling = OccupancySampling(make_occupancy(False), step=STEP)
    result = render(make_scene_field(light_direction=light), rays, sampling, background=torch.zeros(3), chunk=1 << 16)
    return result.color.permute(2, 0, 1).clamp(0, 1), result.opacity[None].clamp(0, 1)


def find_cameras(views: Views, seed: int, **changes: Any) -> dict[str, Any]:
    """Find the cameras of views and score them."""
    config = preset_config("fast", search="dictionary", device="cpu", seed=seed, **changes)
    scene = open_scene(views, config.resolution, torch.device("cpu"), False)
    config, start = choose_capture_settings(config, scene), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        training = Training(config, scene, Path(folder), {"scene": {}}, progress=False)
        fitted, duplication = DictionarySearch(training).run()
        seconds, poses = time.process_time() - start, fitted.poses().detach()
        starts = [event["held_out_cross"] for event in read_log(Path(folder)) if event.get("event") == "starts"]
        held_out = training.cross_fit("cross", poses, training.scene)  # with the focal length of the fit
    errors = pose_errors(poses, views.poses)
    return {
        "rotation_median_deg": errors.rotation_median_deg,
        "under_10_deg": errors.under_10_deg,
        "mirrored": is_mirrored(poses, views.poses),
        "held_out_cross": held_out.cross,
        "held_out_nearest": held_out.nearest,
        "starts": starts[0] if starts else {},
        "doubled": duplication,
        "optimize_camera": list(config.optimize_camera or ()),
        "ordered": config.ordered,
        "processor_seconds": round(seconds),
    }


def measure(name: str, seed: int, count: int = VIEWS, **changes: Any) -> dict[str, Any]:
    """Find and score the cameras of a capture with faults that are joined by +, or none."""
    faults = () if name == "none" else name.split("+")
    return find_cameras(make_capture(faults, seed=seed, count=count), seed, **changes)


def format_table(results: dict[str, dict[str, Any]]) -> str:
    """Return a line for each run."""
    lines = [
        "| run | degrees, median | under 10 | held-out error | over nearest | s of CPU |",
        "|---|---|---|---|---|---|",
    ]
    for key, r in results.items():
        held_out = [f"{r[k]:.2f}" if k in r else "-" for k in ("held_out_cross", "held_out_nearest")]
        lines.append(
            f"| {key} | {r['rotation_median_deg']:.1f} | {r['under_10_deg']:.0%} | {' | '.join(held_out)} | "
            f"{r['processor_seconds']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="*", default=[], help="names, several joined by +, none or all")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--views", type=int, default=VIEWS)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="other settings, VALUE in JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    changes = {k: json.loads(v) for k, v in (entry.split("=", 1) for entry in args.set)}
    for seed in args.seeds:
        for name in args.faults:
            views = [f"views={args.views}"] if args.views != VIEWS else []
            key = " ".join([name, *views, *(f"{k}={v}" for k, v in changes.items()), f"seed={seed}"])
            record_once(RESULTS, key, partial(measure, name, seed, args.views, **changes))
    print(format_table(read_results(RESULTS)))


if __name__ == "__main__":
    main()
