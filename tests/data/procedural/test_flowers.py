from __future__ import annotations

import numpy as np
import pytest

from factorkit.data import draw_flowers
from factorkit.utils.errors import ConfigError


def test_draw_flowers_is_deterministic_and_independent_of_count():
    images, masks = draw_flowers(5, 16, seed=3)
    more_images, more_masks = draw_flowers(8, 16, seed=3)
    np.testing.assert_array_equal(images, more_images[:5])
    np.testing.assert_array_equal(masks, more_masks[:5])
    assert len(np.unique(more_images.reshape(8, -1), axis=0)) == 8
    assert not (draw_flowers(5, 16, seed=4)[0] == images).all((1, 2, 3)).any()


def test_draw_flowers_returns_uint8_and_bool():
    images, masks = draw_flowers(2, 24)
    assert images.shape == (2, 24, 24, 3) and images.dtype == np.uint8
    assert masks.shape == (2, 24, 24) and masks.dtype == bool
    assert draw_flowers(0, 24)[0].shape == (0, 24, 24, 3)


@pytest.mark.slow
def test_draw_flowers_statistics_match_reference():
    """Means over 300 flowers; the margins are four standard errors of such a mean."""
    images, masks = draw_flowers(300, 32, seed=1)
    area = masks.mean((1, 2))
    assert 0.217 < area.mean() < 0.257 and 0.065 < area.std() < 0.10
    inside = masks[..., None]
    flower = (images * inside).sum((1, 2)) / inside.sum((1, 2)) / 255
    ground = (images * ~inside).sum((1, 2)) / (~inside).sum((1, 2)) / 255
    np.testing.assert_allclose(ground.mean(0), (0.221, 0.422, 0.163), atol=0.025)
    np.testing.assert_allclose(flower.mean(0), (0.595, 0.37, 0.415), atol=0.06)
    assert 0.036 < np.abs(np.diff(images / 255, axis=1)).mean() < 0.043  # texture, edges and pixel noise together


def test_draw_flowers_mask_matches_colours():
    _, masks = draw_flowers(50, 32)
    rows, columns = masks.any(2), masks.any(1)
    centre = (np.argmax(rows, 1) + 31 - np.argmax(rows[:, ::-1], 1)) / 64, np.argmax(columns, 1)
    assert (np.abs(centre[0] - 0.5) < 0.25).all()
    assert masks.any((1, 2)).all() and masks.mean() < 0.5


def test_draw_flowers_resolution_keeps_shape():
    _, small = draw_flowers(20, 16, seed=2)
    _, large = draw_flowers(20, 64, seed=2)
    np.testing.assert_allclose(small.mean((1, 2)).mean(), large.mean((1, 2)).mean(), atol=0.06)


@pytest.mark.parametrize("wrong", [{"count": -1}, {"count": 1, "resolution": 0}, {"count": 1, "seed": -1}])
def test_draw_flowers_invalid_arguments_raise(wrong):
    with pytest.raises(ConfigError, match="or more"):
        draw_flowers(**wrong)
