"""Training views beside renders at the size of their files, for the report of a finished run."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factorkit.data.views.cameras import undistort
from factorkit.data.views.views import Views, resize_area, target_size
from factorkit.nerfdiff.export.images import ExportView
from factorkit.nerfdiff.export.originals import find_originals
from factorkit.nerfdiff.rays import render_views
from factorkit.nerfdiff.run import NerfdiffRun
from factorkit.nerfdiff.verdict import write_report
from factorkit.report.image_grid import draw_image_grid
from factorkit.utils.errors import ConfigError, DataError
from factorkit.utils.files import save_image
from factorkit.utils.images import images_to_pixels

NUM_VIEWS = 3
MAX_SIDE = 512  # pixels of the longer side: larger images make a report of many megabytes
MAX_SECONDS = 4.0  # of processor time for all renders; slow fields are drawn smaller
TRIAL_SIDE = 64  # pixels of the longer side of the render that is timed


@torch.no_grad()
def save_own_size_views(run: NerfdiffRun, folder: Path, data: Any) -> str:
    """Save some training views beside renders at the size of their files, once, for the report; say at what size.

    Args:
        run: finished.
        folder: of the run.
        data: of the training.

    Returns:
        A sentence for the user; "" if the files are not larger than the views of the training, or not found again.
    """
    previews = folder / "samples"
    if any(previews.glob(f"{run.step:06d}_views_at_*.png")):
        return ""
    rows = torch.linspace(0, len(run.poses) - 1, min(NUM_VIEWS, len(run.poses))).round().long().tolist()
    try:
        originals = find_originals(folder, data if isinstance(data, Views) else None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # exports say it again
            views = [] if originals is None else originals.list_images(*run.camera_changes, rows)
    except (ConfigError, DataError):
        return ""
    trained = max(run.model.size)
    if not views or max(views[0].size) <= trained:
        return ""
    _render(run, views[0], rows[0], TRIAL_SIDE // 4)  # the first call of an operation takes longer
    start = time.process_time()
    _render(run, views[0], rows[0], TRIAL_SIDE)
    seconds = max(time.process_time() - start, 1e-6)
    affordable = int(TRIAL_SIDE * (MAX_SECONDS / len(views) / seconds) ** 0.5)
    side = min(MAX_SIDE, affordable, max(views[0].size))
    if side <= trained:
        return f"The report shows views at {trained} pixels only: larger renders take over {MAX_SECONDS:g} seconds."
    pairs = [(_read(run, view, side), _render(run, view, row, side)) for view, row in zip(views, rows, strict=True)]
    height, width = target_size(side, *views[0].size)
    images, renders = zip(*pairs, strict=True)
    grid = draw_image_grid([images, renders], [view.name for view in views], ["image", "render"], cell=side)
    previews.mkdir(exist_ok=True)
    save_image(grid, previews / f"{run.step:06d}_views_at_{width}x{height}.png")
    write_report(folder)
    seconds = time.process_time() - start
    return (
        f"The report shows {len(views)} views at {width} x {height} pixels ({seconds:.1f} seconds of processor time)."
    )


def _read(run: NerfdiffRun, view: ExportView, side: int) -> np.ndarray:
    """Return the image of a view without its lens, before the run's background, as uint8 pixels."""
    values = torch.from_numpy(view.read_pixels()).movedim(-1, 0).float() / 255
    if len(values) == 4:
        values = values[3:] * values[:3] + (1 - values[3:]) * run.model.background.cpu()[:, None, None]
    if view.distortion is not None:
        values = undistort(values, view.intrinsics, view.distortion)[0]
    pixels: np.ndarray = images_to_pixels(resize_area(values, *target_size(side, *view.size))[None].clamp(0, 1))[0]
    return pixels


def _render(run: NerfdiffRun, view: ExportView, row: int, side: int) -> np.ndarray:
    """Return the render from the camera of a view, as uint8 pixels."""
    model, (height, width) = run.model, view.size
    relative = torch.from_numpy(view.intrinsics).float() / torch.tensor([width, height, 1.0])[:, None]
    device, size = model.views.device, target_size(side, height, width)
    rendered: Tensor = render_views(
        model.field,
        model.views[row : row + 1],
        model.camera,
        size,
        model.samples_per_ray,
        torch.tensor([row], device=device),
        relative[None].to(device),
    ).color
    pixels: np.ndarray = images_to_pixels(rendered.movedim(-1, 1).clamp(0, 1).cpu())[0]
    return pixels
