"""Figures 2.14 and 2.29 to 2.31: frames of a video and their regions, without any training on videos."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from factorkit.data.video import open_video
from factorkit.report.image_grid import draw_image_grid
from factorkit.reproduce.experiment import Column, Experiment, Found, Row, percent
from factorkit.reproduce.generation import real_pictures
from factorkit.reproduce.photos import train
from factorkit.reproduce.setup import Setup
from factorkit.segdiff.inference.video import segment_frames
from factorkit.segdiff.previews import overlay_enlarged
from factorkit.utils.errors import DataError
from factorkit.utils.images import images_to_pixels

FULL = "imagenet64"
FRAMES, SHOWN = 60, 6
NOISE = 5.0  # of the drawn clip's sensor, of 255


def rows(setup: Setup) -> list[Row]:
    return [
        Row("frame by frame", lambda s, seed: cell(s, seed, 0.0)),
        Row("averaged over time", lambda s, seed: cell(s, seed, 0.8)),
    ]


def cell(setup: Setup, seed: int, smooth: float) -> Found:
    run = train(setup, "ours", seed, FULL)
    path = setup.inputs.get("video")
    frames = panning(setup, run.config.resolution) if path is None else open_video(path).frames
    predict = run.predictor(None, "fast")
    options = {"size": run.config.resolution, "upsample": "guided", "smooth": smooth}
    changed, shown, last, count = 0.0, [], None, 0
    for frame, labels in segment_frames(frames, run.config, predict, **options):
        changed += 0.0 if last is None else float((labels != last).mean())
        if count % (FRAMES // SHOWN) == 0 and len(shown) < SHOWN:
            shown.append((frame, overlay_enlarged(frame, labels)))
        last, count = labels, count + 1
    if not count:
        raise DataError(f"{path}: a clip without frames")
    sheet = draw_image_grid([[f for f, _ in shown], [o for _, o in shown]], None, ["frame", "regions"])
    name = f"frames-{'averaged' if smooth else 'single'}-seed{seed}.png"
    return Found({"changes": changed / max(1, count - 1), "frames": float(count)}, pictures=[setup.save(sheet, name)])


def panning(setup: Setup, resolution: int) -> Iterator[np.ndarray]:
    """A camera that stands still for half of the time, then pans over a training picture, under a sensor's noise."""
    config = train(setup, "ours", 0, FULL).config
    (picture,) = images_to_pixels(real_pictures(setup, config, 1))
    wide = np.pad(picture, ((0, 0), (resolution // 2, resolution // 2), (0, 0)), mode="reflect")
    noise = np.random.default_rng(0)
    for n in range(FRAMES):
        left = resolution // 2 if n < FRAMES // 2 else resolution * (FRAMES - n) // FRAMES
        frame = wide[:, left : left + resolution] + NOISE * noise.standard_normal(picture.shape)
        yield frame.round().clip(0, 255).astype(np.uint8)


EXPERIMENT = Experiment(
    name="fig2.14",
    title="frames of a video and their regions",
    data="any images to train on; with --video a video or folder of frames, else a pan over a training image",
    duration={"small": "that of table2.1, whose training it shares", "gpu": "not measured", "full": "not measured"},
    columns=(percent("changes", "pixels that change region, %"), Column("frames", "frames", 1, 0)),
    rows=rows,
    figures=("fig2.29", "fig2.30", "fig2.31"),
    seeds=1,
    inputs=("video",),
    notes=("Changes are motion and flicker together. The dissertation shows pictures alone, of DAVIS-2017.",),
)
