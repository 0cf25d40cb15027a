"""One radial term of all lenses beyond that of structure from motion: its rays, its fit, and where it ends up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.data.views.cameras import Distortion, FisheyeDistortion, refine_lens
from factorkit.nerfdiff import search, unregistered
from factorkit.nerfdiff.rays import straighten_points
from factorkit.nerfdiff.stages.sfm import MODEL
from factorkit.nerfdiff.train import train_nerfdiff
from factorkit.rendering import orbit
from tests.nerfdiff import registered
from tests.nerfdiff.textured import make_intrinsics_of, render_photo

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
    """Photos of a lens, from the cameras of the stand-in for structure from motion; two are held out."""
    folder = tmp_path_factory.mktemp("photos")
    for i, pose in enumerate(orbit(18, 3.0, 20.0).double().numpy()):
        photo = render_photo(pose, make_intrinsics_of(SIZE), SIZE, Distortion(TRUE))[0]
        Image.fromarray(photo).save(folder / f"{i:02d}.png")
    (folder / "train.txt").write_text("".join(f"{i:02d}\n" for i in range(18)))
    return folder


@pytest.fixture
def settings(tiny, monkeypatch):
    monkeypatch.setattr(search, "find_cameras", find_cameras)
    monkeypatch.setattr(unregistered, "MAX_ERROR_RATIO", np.inf)
    return {**tiny, "resolution": 16, "search": "sfm", "optimize_camera": ("focal", "distortion")}


@pytest.mark.slow
def test_train_wrong_distortion_is_recovered_and_exported(tmp_path, photos, settings):
    sizes = {"resolution": 64, "grid_resolution": 40, "samples_per_ray": 32, "views_per_step": 8, "rays_per_view": 256}
    run = train_nerfdiff(photos, out=tmp_path / "run", **settings | sizes | {"field_steps": 200, "unbounded": "no"})
    print("term", run.distortion, run.views.intrinsics[0, 0, 0] / 64 / 1.1)
    assert abs(WRONG + run.distortion - TRUE) < 0.01
