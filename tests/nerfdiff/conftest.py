"""A tiny scene and a tiny run."""

from __future__ import annotations

import pytest
import torch

from factorkit.data.procedural.scene import make_procedural_views
from factorkit.nerfdiff.stages import stage_training
from factorkit.nerfdiff.train import train_nerfdiff

TINY = {
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
    "search_steps": 22,
    "field_steps": 4,
    "steps": 5,
    "batch_size": 4,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "encoder_resolution": 8,
    "num_rendered_views": 4,
    "flip_rounds": 1,
    "checkpoint_every": 2,
    "log_every": 2,
    "device": "cpu",
    "progress": False,
}
FLIP_TEST_STEPS = 6  # of 100: most steps of a tiny run


@pytest.fixture(scope="session")
def tiny() -> dict:
    """Settings of a training that takes a second."""
    return TINY


@pytest.fixture(scope="session")
def scene_views():
    """Ten views of the procedural scene, 8 pixels a side."""
    return make_procedural_views(10, 8, seed=1)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, scene_views):
    """A finished tiny run in a folder."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("nerfdiff") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_training, "HELD_OUT_STEPS", FLIP_TEST_STEPS)
        return train_nerfdiff(scene_views, out=folder, extra_ema_decays=(0.5,), **TINY)


@pytest.fixture(scope="module")
def short_flip_tests():
    """Fit the fields of flip tests and held-out checks for a few steps, where a test is not about their quality."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_training, "HELD_OUT_STEPS", FLIP_TEST_STEPS)
        yield


@pytest.fixture(scope="module")
def no_reports():
    """Write no reports, which takes as long as the steps of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_training, "write_report", lambda folder: None)
        yield
