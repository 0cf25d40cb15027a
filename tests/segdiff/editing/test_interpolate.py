"""Interpolation between two images."""

from __future__ import annotations

import math

import pytest
import torch

from factorkit.metrics.image import psnr
from factorkit.segdiff.editing.interpolate import slerp
from factorkit.utils.errors import ConfigError, DataError
from factorkit.utils.images import pixels_to_signed

FORMS = pytest.mark.parametrize("changes", [{}, {"form": "thesis"}, {"regions": 1}, {"decoding": "concat"}])


@pytest.mark.slow
@FORMS
def test_interpolate_goes_from_a_to_b(make_random_run, make_images, changes):
    run = make_random_run(**changes)
    a, b = make_images(2, 1), make_images(2, 2)
    result = run.interpolate(a, b, frames=3, steps=3)
    regions = changes.get("regions", 3)
    assert result.images.shape == (2, 3, 3, 16, 16) and result.masks.shape == (2, 3, regions, 16, 16)
    assert result.shares.tolist() == [0, 0.5, 1] and torch.equal(result.labels, result.masks.argmax(2))
    torch.testing.assert_close(result.a, torch.from_numpy(a).movedim(-1, 1) / 255)
    torch.testing.assert_close(result.b, torch.from_numpy(b).movedim(-1, 1) / 255)
    assert result.images.min() >= 0 and result.images.max() <= 1 and result.images.std() > 0.01
    torch.testing.assert_close(result.masks.sum(2), torch.ones(2, 3, 16, 16))
    assert torch.equal(result.images, run.interpolate(a, b, frames=3, steps=3).images)
    back = run.interpolate(b, a, frames=3, steps=3)
    torch.testing.assert_close(back.images.flip(1), result.images, atol=1e-4, rtol=0)
    assert not torch.allclose(result.images[:, 0], result.images[:, 2], atol=1e-2)


@pytest.mark.slow
def test_interpolate_end_frames_reconstruct_their_images(make_random_run, make_images):
    """Smooth weights: a random network of full size is no denoiser, and no sampler follows it."""
    run = make_random_run()
    with torch.no_grad():
        run.model.decoder.conv_out.weight.mul_(0.1)
    a, b = make_images(2, 1), make_images(2, 2)
    results = [run.interpolate(a, b, frames=2, steps=steps) for steps in (5, 20)]
    ends = torch.stack([results[0].a, results[0].b], 1)
    few, many = (psnr(result.images.flatten(0, 1), ends.flatten(0, 1)).min() for result in results)
    assert many > max(20, few + 3), (few, many)


def test_interpolate_mixes_images_and_noise(make_random_run, make_images, monkeypatch):
    """x_t of a frame has the linear mixture of the images as signal, and noise of unbroken length on the sphere."""
    run, recorded = make_random_run(), []
    forward = run.model.forward
    monkeypatch.setattr(run.model, "forward", lambda x, t, *rest: recorded.append((x, t)) or forward(x, t, *rest))
    a, b = make_images(1, 1), make_images(1, 2)
    run.interpolate(a, b, frames=5, t=400, steps=2)
    x_t, t = next((x, t) for x, t in recorded if len(x) == 5)
    assert t.tolist() == [400] * 5
    clean_a, clean_b = (pixels_to_signed(torch.from_numpy(p)) for p in (a, b))
    s = torch.linspace(0, 1, 5)[:, None, None, None]
    eps = (x_t - run.schedule.signal(t) * torch.lerp(clean_a, clean_b, s)) / run.schedule.sigma(t)
    torch.testing.assert_close(eps, slerp(eps[0], eps[4], s), atol=1e-4, rtol=0)


def test_slerp_keeps_length_and_divides_the_angle_evenly():
    a, b = torch.tensor([3.0, 0, 0]), torch.tensor([0.0, 3, 0])
    mixed = slerp(a, b, torch.tensor([[0.0], [1 / 3], [1.0]]))
    half = math.sqrt(3) / 2
    torch.testing.assert_close(mixed, 3 * torch.tensor([[1.0, 0, 0], [half, 0.5, 0], [0, 1, 0]]))
    same = torch.stack([a, a, a])
    torch.testing.assert_close(slerp(a, a, torch.tensor([[0.0], [0.5], [1.0]])), same)


@pytest.mark.slow
def test_interpolate_ends_are_independent_of_other_images(make_random_run, make_images):
    run = make_random_run()
    a, b, c = make_images(3, 3)
    together = run.interpolate([a, b], [b, c], frames=2, steps=3)
    alone = run.interpolate(a, c, frames=2, steps=3)
    torch.testing.assert_close(together.images[0, 0], alone.images[0, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(together.images[1, 1], alone.images[0, 1], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_interpolate_one_image_pairs_with_all_others(make_random_run, make_images):
    run = make_random_run()
    many, one = make_images(3, 1), make_images(1, 2)
    result = run.interpolate(many, one, frames=2, steps=2)
    assert result.images.shape[:2] == (3, 2)
    torch.testing.assert_close(result.images[:, 1], result.images[:1, 1].expand(3, -1, -1, -1), atol=1e-4, rtol=0)
    assert run.interpolate(one, many, frames=2, steps=2).images.shape[:2] == (3, 2)


@pytest.mark.slow
def test_interpolate_default_level_is_a_quarter_of_the_trained_levels(make_random_run, make_images):
    a, b = make_images(2)
    for run, t in ((make_random_run(), 250), (make_random_run(high_noise_fraction=0.0, t_max=40), 10)):
        by_default = run.interpolate(a, b, frames=2, steps=2)
        assert torch.equal(by_default.images, run.interpolate(a, b, frames=2, steps=2, t=t).images)
        assert not torch.equal(by_default.images, run.interpolate(a, b, frames=2, steps=2, t=t + 5).images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 1}, "frames=1"),
        ({"t": 1000}, "t=1000 must lie between 0 and 999"),
        ({"t": -1}, "t=-1"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_interpolate_invalid_settings_raise(make_random_run, make_images, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_random_run().interpolate(*make_images(2), **changes)


def test_interpolate_untrained_level_raises(make_random_run, make_images):
    with pytest.raises(ConfigError, match="between 0 and 39, the noisiest level"):
        make_random_run(high_noise_fraction=0.0, t_max=40).interpolate(*make_images(2), t=40)


def test_interpolate_unpairable_images_raise(make_random_run, make_images):
    with pytest.raises(DataError, match="2 images cannot be paired with 3"):
        make_random_run().interpolate(make_images(2), make_images(3))
    with pytest.raises(DataError, match="no such file"):
        make_random_run().interpolate(make_images(2), "nowhere.png")
