"""Score the masks of masks="segdiff", and its checks without labels, on views before backgrounds that we composite.

    python -m benchmarks.object_masks --data FOLDER [--sets "lego, flowers"]
    python -m benchmarks.object_masks

The first makes and scores the masks of each set that is not recorded yet in benchmarks/results/object_masks.json, at 64
px and in one thread; FOLDER holds nerf_lego_200, flowers17_128 and llff_fern_504. The second prints the recorded table.
Backgrounds are white, one photo of fern behind all views ("still"), another photo of a flower behind each view
("flowers"), another cut of photos of fern ("cuts"), or another smooth field of colours ("soft"). "captures" are the
turntable of benchmarks.captures with changing lights, exposure, framing, distance and pace; "block" has a textured
background that does not move. The hull is measured at the true cameras.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.captures import make_capture
from benchmarks.recording import read_results, record_once
from factorkit import object_masks
from factorkit.data.procedural.scene import make_procedural_views
from factorkit.data.views.open import open_views
from factorkit.data.views.views import Views
from factorkit.nerfdiff.hull import HULL_CHECK, hull_check
from factorkit.nerfdiff.scene import open_scene
from factorkit.utils.errors import DataError
from tests.nerfdiff.textured import make_intrinsics_of, orbit, render_photo

RESULTS = Path(__file__).with_name("results") / "object_masks.json"
SIDE, HULL_SIDE = 64, 32
CAPTURE_FAULTS = ("light", "exposure", "axis", "shift", "size", "roll", "pace")
BACKGROUNDS = ("white", "still", "soft", "flowers", "cuts")
SETS = (
    *(f"{scene}, {background}" for scene in ("lego", "procedural", "captures") for background in BACKGROUNDS),
    "block, still",
    "flowers alone",
    "fern",
)


def read_crop(path: Path, box: tuple[int, ...] | None = None) -> Tensor:
    """Return a square part of an image, or the whole one, float [3, SIDE, SIDE] in [0, 1]."""
    image = Image.open(path).convert("RGB")
    small = (image if box is None else image.crop(box)).resize((SIDE, SIDE), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255


def read_flowers(count: int, data: Path, seed: int = 0) -> Tensor:
    """Return photos of different flowers [count, 3, SIDE, SIDE]."""
    paths = sorted((data / "flowers17_128/images").glob("*.jpg"))
    rows = np.random.default_rng(seed).choice(len(paths), count, replace=False)
    return torch.stack([read_crop(paths[i]) for i in rows])


def make_backgrounds(kind: str, count: int, data: Path) -> Tensor:
    """Return backgrounds [count or 1, 3, SIDE, SIDE]."""
    ferns = sorted((data / "llff_fern_504/images_8").iterdir())
    if kind == "white":
        return torch.ones(1, 3, SIDE, SIDE)
    if kind == "still":
        return read_crop(ferns[0], (60, 20, 360, 320))[None]
    if kind == "soft":
        generator = torch.Generator().manual_seed(3)
        colors = torch.rand(count, 3, 3, 3, generator=generator)
        return F.interpolate(colors, (SIDE, SIDE), mode="bicubic", align_corners=True).clamp(0, 1)
    if kind == "flowers":
        return read_flowers(count, data)
    rng, cuts = np.random.default_rng(0), []
    for i in range(count):
        width, height = Image.open(ferns[i % len(ferns)]).size
        side = rng.integers(150, 300)
        left, top = rng.integers(0, width - side), rng.integers(0, height - side)
        cuts.append(read_crop(ferns[i % len(ferns)], (left, top, left + side, top + side)))
    return torch.stack(cuts)


def make_views(name: str, data: Path) -> tuple[Views, Tensor | None]:
    """Return the views of a set without masks, and the true masks bool [V, SIDE, SIDE]; None: there is no object."""
    scene, _, background = name.partition(", ")
    if scene == "fern":
        return open_views(data / "llff_fern_504", None, SIDE), None
    if scene == "flowers alone":
        images, intrinsics = read_flowers(60, data, seed=2), torch.tensor(make_intrinsics_of((SIDE, SIDE))).float()
        return Views(images, [str(i) for i in range(60)], intrinsics.repeat(60, 1, 1)), None
    if scene == "block":
        intrinsics, poses = make_intrinsics_of((SIDE, SIDE)), orbit(np.arange(0, 360, 6.0))
        photos = [render_photo(pose, intrinsics, (SIDE, SIDE), still=True) for pose in poses]
        pixels, masks = (torch.from_numpy(np.stack(parts)) for parts in zip(*photos, strict=True))
        names, common = [f"{i:03d}" for i in range(60)], torch.tensor(intrinsics).float().repeat(60, 1, 1)
        return Views(pixels.permute(0, 3, 1, 2).float() / 255, names, common, poses=torch.tensor(poses).float()), masks
    if scene == "lego":
        views = open_views(data / "nerf_lego_200", "train", SIDE)
    elif scene == "procedural":
        views = make_procedural_views(60, SIDE, seed=1)
    else:
        views = make_capture(CAPTURE_FAULTS, size=SIDE)
    assert views.masks is not None
    behind = 0.0 if views.background is None else views.background.view(1, 3, 1, 1)
    clear = 1 - views.masks
    changed = views.images - clear * behind + clear * make_backgrounds(background, len(views), data)
    return replace(views, images=changed.clamp(0, 1), masks=None, background=None), views.masks[:, 0] > 0.5


def score_set(name: str, data: Path, folder: Path) -> dict[str, Any]:
    """Make the masks of a set, and return their IoU, the checks and the failures."""
    views, true = make_views(name, data)
    cut, _ = object_masks.add_object_masks(views, folder, {}, progress=False)
    result = object_masks.judge_masks(folder)
    if true is not None:
        masks = cut.masks[:, 0] > 0.5
        ious = (masks & true).sum((1, 2)) / (masks | true).sum((1, 2)).clamp_min(1)
        result |= {"iou": float(ious.mean()), "worst_iou": float(ious.min())}
        scene = open_scene(cut, HULL_SIDE, torch.device("cpu"))
        hull = hull_check(scene.foreground, scene.poses)
        result["checks"] = [*result["checks"], hull.to_dict()]
        result["failures"] = [*result["failures"], *hull.failures]
    return result


def measure(name: str, data: Path, out: Path | None) -> dict[str, Any]:
    """Make and score the masks of a set; keep the run in a folder, if there is one."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            return score_set(name, data, (out or Path(temporary)) / name.replace(", ", "-").replace(" ", ""))
        except DataError as error:
            return {"checks": [], "failures": [f"refused: {error}"]}


def format_table(results: dict[str, dict[str, Any]]) -> str:
    """Return a line for each set."""
    names = ("colours that masks share with their background", "views whose mask reaches the border", HULL_CHECK)
    lines = [f"| views, background | IoU, mean (worst) | {' | '.join(names)} | alarms |", "|---|---|---|---|---|---|"]
    for key, result in results.items():
        values = {check["name"]: check.get("value") for check in result["checks"]}
        shown = ["-" if values.get(name) is None else f"{values[name]:.2f}" for name in names]
        iou = f"{result['iou']:.2f} ({result['worst_iou']:.2f})" if "iou" in result else "no object"
        alarms = "; ".join(failure.partition(":")[0] for failure in result["failures"]) or "none"
        lines.append(f"| {key} | {iou} | {' | '.join(shown)} | {alarms} |")
    return "\n".join(lines)


def main() -> None:
    """Make the masks of the sets that are not recorded, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data sets; without it nothing is made")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--out", type=Path, help="keep the runs in this folder")
    arguments = parser.parse_args()
    object_masks.SETTINGS |= {"threads": 1}
    torch.set_num_threads(1)
    for name in arguments.sets if arguments.data else ():
        record_once(RESULTS, name, partial(measure, name, arguments.data, arguments.out))
    print(format_table(read_results(RESULTS)))


if __name__ == "__main__":
    main()
