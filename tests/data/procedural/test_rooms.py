"""Procedural rooms: nested labels, deterministic by seed."""

from __future__ import annotations

import colorsys
import itertools

import numpy as np
import pytest

from factorkit.data.datasets import make_procedural_dataset
from factorkit.data.masks import load_labelled
from factorkit.data.procedural.rooms import HUE_SPREAD, HUES, PART_BRIGHTNESS, PART_HUE_OFFSETS, draw_rooms
from factorkit.utils.errors import ConfigError


def test_draw_rooms_every_image_shows_all_parts():
    images, labels = draw_rooms(40, 32)
    assert images.shape == (40, 32, 32, 3) and images.dtype == np.uint8
    shown = np.stack([np.bincount(label.ravel(), minlength=9) for label in labels])
    assert shown.shape == (40, 9)
    assert (shown > 0).mean() > 0.97, "a rug may lie behind the object"
    areas = shown.reshape(40, 3, 3).sum(2).mean(0) / 32**2
    assert (areas > 0.15).all()


def test_draw_rooms_image_depends_on_seed_and_index_only():
    images, labels = draw_rooms(5, 16, seed=3)
    more, more_labels = draw_rooms(7, 16, seed=3)
    assert np.array_equal(more[:5], images) and np.array_equal(more_labels[:5], labels)
    assert not np.array_equal(draw_rooms(5, 16, seed=4)[0], images)


def test_draw_rooms_hue_separates_things_and_brightness_parts():
    images, labels = draw_rooms(20, 64)
    for image, label in zip(images, labels, strict=True):
        inner = np.ones(label.shape, bool)  # pixels whose neighbours are of the same part: no mixed colours
        for axis in (0, 1):
            for step in (1, -1):
                inner &= np.roll(label, step, axis) == label
        for thing, usual in enumerate(HUES):
            parts = {
                part: colorsys.rgb_to_hsv(*image[current].mean(0) / 255)
                for part in range(3)
                if (current := inner & (label == 3 * thing + part)).sum() >= 8
            }
            own = [hue - PART_HUE_OFFSETS[part] for part, (hue, _, _) in parts.items()]
            assert max(own) - min(own) < 0.03
            assert all(abs(hue - usual) < HUE_SPREAD + 0.02 for hue in own)
            by_shade = [parts[part][2] for part in np.argsort(PART_BRIGHTNESS) if part in parts]
            assert all(darker + 0.05 < lighter for darker, lighter in itertools.pairwise(by_shade))


def test_draw_rooms_position_alone_predicts_little():
    _, labels = draw_rooms(200, 32)
    for depth, maximum in ((3, 0.8), (1, 0.5)):  # of things, of parts: right if every pixel is told its usual label
        usual = np.stack([labels // depth == k for k in range(9 // depth)], 1).mean(0).max(0)
        assert usual.mean() < maximum


def test_make_procedural_dataset_nested_has_two_levels():
    dataset = make_procedural_dataset(16, train=3, test=2, nested=True)
    assert dataset.nesting == (3, 3) and make_procedural_dataset(16, train=1, test=1).nesting is None
    labelled = load_labelled(dataset.test_images, dataset.test_masks, 16)
    assert np.array_equal(labelled.labels, draw_rooms(2, 16, 2**32)[1])


@pytest.mark.parametrize("requested", [{"count": -1}, {"count": 1, "seed": -1}, {"count": 1, "resolution": 0}])
def test_draw_rooms_invalid_arguments_raise(requested):
    with pytest.raises(ConfigError, match="or more"):
        draw_rooms(**requested)
