"""Regions matched to classes."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from factorkit.metrics.class_scores import IGNORED, class_scores, match_classes, overlaps
from factorkit.metrics.frechet import WEIGHTS, inception_distance
from factorkit.utils.errors import ConfigError, DataError


def test_the_matching_is_the_best_of_all_permutations():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, (3, 8, 8))
    hidden = np.array([2, 0, 3, 1])
    labels = np.where(rng.random(truth.shape) < 0.6, np.argsort(hidden)[truth], rng.integers(0, 4, truth.shape))
    counts = overlaps(labels, truth, 4, 4)
    found = match_classes(counts)
    assert found.tolist() == hidden.tolist()
    best = max(class_scores(counts, np.array(p))["miou"] for p in permutations(range(4)))
    assert class_scores(counts, found)["miou"] == pytest.approx(best)


def test_the_hungarian_method_is_not_the_greedy_one():
    """Both regions like class 0 best, and the first one more; one to one, the sum decides."""
    counts = np.array([[60, 50], [30, 1]])
    assert match_classes(counts).tolist() == [1, 0]


def test_scores_are_those_written_out():
    truth = np.array([[[0, 0, 1], [1, 1, IGNORED]]])
    labels = np.array([[[1, 1, 1], [0, 0, 0]]])
    found = class_scores(overlaps(labels, truth, 2, 2), np.array([1, 0]))
    assert found["acc"] == pytest.approx(4 / 5)
    assert found["miou"] == pytest.approx((2 / 3 + 2 / 3) / 2)


def test_left_over_regions_go_where_most_of_them_lies_and_absent_classes_do_not_count():
    truth = np.repeat(np.array([0, 0, 1, 1]), 4).reshape(1, 4, 4)
    labels = np.repeat(np.array([0, 2, 1, 1]), 4).reshape(1, 4, 4)
    counts = overlaps(labels, truth, 3, 3)
    mapping = match_classes(counts[:, :2])
    assert mapping.tolist() in ([0, 1, 0],)
    assert class_scores(counts, mapping) == {"acc": 1.0, "miou": 1.0}
    lone = match_classes(overlaps(np.zeros_like(truth), truth, 1, 2))
    found = class_scores(overlaps(np.zeros_like(truth), truth, 1, 2), lone)
    assert found == {"acc": 0.5, "miou": 0.25}, "a class without a region counts 0"


def test_mistakes_are_named():
    truth = np.zeros((1, 2, 2), int)
    with pytest.raises(DataError, match="same sizes"):
        overlaps(truth[:, :1], truth, 2, 2)
    with pytest.raises(DataError, match="labels run from 2 to 2, there are 2"):
        overlaps(truth + 2, truth, 2, 2)
    with pytest.raises(DataError, match="every pixel is ignored"):
        overlaps(truth, truth + IGNORED, 2, 2)


def test_fid_without_its_weights_says_which_file_goes_where(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    images = torch.rand(4, 3, 16, 16)
    with pytest.raises(ConfigError) as caught:
        inception_distance(images, images)
    assert str(tmp_path / "hub" / "checkpoints" / WEIGHTS) in str(caught.value) and "no FID" in str(caught.value)
    with pytest.raises(DataError, match="at least 2"):
        inception_distance(images[:1], images)
