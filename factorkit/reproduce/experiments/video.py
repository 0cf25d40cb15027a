"""Figures 2.14 and 2.29 to 2.31: frames of a video and their regions, without any training on videos."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from factorkit.data.video import open_video
from factorkit.report.image_grid import draw_image_grid, overlay_enlarged
from factorkit.reproduce.experiment import CellResult, Column, Experiment, Row, Setup, percent
from factorkit.reproduce.segdiff_runs import Trainings
from factorkit.segdiff.inference.video import segment_frames
from factorkit.utils.errors import DataError

PAN_FRAMES = 60  # of the procedural video
GRID_FRAMES = 6
SENSOR_NOISE = 5.0  # standard deviation in the procedural video, of 255


def _rows(setup: Setup) -> list[Row]:
    trainings = Trainings(setup, "imagenet64")
    smoothing = {"frame by frame": 0.0, "averaged over time": 0.8}
    return [Row(name, partial(_segment, trainings, smooth)) for name, smooth in smoothing.items()]


def _segment(trainings: Trainings, smooth: float, seed: int) -> CellResult:
    run = trainings.train("ours", seed)
    path, size = trainings.setup.inputs.get("video"), run.config.resolution
    frames = _pan(trainings, size) if path is None else open_video(path).frames
    predict = run.predictor(None, "fast")
    changes, count, previous = 0.0, 0, None
    grid: list[tuple[np.ndarray, np.ndarray]] = []
    for frame, labels in segment_frames(frames, run.config, predict, size=size, upsample="guided", smooth=smooth):
        changes += 0.0 if previous is None else float((labels != previous).mean())
        if count % (PAN_FRAMES // GRID_FRAMES) == 0 and len(grid) < GRID_FRAMES:
            grid.append((frame, overlay_enlarged(frame, labels)))
        previous, count = labels, count + 1
    if not count:
        raise DataError(f"{path}: a video without frames")
    image = draw_image_grid([[f for f, _ in grid], [o for _, o in grid]], None, ["frame", "regions"])
    name = f"frames-{'averaged' if smooth else 'single'}-seed{seed}.png"
    scores = {"changes": changes / max(1, count - 1), "frames": float(count)}
    return CellResult(scores, images=[trainings.setup.save_image(image, name)])


def _pan(trainings: Trainings, size: int) -> Iterator[np.ndarray]:
    """Make a video with sensor noise: a static camera in the first half, a pan over a training image in the second."""
    (image,) = trainings.training_pixels(trainings.train("ours", 0).config, 1)
    wide = np.pad(image, ((0, 0), (size // 2, size // 2), (0, 0)), mode="reflect")
    rng = np.random.default_rng(0)
    for n in range(PAN_FRAMES):
        left = size // 2 if n < PAN_FRAMES // 2 else size * (PAN_FRAMES - n) // PAN_FRAMES
        frame = wide[:, left : left + size] + SENSOR_NOISE * rng.standard_normal(image.shape)
        yield frame.round().clip(0, 255).astype(np.uint8)


EXPERIMENTS = (
    Experiment(
        name="fig2.14",
        title="frames of a video and their regions",
        data="any images to train on; with --video a video or folder of frames, else a pan over a training image",
        duration={"small": "that of table2.1, whose training it shares", "gpu": "not measured", "full": "not measured"},
        columns=(percent("changes", "pixels that change region, %"), Column("frames", "frames", 1, 0)),
        rows=_rows,
        figures=("fig2.29", "fig2.30", "fig2.31"),
        seeds=1,
        inputs=("video",),
        notes=("Changes are motion and flicker together. The dissertation shows images alone, of DAVIS-2017.",),
    ),
)
