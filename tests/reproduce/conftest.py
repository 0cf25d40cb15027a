"""Tiny settings and data to run every experiment from end to end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.data import draw_flowers
from factorkit.metrics.baselines import BASELINES, all_foreground
from factorkit.nerfdiff.stages import stage_training
from factorkit.reproduce import reproduce
from factorkit.reproduce.experiments import generated_images, image_figures, scenes

SEGDIFF = {
    "resolution": 16,
    "regions": 2,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "norm_groups": 4,
    "mixture_steps": 1,
    "distil_steps": 1,
    "steps": 2,
    "batch_size": 4,
    "log_every": 2,
    "sample_every": 0,
    "num_fit_images": 4,
    "threads": 1,
}
NERFDIFF = {
    "resolution": 12,
    "num_azimuths": 6,
    "num_elevations": 2,
    "search_grid_resolution": 6,
    "grid_resolution": 6,
    "samples_per_ray": 4,
    "views_per_step": 3,
    "rays_per_view": 8,
    "search_steps": 11,
    "field_steps": 2,
    "steps": 2,
    "batch_size": 4,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "encoder_resolution": 8,
    "num_rendered_views": 4,
    "flip_rounds": 1,
    "log_every": 2,
    "sample_every": 2,
    "threads": 1,
}


@pytest.fixture(autouse=True)
def quick(tmp_path_factory, monkeypatch):
    """Use few images, views and steps and a separate cache; skip GrabCut and the refinement of test poses."""
    torch.set_num_threads(1)
    monkeypatch.setitem(BASELINES, "grabcut", all_foreground)
    monkeypatch.setitem(generated_images.GENERATED, "small", (12, 2))
    monkeypatch.setattr(image_figures, "STEPS", 3)
    monkeypatch.setattr(stage_training, "HELD_OUT_STEPS", 6)
    monkeypatch.setattr(scenes, "NUM_PROCEDURAL_VIEWS", 14)
    monkeypatch.setattr(scenes, "HELD_OUT_VIEWS", 6)
    monkeypatch.setattr("factorkit.nerfdiff.evaluate.register_scene", lambda model, start, true, images: start)
    monkeypatch.setenv("FACTORKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> str:
    """24 drawn flowers, 12 of them with masks of the values 0, 128 and 255."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    images, masks = draw_flowers(24, 20, seed=1)
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        Image.fromarray(image).save(folder / "images" / f"{i:02d}.png")
        if i % 2:
            values = np.where(mask > 0, 255, 0).astype(np.uint8)
            values[:2] = 128
            Image.fromarray(values).save(folder / "masks" / f"{i:02d}.png")
    return str(folder)


@pytest.fixture
def small(photos, tmp_path):
    """small(name, **options): an experiment of chapter 2 on the drawn flowers, in one folder."""

    def run(name, **options):
        settings = {"seeds": 1, "out": tmp_path, "ignore": 128, "progress": False, **SEGDIFF, **options}
        return reproduce(name, photos, **settings)

    return run


@pytest.fixture
def scene(tmp_path):
    """scene(name, **options): an experiment of chapter 3 on the procedural scene."""

    def run(name, **options):
        return reproduce(name, None, **{"seeds": 1, "out": tmp_path, "progress": False, **NERFDIFF, **options})

    return run
