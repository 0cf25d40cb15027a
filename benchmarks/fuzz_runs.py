"""Two runs trained for seconds, for inputs that lie in a run folder or need a model beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from factorkit.data.procedural.flowers import draw_flowers
from factorkit.data.procedural.scene import make_procedural_views
from factorkit.nerfdiff.train import train_nerfdiff
from factorkit.segdiff.train import train_segdiff

SEGDIFF = {
    "preset": "demo",
    "regions": 2,
    "resolution": 16,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "norm_groups": 4,
    "mixture_steps": 2,
    "distil_steps": 2,
    "steps": 2,
    "batch_size": 4,
    "checkpoint_every": 1,
    "sample_every": 1,
    "log_every": 1,
    "num_fit_images": 2,
    "device": "cpu",
    "progress": False,
}
NERFDIFF = {
    "preset": "demo",
    "resolution": 8,
    "num_candidates": 3,
    "num_azimuths": 6,
    "num_elevations": 2,
    "search_grid_resolution": 6,
    "grid_resolution": 8,
    "samples_per_ray": 6,
    "views_per_step": 3,
    "rays_per_view": 8,
    "search_steps": 4,
    "field_steps": 2,
    "steps": 2,
    "batch_size": 4,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "encoder_resolution": 8,
    "num_rendered_views": 4,
    "flip_rounds": 0,
    "log_every": 2,
    "device": "cpu",
    "progress": False,
}


def good_runs(folder: Path) -> dict[str, Path]:
    """The folders of a segdiff and a nerfdiff run; beside the former its weights alone, as segdiff.safetensors."""
    images, masks = draw_flowers(12, 16, 0)
    for kind, values in (("images", images), ("masks", masks.astype(np.uint8))):
        (folder / "data" / kind).mkdir(parents=True)
        for i, value in enumerate(values):
            Image.fromarray(value).save(folder / "data" / kind / f"{i:02d}.png")
    segdiff = train_segdiff(folder / "data", out=folder / "segdiff", holdout=6, **SEGDIFF)
    segdiff.save(folder / "segdiff.safetensors")
    train_nerfdiff(make_procedural_views(8, 8, seed=1), out=folder / "nerfdiff", **NERFDIFF)
    return {"segdiff": folder / "segdiff", "nerfdiff": folder / "nerfdiff"}
