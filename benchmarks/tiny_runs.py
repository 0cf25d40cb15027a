"""Training runs of a second on noise, without sample grids, for benchmarks and tests of interrupted training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from factorkit.data.views.views import Views
from factorkit.nerfdiff.stages import dictionary as search
from factorkit.nerfdiff.stages import distil, joint, pipeline, stage_training
from factorkit.nerfdiff.stages import refine as fit
from factorkit.nerfdiff.train import train_nerfdiff
from factorkit.segdiff import train as segdiff
from factorkit.segdiff.autoencoder import train_autoencoder
from factorkit.segdiff.task import SegdiffTask
from factorkit.segdiff.train import train_segdiff

SEGDIFF = {
    "masks": "network",
    "model_channels": 8,
    "resolution": 16,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "norm_groups": 4,
    "batch_size": 8,
    "device": "cpu",
    "progress": False,
    "threads": 1,
}
NERFDIFF = {
    "preset": "demo",
    "resolution": 8,
    "num_candidates": 3,
    "num_azimuths": 6,
    "num_elevations": 2,
    "search_grid_resolution": 6,
    "grid_resolution": 8,
    "samples_per_ray": 4,
    "views_per_step": 4,
    "rays_per_view": 8,
    "search_steps": 22,
    "field_steps": 12,
    "steps": 12,
    "batch_size": 4,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "encoder_resolution": 8,
    "num_rendered_views": 5,
    "flip_rounds": 1,
    "device": "cpu",
    "progress": False,
    "threads": 1,
}
AUTOENCODER = {"model_channels": 8, "resolution": 16, "device": "cpu", "progress": False, "threads": 1}
HELD_OUT_STEPS = 4  # of the flip test


def disable_previews() -> None:
    """Turn off sample grids and reports of all training runs of this process; every second check has no alarm."""

    def inspect(task, model, step, folder):
        return {"failures": [] if step % 4 else ["tiny"], "error": 1 / (1 + step)}

    SegdiffTask.inspect = inspect
    segdiff.write_report = pipeline.write_report = stage_training.write_report = lambda folder: None
    stage_training.HELD_OUT_STEPS = HELD_OUT_STEPS
    for module in (distil, fit, joint, search):
        for preview in {"save_cameras", "save_model_previews"} & vars(module).keys():
            setattr(module, preview, lambda *arguments, **options: None)


def make_noise_images(folder: Path) -> Path:
    """Write a folder of 12 noise images, which need preparation."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 20, 20, 3), np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder


def noise_images() -> np.ndarray:
    """uint8 [12, 16, 16, 3], which need no preparation."""
    return np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8)


def noise_views() -> Views:
    """Return ten noise images; any cameras will do, as long as every run finds the same."""
    images = torch.from_numpy(np.random.default_rng(0).random((10, 3, 8, 8), np.float32))
    intrinsics = torch.tensor([[12.0, 0, 4], [0, 12, 4], [0, 0, 1]]).expand(10, 3, 3)
    return Views(images, [str(i) for i in range(10)], intrinsics)


def train(model: str, out: Path, data: Any = None, **changes: Any) -> None:
    """Train a tiny model of a kind, without sample grids."""
    disable_previews()
    if model == "segdiff":
        train_segdiff(noise_images() if data is None else data, out=out, **SEGDIFF | changes)
    elif model == "autoencoder":
        train_autoencoder(noise_images() if data is None else data, out=out, **AUTOENCODER | changes)
    else:
        train_nerfdiff(noise_views(), out=out, **NERFDIFF | changes)
