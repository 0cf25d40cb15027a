"""Masks from several looks: their mean, over the looks that are told."""

from __future__ import annotations

import pytest
import torch

from factorkit.segdiff.inference.segment import QUALITIES, Quality, averaged_masks
from factorkit.segdiff.task import add_noise, predict_masks
from factorkit.utils.errors import ConfigError
from factorkit.utils.images import pixels_to_signed


@pytest.fixture
def looked(stirred_run, pictures):
    return stirred_run(), pixels_to_signed(torch.from_numpy(pictures(3)))


def test_a_fast_look_is_one_pass_at_the_level_asked_for(looked):
    run, images = looked
    one = predict_masks(run.model, images, 40, run.schedule)
    assert torch.equal(averaged_masks(run.model, images, 40, run.schedule, QUALITIES["fast"]), one)


def test_the_mean_over_levels_draws_and_mirror_images(looked):
    run, images = looked
    looks = Quality(levels=(1 / 3, 1.0, 2.0), draws=2, flip=True)
    found = averaged_masks(run.model, images, 30, run.schedule, looks)
    looks = []
    for level in (10, 30, 60):
        for draw in (0, 1):
            looks.append(predict_masks(run.model, images, level, run.schedule, draw))
            mirrored = predict_masks(run.model, images.flip(3), level, run.schedule, draw)
            looks.append(mirrored.flip(3))
    assert all(not torch.allclose(a, b) for n, a in enumerate(looks) for b in looks[:n]), "no look twice"
    torch.testing.assert_close(found, torch.stack(looks).mean(0))
    torch.testing.assert_close(found.sum(1), torch.ones(3, 16, 16))


def test_draws_differ_and_are_the_same_again(looked):
    run, images = looked
    first, second = (add_noise(images, 30, run.schedule, draw)[0] for draw in (0, 1))
    assert torch.equal(add_noise(images, 30, run.schedule)[0], first)
    assert torch.equal(add_noise(images, 30, run.schedule, 1)[0], second)
    assert (first - second).abs().max() > 0.01


def test_levels_beyond_the_schedule_are_its_last(looked):
    run, images = looked
    found = averaged_masks(run.model, images, 900, run.schedule, Quality(levels=(2.0,)))
    assert torch.equal(found, predict_masks(run.model, images, 999, run.schedule))


def test_the_best_is_the_mirror_image_too_where_training_showed_any(looked, stirred_run, pictures):
    run, images = looked
    both = predict_masks(run.model, images, 30, run.schedule)
    both = (both + predict_masks(run.model, images.flip(3), 30, run.schedule).flip(3)) / 2
    torch.testing.assert_close(run.predictor(30, "best")(images), both)
    one_way = stirred_run(random_flip=False)
    once = predict_masks(one_way.model, images, 30, one_way.schedule)
    assert torch.equal(one_way.predictor(30, "best")(images), once)
    torch.testing.assert_close(one_way.predictor(30, Quality(flip=True))(images), both)  # who asks for it gets it
    with pytest.raises(ConfigError, match="at least one draw and one level"):
        run.segment(pictures(1), quality=Quality(draws=0))


def test_quality_reaches_every_segmentation_method(looked, pictures, tmp_path):
    run, images = looked
    best = averaged_masks(run.model, images, 30, run.schedule, QUALITIES["best"])
    torch.testing.assert_close(run.segment(pictures(3), quality="best").masks, best)
    assert not torch.allclose(run.segment(pictures(3)).masks, best)
    labels = (torch.arange(16 * 16).view(16, 16) % 2).expand(3, 16, 16).numpy()
    confidence = run.evaluate(pictures(3), labels, quality="best")["confidence"]
    assert confidence == pytest.approx(best.amax(1).mean().item())
    folder = lambda quality: run.segment_folder(pictures(3), tmp_path, quality=quality, progress=False)  # noqa: E731
    assert [folder(q).already for q in ("fast", "fast", "best", "best")] == [0, 3, 0, 3]
    with pytest.raises(ConfigError, match="quality='good' is unknown; choose one of fast, best"):
        run.segment(pictures(1), quality="good")
