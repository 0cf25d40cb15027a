from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from factorkit.diffusion.schedule import Schedule
from factorkit.nerfdiff.cameras.candidates import LookAtCandidates
from factorkit.nerfdiff.cameras.poses import direction_grid, direction_vectors, orbit_poses
from factorkit.nerfdiff.config import preset_config
from factorkit.nerfdiff.network import CameraPrediction
from factorkit.nerfdiff.scene import open_scene
from factorkit.nerfdiff.stages.distil import DistilTask, robust_error
from factorkit.nerfdiff.stages.pipeline import Training
from factorkit.nerfdiff.training_views import describe_scene
from factorkit.utils.rng import BatchDraw


def test_robust_error_pulls_at_small_errors_and_grows_with_the_root_of_large_ones():
    angles = torch.tensor([1e-4, 1e-3, 0.1, 0.2], requires_grad=True)  # radians; their squares are the errors
    loss = robust_error(angles.square())
    slopes = torch.autograd.grad(loss.sum(), angles)[0]
    assert torch.allclose(slopes[:2], 20 * angles[:2], rtol=1e-2), "ten times the slope of the squared error"
    assert 1.9 < loss[3] / loss[2] < 2.4 and slopes[3] < 1.1 * slopes[2]
    assert robust_error(torch.zeros(1)).item() == 0


def test_distil_loss_near_a_boundary_trains_both_candidates():
    candidates, task = LookAtCandidates(direction_grid(4, [30]), 2.0), DistilTask.__new__(DistilTask)
    azimuths, elevation = torch.tensor([0.0, 46.0]), torch.tensor([25.0, 25.0])  # beside an anchor, between two
    task.config, task.scene = preset_config("demo", noise=False), SimpleNamespace(distance=2.0)
    task.images, task.poses = torch.zeros(2, 3, 8, 8), orbit_poses(direction_vectors(azimuths, elevation), 2.0)
    task.schedule = Schedule(task.config.timesteps)
    raw, scores = torch.zeros(2, 4, 3, requires_grad=True), torch.zeros(2, 4, requires_grad=True)
    predicted = CameraPrediction(candidates(raw), scores, scores.argmax(1))
    task.model = SimpleNamespace(candidates=candidates, predict_cameras=lambda x_t, t: predicted)
    draw = BatchDraw(0, 0, 2, slice(0, 2), torch.device("cpu"))
    task.loss(task.model, torch.arange(2), draw, torch.tensor(0)).objective.sum().backward()
    slopes = raw.grad.norm(dim=2) / raw.grad.norm(dim=2).amax(1, keepdim=True)
    trained = torch.tensor([[True, False, False, False], [True, True, False, False]])
    assert (slopes[trained] > 0.5).all() and (slopes[~trained] < 0.01).all()
    assert scores.grad[0].argmin() == 0, "the classifier's target is the nearest candidate"


@pytest.mark.parametrize(
    ("changes", "expected"), [({}, (50, 0.1)), ({"warmup_steps": 7, "gradient_clip": 2.0}, (7, 2.0))]
)
def test_distil_stage_without_settings_warms_up_and_clips(tiny, scene_views, changes, expected):
    settings = {k: v for k, v in tiny.items() if k != "progress"} | {"poses": "known"} | changes
    config, stages = preset_config(settings.pop("preset"), **settings), {}

    class Recorder(Training):
        def train_stage(self, name, build_task, folder=None, **changes):
            stages[name] = self.config.stage(name, **changes)
            return build_task(stages[name]).model

    scene = open_scene(scene_views, config.resolution, torch.device("cpu"), True)
    Recorder(config, scene, Path(), {"scene": describe_scene(scene, scene_views, True)}, False).train_stages()
    assert (stages["distil"].warmup_steps, stages["distil"].gradient_clip) == expected
    assert (stages["fit"].warmup_steps, stages["fit"].gradient_clip) == (config.warmup_steps, config.gradient_clip)
