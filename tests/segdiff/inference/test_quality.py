"""Averaging of the masks of an image and of its mirror image."""

from __future__ import annotations

import pytest
import torch

from factorkit.segdiff.inference.segment import add_noise, predict_masks
from factorkit.utils.errors import ConfigError
from factorkit.utils.images import pixels_to_signed


@pytest.fixture
def run_and_images(make_random_run, make_images):
    return make_random_run(), pixels_to_signed(torch.from_numpy(make_images(3)))


def test_quality_fast_is_one_pass(run_and_images):
    run, images = run_and_images
    masks = predict_masks(run.model, images, 40, run.schedule)
    assert torch.equal(run.predictor(40, "fast")(images), masks)


def test_add_noise_twice_is_the_same(run_and_images):
    run, images = run_and_images
    assert torch.equal(add_noise(images, 30, run.schedule)[0], add_noise(images, 30, run.schedule)[0])


def test_quality_best_averages_the_flipped_image_only_if_training_flipped(run_and_images, make_random_run):
    run, images = run_and_images
    masks = predict_masks(run.model, images, 30, run.schedule)
    flipped = predict_masks(run.model, images.flip(3), 30, run.schedule).flip(3)
    assert not torch.allclose(masks, flipped)
    best = run.predictor(30, "best")(images)
    torch.testing.assert_close(best, (masks + flipped) / 2)
    torch.testing.assert_close(best.sum(1), torch.ones(3, 16, 16))
    unflipped_run = make_random_run(random_flip=False)
    once = predict_masks(unflipped_run.model, images, 30, unflipped_run.schedule)
    assert torch.equal(unflipped_run.predictor(30, "best")(images), once)


def test_quality_reaches_every_segmentation_method(run_and_images, make_images, tmp_path):
    run, images = run_and_images
    best = run.predictor(30, "best")(images)
    torch.testing.assert_close(run.segment(make_images(3), quality="best").masks, best)
    assert not torch.allclose(run.segment(make_images(3)).masks, best)
    labels = (torch.arange(16 * 16).view(16, 16) % 2).expand(3, 16, 16).numpy()
    confidence = run.evaluate(make_images(3), labels, quality="best")["confidence"]
    assert confidence == pytest.approx(best.amax(1).mean().item())
    folder = lambda quality: run.segment_folder(make_images(3), tmp_path, quality=quality, progress=False)  # noqa: E731
    assert [folder(q).already for q in ("fast", "fast", "best", "best")] == [0, 3, 0, 3]
    with pytest.raises(ConfigError, match="quality='good' is unknown; choose one of fast, best"):
        run.segment(make_images(1), quality="good")
