"""Gaussians are fitted coarse to fine: at first the images that they draw are small."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import factorkit
from factorkit.data.procedural.scene import make_procedural_views
from factorkit.data.views.views import resize_area
from factorkit.engine.trainer import Trainer
from factorkit.nerfdiff.cameras.poses import FreePoses
from factorkit.nerfdiff.config import preset_config
from factorkit.nerfdiff.fields.gaussians import GaussianField
from factorkit.nerfdiff.scene import open_scene
from factorkit.nerfdiff.stages import refine
from factorkit.nerfdiff.stages.pipeline import Training
from factorkit.nerfdiff.stages.refine import FitTask, SceneFit, drawn_size

SIZE = 12


@pytest.fixture
def coarse(monkeypatch) -> None:
    """Images of 12 pixels are drawn with 3 pixels a side, then 6, then 12."""
    monkeypatch.setattr(refine, "MIN_COARSE_SIDE", SIZE)


def make_task(steps: int = 8, **scene_changes) -> FitTask:
    scene = open_scene(make_procedural_views(6, SIZE, seed=1), SIZE, torch.device("cpu"))
    scene = replace(scene, **scene_changes)
    config = preset_config(
        "fast", resolution=SIZE, field="gaussians", steps=steps, batch_size=1, threads=1, ema_decay=0
    )
    field = GaussianField(40, seed=0)
    field.side = SIZE
    return FitTask(config, scene, SceneFit(field, FreePoses(scene.poses), scene.camera, scene.size, 1))


class OneView:
    """A draw of a batch of one view."""

    rows = slice(0, 1)


@pytest.mark.parametrize(
    ("size", "step", "expected"),
    [
        ((300, 400), 0, (75, 100)),
        ((300, 400), 49, (75, 100)),
        ((300, 400), 50, (150, 200)),
        ((300, 400), 75, (300, 400)),
        ((383, 200), 0, (383, 200)),
        ((384, 200), 0, (96, 50)),
        ((400, 1), 0, (100, 1)),
    ],
)
def test_drawn_size_grows_with_the_steps(size, step, expected):
    assert drawn_size(size, step, 100) == expected


def test_fit_of_gaussians_first_steps_compare_small_images(coarse):
    masks = torch.rand(6, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    task = make_task(loss_masks=masks)
    task.prepare(0)
    assert task.model.size == (3, 3) and task.model.field.side == 3
    torch.testing.assert_close(task.target_images, resize_area(task.scene.images, 3, 3))
    torch.testing.assert_close(task.loss_masks, resize_area(masks, 3, 3))
    losses = [task.loss(task.model, torch.tensor([2]), OneView(), torch.tensor(0)).objective]
    small = replace(task.scene, images=task.target_images, loss_masks=task.loss_masks)
    model = SceneFit(task.model.field, task.model.poses, small.camera, (3, 3), 1)
    losses.append(
        FitTask(task.config, small, model).loss(model, torch.tensor([2]), OneView(), torch.tensor(0)).objective
    )
    torch.testing.assert_close(*losses)
    task.prepare(6)
    assert task.model.size == (SIZE, SIZE) and task.model.field.side == SIZE
    assert task.target_images is task.scene.images and task.loss_masks is masks


def test_fit_of_gaussians_resumed_among_small_images_is_the_same(coarse, tmp_path):
    def train(folder, stop_at=None):
        task = make_task()
        Trainer(
            task, task.config, tmp_path / folder, {}, device=torch.device("cpu"), progress=False, stop_at=stop_at
        ).run()
        return task.model.state_dict()

    expected = train("once")
    train("twice", stop_at=5)
    resumed = train("twice")
    for name, value in expected.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.slow
def test_run_of_one_small_step_distils_at_the_size_of_the_views(coarse, tmp_path, capsys, monkeypatch):
    build_model, sides = Training.build_model, []

    def watched(training, field, *arguments):
        sides.append(field.side)
        return build_model(training, field, *arguments)

    monkeypatch.setattr(Training, "build_model", watched)
    settings = {"resolution": SIZE, "poses": "known", "field": "gaussians", "num_gaussians": 40, "gaussian_steps": 1}
    settings |= {"field_steps": 4, "steps": 1, "num_rendered_views": 2, "samples_per_ray": 8, "grid_resolution": 8}
    data = make_procedural_views(8, SIZE, seed=1)
    run = factorkit.train_nerfdiff(data, out=tmp_path / "run", preset="fast", threads=1, **settings)
    assert "Gaussians are drawn at 3 x 3 pixels first, at 12 x 12 from 75% of the steps on" in capsys.readouterr().err
    assert sides == [SIZE] and run.render(run.poses[:1]).images.shape[2:] == (SIZE, SIZE)
