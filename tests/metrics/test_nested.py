"""Nested accuracy: parts count only inside what they are parts of."""

from __future__ import annotations

import numpy as np
import pytest

from factorkit.metrics.nested import nested_accuracy
from factorkit.utils.errors import ConfigError, DataError


def truth(seed=0, count=6, classes=9):
    return np.random.default_rng(seed).integers(0, classes, (count, 8, 8))


def test_regions_of_other_names_are_right_at_both_levels():
    labels = truth()
    things, parts = np.array([2, 0, 1]), np.array([[1, 2, 0], [0, 2, 1], [2, 1, 0]])
    renamed = 3 * things[labels // 3] + parts[labels // 3, labels % 3]
    scores = nested_accuracy(renamed, labels, (3, 3), (3, 3), num_fit_images=3)
    assert scores["accuracy"] == [1, 1] and scores["within"] == [1, 1]
    assert scores["mapping"][0] == [1, 2, 0], "region 0 is thing 1"
    assert np.array_equal(np.array(scores["mapping"][1])[renamed], labels)


def test_a_part_in_the_wrong_thing_is_wrong_at_both_levels():
    labels = np.zeros((2, 1, 10), int)
    labels[:, :, 5:] = [3, 3, 3, 4, 5]
    found = labels.copy()
    found[1, 0, :2] = 3  # a thing's pixels given to the other
    found[1, 0, 9] = 4  # a wrong part of the right thing
    scores = nested_accuracy(found, labels, (2, 3), (2, 3), num_fit_images=1)
    assert scores["accuracy"] == pytest.approx([0.8, 0.7])
    assert scores["within"] == pytest.approx([0.8, 7 / 8])
    assert scores["chance"] == pytest.approx([0.5, 0.5])


def test_parents_are_matched_before_their_parts():
    # by parts alone the regions would change places: region 1 shares 4 pixels of one part with class 0, region 0 only 3
    counts = {(0, 0): 3, (0, 1): 3, (2, 0): 4, (2, 3): 5, (1, 2): 1}
    found, labels = (np.concatenate([np.full(n, pair[i]) for pair, n in counts.items()])[None, None] for i in (0, 1))
    both = np.concatenate([found, found]), np.concatenate([labels, labels])
    scores = nested_accuracy(*both, (2, 2), (2, 2), num_fit_images=1)
    assert scores["mapping"][0] == [0, 1]


def test_more_regions_than_classes_leave_some_without_a_partner():
    labels = np.array([[[0, 0, 1, 1, 2, 2, 3, 3]]] * 2)
    found = np.array([[[0, 0, 3, 4, 6, 6, 5, 7]]] * 2)
    scores = nested_accuracy(found, labels, (4, 2), (2, 2), num_fit_images=1)
    # of four regions with 2, 1, 2 and 3 pixels only two find a class: the first and the last
    assert scores["mapping"][0].count(-1) == 2
    for region, thing in enumerate(scores["mapping"][0]):
        parts = scores["mapping"][1][2 * region : 2 * region + 2]
        assert all(part == -1 or part // 2 == thing for part in parts)
        assert thing >= 0 or parts == [-1, -1]
    assert scores["accuracy"][1] <= scores["accuracy"][0] == pytest.approx(5 / 8)


def test_pixels_that_are_not_valid_count_nowhere():
    labels = truth()
    found = labels.copy()
    found[:, :4] = 0
    valid = np.ones(labels.shape, bool)
    valid[:, :4] = False
    assert nested_accuracy(found, labels, (3, 3), (3, 3), valid=valid, num_fit_images=2)["accuracy"] == [1, 1]
    assert nested_accuracy(found, labels, (3, 3), (3, 3), num_fit_images=2)["accuracy"][0] < 1


def test_three_levels():
    labels = truth(classes=8)
    turned = 4 * (1 - labels // 4) + labels % 4
    assert nested_accuracy(turned, labels, (2, 2, 2), (2, 2, 2), num_fit_images=2)["accuracy"] == [1, 1, 1]


def test_what_cannot_be_scored_is_refused():
    labels = truth()
    with pytest.raises(ConfigError, match="as many levels"):
        nested_accuracy(labels, labels, (3, 3), (9,))
    with pytest.raises(ConfigError, match="num_fit_images=6"):
        nested_accuracy(labels, labels, (3, 3), (3, 3), num_fit_images=6)
    with pytest.raises(DataError, match="0 to 3"):
        nested_accuracy(labels % 4, labels, (2, 2), (2, 2), num_fit_images=2)
    with pytest.raises(DataError, match="alike"):
        nested_accuracy(labels[:2], labels, (3, 3), (3, 3))
