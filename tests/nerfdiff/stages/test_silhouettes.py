"""The masks of the views in the loss of the refinement."""

from __future__ import annotations

import torch

from factorkit.data.procedural.scene import make_procedural_views
from factorkit.nerfdiff.cameras.poses import FreePoses
from factorkit.nerfdiff.config import preset_config
from factorkit.nerfdiff.fields.kinds import GridField
from factorkit.nerfdiff.scene import open_scene
from factorkit.nerfdiff.stages.refine import MASK_TOLERANCE, FitTask, SceneFit, robust_error
from factorkit.utils.rng import BatchDraw

CPU = torch.device("cpu")


def test_robust_error_large_differences_pull_less_than_small_ones():
    opacity = torch.tensor([[0.3, 1.0]], requires_grad=True)
    robust_error(opacity.square(), MASK_TOLERANCE).sum().backward()
    assert 0 < float(opacity.grad[0, 1]) < float(opacity.grad[0, 0])
    assert robust_error(torch.tensor([[0.0, 1.0]]), MASK_TOLERANCE, torch.tensor([[1.0, 0.0]])).tolist() == [0.0]


def test_fit_task_with_silhouettes_counts_colours_robustly_and_adds_the_blurred_masks():
    views = make_procedural_views(4, 8, seed=1)
    scene = open_scene(views, 8, CPU)
    config = preset_config("fast", resolution=8, views_per_step=4, rays_per_view=64)
    model = SceneFit(GridField(8), FreePoses(scene.poses), scene.camera, scene.size, 8)

    def objective(weight: float, coarseness: float):
        task = FitTask(config, scene, model, initial_coarseness=coarseness, mask_weight=weight)
        draw = BatchDraw(0, 0, 4, slice(0, 4), CPU)
        task.prepare(0)
        return task, task.loss(model, torch.arange(4), draw, torch.tensor(0))

    for coarseness in (0.0, 1.0):
        _, plain = objective(0.0, coarseness)
        task, added = objective(0.5, coarseness)
        assert torch.equal(added.loss, plain.loss)
        masks = task.target_masks
        assert torch.equal(masks, scene.masks) == (coarseness == 0.0) and masks.shape == (4, 1, 8, 8)
        task.mask_weight, regularisation = 0.0, plain.objective - plain.loss
        draw = BatchDraw(0, 0, 4, slice(0, 4), CPU)
        robust = task.loss(model, torch.arange(4), draw, torch.tensor(0)).objective
        assert (robust < added.objective).all() and (robust - regularisation < plain.loss).all()
