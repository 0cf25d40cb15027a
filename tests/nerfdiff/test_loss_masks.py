"""Pixels that the views' loss masks leave out do not count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import factorkit
from factorkit.data import make_procedural_views
from factorkit.data.procedural.scene import make_scene_field
from factorkit.nerfdiff.cameras.poses import orbit_poses
from factorkit.nerfdiff.rays import CameraModel
from factorkit.nerfdiff.scene import mean_squared_error
from factorkit.nerfdiff.stages.dictionary import candidate_errors
from factorkit.rendering import intrinsics_from_fov


def test_mean_squared_error_leaves_out_pixels_of_no_weight():
    a, b = torch.rand(2, 5, 3), torch.rand(2, 5, 3)
    weights = torch.ones(2, 5, 1)
    weights[0, 2:] = 0
    errors = mean_squared_error(a, b, (1, 2), weights)
    torch.testing.assert_close(errors[0], (a[0, :2] - b[0, :2]).square().mean())
    torch.testing.assert_close(errors[1], mean_squared_error(a, b, (1, 2))[1])
    assert mean_squared_error(a, b, (1, 2), weights * 0).tolist() == [0, 0]


def test_candidate_errors_of_masked_pixels_are_left_out():
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.rand(4, 3, generator=generator), dim=1)
    poses = orbit_poses(directions, 4.0)
    camera = CameraModel(intrinsics_from_fov(40.0, 1, 1).reshape(3, 3), torch.zeros(3))
    field = make_scene_field()
    images = torch.rand(3, 3, 12, 12, generator=generator)
    masks = torch.ones(3, 1, 12, 12)
    plain = candidate_errors(field, poses, camera, images, 16)
    torch.testing.assert_close(candidate_errors(field, poses, camera, images, 16, loss_masks=masks), plain)
    masks[:, :, :6] = 0
    left_out = candidate_errors(field, poses, camera, images, 16, loss_masks=masks)
    changed = images.clone()
    changed[:, :, :6] = 1 - changed[:, :, :6]
    torch.testing.assert_close(candidate_errors(field, poses, camera, changed, 16, loss_masks=masks), left_out)
    assert (candidate_errors(field, poses, camera, changed, 16) - plain).abs().max() > 1e-3


@pytest.mark.slow
def test_training_with_loss_masks_ignores_occluders(tmp_path):
    clean = make_procedural_views(24, 20, seed=1)
    generator = torch.Generator().manual_seed(1)
    images, masks = clean.images.clone(), torch.ones(24, 1, 20, 20)
    for i in range(24):
        y, x = torch.randint(4, 11, (2,), generator=generator).tolist()
        images[i, :, y : y + 6, x : x + 6] = torch.rand(3, 6, 6, generator=generator)
        masks[i, :, y : y + 6, x : x + 6] = 0
    occluded = replace(clean, images=images, masks=None)
    settings = {"poses": "known", "resolution": 20, "grid_resolution": 20, "samples_per_ray": 20, "field_steps": 120}
    settings |= {"steps": 2, "num_rendered_views": 0, "batch_size": 8, "views_per_step": 8, "progress": False}
    error = {}
    for name, views in (("without", occluded), ("with", replace(occluded, loss_masks=masks))):
        run = factorkit.train_nerfdiff(views, out=tmp_path / name, preset="fast", **settings)
        error[name] = (run.render(run.poses).images - clean.images).square().mean().item()
    assert error["with"] < 0.6 * error["without"]
