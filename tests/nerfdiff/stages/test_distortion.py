"""One radial term of all lenses beyond that of structure from motion: its rays, its fit, and where it ends up."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.data.views.cameras import Distortion, FisheyeDistortion, refine_lens
from factorkit.data.views.open import open_views
from factorkit.data.views.views import Views
from factorkit.nerfdiff import search, unregistered
from factorkit.nerfdiff.config import preset_config
from factorkit.nerfdiff.rays import straighten_points
from factorkit.nerfdiff.scene import open_scene, straighten_views
from factorkit.nerfdiff.stages.distil import DistilTask
from factorkit.nerfdiff.stages.refine import FitTask
from factorkit.nerfdiff.stages.sfm import MODEL
from factorkit.nerfdiff.train import list_notes, train_nerfdiff
from factorkit.rendering import orbit
from factorkit.utils.errors import ConfigError
from tests.nerfdiff import registered, textured
from tests.nerfdiff.textured import make_intrinsics_of

SIZE = (96, 128)
WRONG, TRUE = 0.07, 0.04  # k1 of the model, and of the lens


def test_straighten_points_inverts_the_lens_and_its_gradient_is_that_of_finite_differences():
    k = torch.from_numpy(make_intrinsics_of(SIZE, 0.9))
    points = torch.rand(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 90
    for term in (0.03, -0.08):
        x, y = ((points - k[:2, 2]) / k.diagonal()[:2]).unbind(-1)
        seen = torch.stack(Distortion(term)(x, y), -1) * k.diagonal()[:2] + k[:2, 2]
        torch.testing.assert_close(straighten_points(seen, k, torch.tensor(term).double()), points)
    term = torch.tensor(0.03, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: straighten_points(points, k, t), term)


@pytest.mark.parametrize("focal", [1.0, 1.1])
@pytest.mark.parametrize("lens", [None, Distortion(0.1)])
def test_refine_lens_is_the_residual_before_the_lens_in_units_of_the_new_focal_length(lens, focal):
    x, y = torch.rand(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5
    both = Distortion(0.03)(x, y)
    expected = both if lens is None else lens(*both)
    found = refine_lens(lens, 0.03, focal)(x / focal, y / focal)
    torch.testing.assert_close(torch.stack(found) * focal, torch.stack(expected), atol=1e-6, rtol=0)


def test_refine_lens_without_a_term_keeps_other_lenses():
    x, y = torch.rand(2, 50, dtype=torch.float64) - 0.5
    brown = Distortion(0.1, -0.02, 0.01, 0.003, -0.002, 0.004, (0.01, 0.02, 0.03))
    found = refine_lens(brown, 0.0, 1.2)(x / 1.2, y / 1.2)
    torch.testing.assert_close(torch.stack(found) * 1.2, torch.stack(brown(x, y)))
    assert refine_lens(None, 0.0, 1.2) is None
    assert refine_lens(FisheyeDistortion(0.1), 0.0, 1.2) == FisheyeDistortion(0.1)


def find_cameras(images, folder, ordered, progress):
    """Write the true cameras of the photos but for the radial term, without the last two."""
    result = registered.find_cameras(images, folder, ordered, progress)
    cameras = folder / MODEL / "cameras.txt"
    number, _, width, height, *_ = cameras.read_text().split()
    focal = make_intrinsics_of(images[0].pixels.shape)[0, 0]
    cameras.write_text(f"{number} SIMPLE_RADIAL {width} {height} {focal} {int(width) / 2} {int(height) / 2} {WRONG}\n")
    return result


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photos of a lens, from the cameras of the stand-in for structure from motion."""
    folder = tmp_path_factory.mktemp("photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textured, "TEXELS", 30.0)  # coarse enough for few pixels
        trained = [i for i in range(20) if i % 8]  # the others are held out
        for i, pose in zip(trained, orbit(len(trained), 3.0, 20.0).double().numpy(), strict=True):
            photo = textured.render_photo(pose, make_intrinsics_of(SIZE), SIZE, Distortion(TRUE))[0]
            Image.fromarray(photo).save(folder / f"{i:02d}.png")
    for i in range(0, 20, 8):
        Image.new("RGB", SIZE[::-1]).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture
def settings(tiny, monkeypatch):
    monkeypatch.setattr(search, "find_cameras", find_cameras)
    monkeypatch.setattr(unregistered, "MAX_ERROR_RATIO", np.inf)
    changes = {"resolution": 16, "search": "sfm", "field": "grid", "optimize_camera": ("focal", "distortion")}
    return {**tiny, **changes}


@pytest.mark.slow
def test_train_wrong_distortion_is_recovered_exported_and_used_to_localise(tmp_path, photos, settings, monkeypatch):
    localised = []
    measure_errors = unregistered.measure_errors
    monkeypatch.setattr(
        unregistered, "measure_errors", lambda *args: localised.append(args[1]) or measure_errors(*args)
    )
    sizes = {"resolution": 64, "grid_resolution": 40, "samples_per_ray": 32, "views_per_step": 8, "rays_per_view": 256}
    run = train_nerfdiff(photos, out=tmp_path / "run", **settings | sizes | {"field_steps": 150})
    assert abs(WRONG + run.distortion - TRUE) < 0.01  # .0057; .03 before
    run.export(tmp_path / "transforms.json")
    content = json.loads((tmp_path / "transforms.json").read_text())
    focal = content["fl_x"] / (1.1 * SIZE[1])
    assert abs(content["k1"] / focal**2 - WRONG - run.distortion) < 1e-5
    views = open_views(tmp_path / "transforms.json", None, 64)  # all with the poses of the run, without the whole lens
    own = run.views
    assert len(views) == len(own) + 2 and float((views.images[: len(own)] - own.images).abs().mean()) < 0.01
    k = run.views.intrinsics[0]
    torch.testing.assert_close(views.intrinsics, k.expand(len(views), 3, 3), atol=1e-3, rtol=1e-4)
    others = localised[1]  # the training views come first
    torch.testing.assert_close(others.intrinsics, k.expand(2, 3, 3), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(others.images, views.images[len(own) :], atol=0.02, rtol=0)


@pytest.mark.slow
def test_train_with_distortion_interrupted_in_two_stages_resumes_bit_identically(
    tmp_path, photos, settings, monkeypatch
):
    class KilledError(Exception):
        pass

    whole = train_nerfdiff(photos, out=tmp_path / "whole", **settings)
    for task in (FitTask, DistilTask):
        loss, calls = task.loss, []

        def stop(self, *args, loss=loss, calls=calls):
            calls.append(0)
            if len(calls) == 4:
                raise KilledError
            return loss(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(task, "loss", stop)
            with pytest.raises(KilledError):
                train_nerfdiff(photos, out=tmp_path / "killed", **settings)
    again = train_nerfdiff(photos, out=tmp_path / "killed", **settings)
    assert whole.distortion == again.distortion != 0
    tensors, others = whole.model.state_dict(), again.model.state_dict()
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []
    assert torch.equal(whole.localised.poses, again.localised.poses)


def test_train_distortion_without_lenses_of_structure_from_motion_is_refused(tmp_path, scene_views, tiny):
    with pytest.raises(ConfigError, match="refines the lens that structure from motion found"):
        train_nerfdiff(scene_views, out=tmp_path / "run", **tiny | {"optimize_camera": ("distortion",)})


@pytest.mark.parametrize("is_found", [True, False])
def test_list_notes_refined_lenses_of_structure_from_motion_are_named(scene_views, is_found):
    scene = open_scene(replace(scene_views, has_focal=not is_found), 8, torch.device("cpu"))
    config = preset_config("demo", search="sfm", optimize_camera=("focal", "distortion"))
    text = "The focal length and radial distortion found by structure from motion are refined with the field"
    assert any(note.startswith(text) for note in list_notes(scene_views, scene, config)) == is_found


def test_straighten_views_removes_a_known_lens(monkeypatch):
    monkeypatch.setattr(textured, "TEXELS", 30.0)
    k = make_intrinsics_of(SIZE)
    pose = orbit(1, 3.0, 20.0).double().numpy()[0]
    straight, bent = (textured.render_photo(pose, k, SIZE, lens)[0] for lens in (None, Distortion(0.3)))
    images = torch.from_numpy(np.stack([straight, bent])).movedim(-1, 1).float() / 255
    views = Views(images, ["a", "b"], torch.from_numpy(k).float().expand(2, 3, 3), loss_masks=torch.ones(2, 1, *SIZE))
    found = straighten_views(views, 0.3)
    before, after = (x[1, :, 8:-8, 8:-8] - views.images[0, :, 8:-8, 8:-8] for x in (views.images, found.images))
    assert after.abs().mean() < 0.4 * before.abs().mean() and found.loss_masks.min() == 1
    assert straighten_views(views, 0.0) is views
