from __future__ import annotations

import pytest
import torch

from factorkit.data.procedural.scene import make_procedural_views
from factorkit.diffusion.schedule import Schedule
from factorkit.nerfdiff.build import build_model
from factorkit.nerfdiff.cameras.candidates import LookAtCandidates, OctantCandidates, SingleCandidate, build_candidates
from factorkit.nerfdiff.cameras.poses import fibonacci_band, rodrigues_poses
from factorkit.nerfdiff.config import preset_config
from factorkit.nerfdiff.fields.kinds import build_field
from factorkit.nerfdiff.network import predict_clean, to_radiance, to_signal
from factorkit.nerfdiff.rays import render_pixels
from factorkit.nerfdiff.scene import open_scene
from factorkit.nerfdiff.stages.dictionary import TEMPERATURE
from factorkit.nerfdiff.stages.joint import JointTask, add_noise
from factorkit.utils.errors import ConfigError
from factorkit.utils.rng import BatchDraw


def task_of(tiny, views, **changes) -> JointTask:
    settings = {k: v for k, v in tiny.items() if k != "progress"} | {"search": "joint"} | changes
    config = preset_config(settings.pop("preset"), **settings)
    scene = open_scene(views, config.resolution, torch.device("cpu"))
    torch.manual_seed(0)
    field = build_field(config.field, config.grid_resolution, 0)
    shape = {"size": list(scene.size), "layout": scene.layout, "distance": scene.distance}
    return JointTask(config, scene, build_model(config, shape, scene.camera, field, torch.eye(4).repeat(10, 1, 1)))


def draw() -> BatchDraw:
    return BatchDraw(0, 0, 4, slice(0, 4), torch.device("cpu"))


INDICES = torch.tensor([0, 3, 5, 9])


@pytest.mark.parametrize("balance", [True, False])
def test_joint_loss_trains_only_the_selected_candidate(tiny, scene_views, balance, monkeypatch):
    task = task_of(tiny, scene_views, balance_candidates=balance, tv_weight=0.0, classification_weight=0.5)
    selected = torch.tensor([2, 0, 0, 1])
    monkeypatch.setattr(task, "select_candidates", lambda *inputs: selected)
    raws = []
    plain = task.model.encoder.forward

    def forward(x_t, t):
        numbers, scores = plain(x_t, t)
        for x in (numbers, scores):
            x.retain_grad()
        raws.append((numbers, scores))
        return numbers, scores

    monkeypatch.setattr(task.model.encoder, "forward", forward)
    result = task.loss(task.model, INDICES, draw(), 1)
    result.objective.sum().backward()
    (numbers, scores) = raws[0]
    transformed = numbers.grad.abs().sum(2) > 0
    assert torch.equal(transformed, torch.nn.functional.one_hot(selected, 3).bool())
    target = scores.detach().softmax(1) - torch.nn.functional.one_hot(selected, 3)
    assert torch.allclose(scores.grad, 0.5 * target, atol=1e-6), "the classifier's target is the chosen candidate"
    assert task.model.field.values.grad.abs().sum() > 0


def test_select_candidates_without_balance_has_the_least_error(tiny, scene_views):
    task = task_of(tiny, scene_views, balance_candidates=False)
    with torch.no_grad():
        result = predict_clean(task.model, task.scene.images[INDICES])
        best = task.select_candidates(result.poses, task.scene.images[INDICES], None, torch.rand(4))
        pixels = torch.arange(64).expand(4, 64)
        errors = []
        for n in range(3):
            rendered = render_pixels(task.model.field, result.poses[:, n], task.scene.camera, pixels, (8, 8), 6).color
            errors.append((rendered - task.scene.images[INDICES].flatten(2).transpose(1, 2)).square().mean((1, 2)))
    assert torch.equal(best, torch.stack(errors, 1).argmin(1))


def test_select_candidates_with_balance_shares_equal_views(tiny, scene_views):
    task = task_of(tiny, scene_views, num_candidates=2)
    images = task.scene.images[:1].repeat(100, 1, 1, 1)
    poses = predict_clean(task.model, images).poses
    hot = task.select_candidates(poses, images, TEMPERATURE[1], torch.rand(100))
    cold = task.select_candidates(poses, images, None, torch.rand(100))
    assert 40 <= hot.sum() <= 60 and len(cold.unique()) == 1


def test_joint_gradients_match_finite_differences(tiny, scene_views):
    """encoder, candidates, rays, field and compositing, all in float64"""
    task = task_of(tiny, scene_views, num_candidates=2, optimize_camera=("roll", "aim", "distance"))
    model = task.model.double()
    camera_model = model.camera
    images = task.scene.images[:2].double()
    x_t, t = to_signal(images), torch.tensor([3, 40])
    pixels = torch.tensor([[27, 36, 10], [28, 19, 45]])

    def loss() -> torch.Tensor:
        result = model.predict_cameras(x_t, t)
        rendered = render_pixels(model.field, result.poses[[0, 1], [1, 0]], camera_model, pixels, (8, 8), 6).color
        return (rendered * torch.arange(1, 19).reshape(2, 3, 3)).sum()

    value = loss()
    for name, parameter in (
        ("numbers", model.encoder.numbers.weight),
        ("field", model.field.values),
        ("first", model.encoder.encoder.conv_in.weight),
    ):
        (slope,) = torch.autograd.grad(loss(), parameter)
        directions = torch.randn_like(parameter)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter.add_(sign * 1e-6 * directions)
                values.append(loss())
                parameter.sub_(sign * 1e-6 * directions)
        measured = (values[0] - values[1]) / 2e-6
        assert torch.allclose((slope * directions).sum(), measured, rtol=2e-4, atol=1e-7), name
        assert slope.abs().sum() > 0, name
    assert value.isfinite()


def test_joint_loss_memory_does_not_grow_with_candidates(scene_views, tiny):
    """Candidates are compared without gradient, in pieces: what a step keeps does not grow with their number."""
    views = make_procedural_views(12, 32, seed=0)

    def stored(cameras: int) -> int:
        changes = {"rays_per_view": 256, "samples_per_ray": 28, "resolution": 32, "encoder_resolution": 32}
        task, sizes = task_of(tiny, views, num_candidates=cameras, **changes), []

        def keep(x):
            sizes.append(x.numel() * x.element_size())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            task.loss(task.model, INDICES, draw(), 1)
        return sum(sizes)

    assert stored(12) <= 1.3 * stored(1)


def test_candidates_are_in_cells_of_their_own():
    octants = OctantCandidates(12, 2.0, upper_half=True)
    poses = octants(torch.randn(50, 12, 3) * 3)
    eye = poses[..., :3, 3]
    assert torch.allclose(eye.norm(dim=-1), torch.full((50, 12), 2.0), atol=1e-4)
    assert torch.equal(eye.sign(), octants.signs.expand(50, 12, 3)) and len(octants.signs.unique(dim=0)) == 4
    assert len(OctantCandidates(8, 2.0, upper_half=False).signs.unique(dim=0)) == 8
    anchors = fibonacci_band(6, (0.0, 60.0))
    near = LookAtCandidates(anchors, 3.0)
    assert torch.allclose(near(torch.zeros(1, 6, 3))[0, :, :3, 3], 3 * anchors, atol=1e-5)
    far = near(torch.tensor([0.0, 0, 9]).expand(1, 6, 3) + 0.01)[0, :, :3, 3]
    assert (far[:, 2] > 2.9).all(), "cells overlap: any candidate can reach any place"
    raw = torch.randn(4, 1, 6)
    assert torch.equal(SingleCandidate()(raw), rodrigues_poses(raw))


def test_build_candidates_reads_parameters_in_order():
    candidates = build_candidates("look_at", 3, 2.0, (0.0, 60.0), ("aim", "roll"))
    assert candidates.raw_size == 6
    raw = torch.zeros(1, 3, 6)
    raw[..., 3] = 0.1  # aim to the right
    transformed = candidates(raw)[0, :, :3, 3] - candidates(torch.zeros(1, 3, 6))[0, :, :3, 3]
    right = candidates(raw)[0, :, :3, 0]
    assert torch.allclose(transformed, 0.2 * right, atol=1e-5)
    with pytest.raises(ConfigError, match="optimize_camera"):
        build_candidates("thesis", 3, 2.0, (0.0, 60.0), ("roll",))
    with pytest.raises(ConfigError, match="owl"):
        build_candidates("owl", 3, 2.0, (0.0, 60.0), ())


def test_add_noise_levels_follow_the_timestep_power(tiny, scene_views):
    task = task_of(tiny, scene_views)
    x0 = to_signal(scene_views.images)
    assert torch.allclose(to_radiance(x0), scene_views.images, atol=1e-6) and x0.min() >= -1 and x0.max() <= 1
    many = BatchDraw(0, 0, 4000, slice(0, 4000), torch.device("cpu"))
    small = torch.zeros(4000, 3, 1, 1)
    _x_t, t = add_noise(small, Schedule(100), task.config, many)
    assert t.min() >= 0 and t.max() == 99 and abs(float((t < 50).float().mean()) - 0.5 ** (1 / 3.0)) < 0.03
    quiet = preset_config("demo", noise=False)
    same, zero = add_noise(x0, Schedule(100), quiet, draw())
    assert torch.equal(same, x0) and (zero == 0).all()
