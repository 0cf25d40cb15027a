"""Scores of masks; regions matched with classes, of one level and of hierarchies."""

from __future__ import annotations

from itertools import chain, combinations, permutations

import numpy as np
import pytest
import torch

from factorkit.metrics.segmentation import (
    IGNORE_LABEL,
    count_overlaps,
    evaluate_masks,
    fit_mapping,
    match_classes,
    nested_accuracy,
    score_classes,
    score_masks,
)
from factorkit.utils.errors import ConfigError, DataError


@pytest.fixture
def masks():
    rng = np.random.default_rng(0)
    foreground = rng.random((6, 9, 7)) < 0.3
    valid = rng.random((6, 9, 7)) < 0.9
    return rng.random((6, 9, 7)) < 0.4, foreground, valid


@pytest.mark.slow
def test_score_masks_per_image_equals_torchmetrics(masks):
    from torchmetrics.functional.classification import binary_accuracy, binary_f1_score, binary_jaccard_index

    predicted, foreground, valid = masks
    got = score_masks(predicted, foreground, valid, per_image=True)
    for i in range(len(predicted)):
        p, f = (torch.from_numpy(m[i][valid[i]]).int() for m in (predicted, foreground))
        assert got["acc"][i] == pytest.approx(binary_accuracy(p, f).item())
        assert got["iou"][i] == pytest.approx(binary_jaccard_index(p, f).item())
        assert got["dice"][i] == pytest.approx(binary_f1_score(p, f).item())
    mean = score_masks(torch.from_numpy(predicted), torch.from_numpy(foreground), torch.from_numpy(valid))
    assert mean == {name: pytest.approx(values.mean()) for name, values in got.items()}


def test_score_masks_averages_over_images_not_pixels():
    foreground = np.zeros((2, 4, 4), bool)
    foreground[0, 0, 0] = foreground[1] = True
    predicted = np.stack([np.zeros((4, 4), bool), np.ones((4, 4), bool)])
    assert score_masks(predicted, foreground)["iou"] == 0.5


def test_score_masks_both_empty_is_one():
    empty, full = np.zeros((1, 3, 3), bool), np.ones((1, 3, 3), bool)
    assert score_masks(empty, empty) == {"acc": 1, "iou": 1, "dice": 1}
    assert score_masks(full, empty) == {"acc": 0, "iou": 0, "dice": 0}
    # Only invalid pixels disagree: that is nothing found, too.
    corner = np.zeros((1, 3, 3), bool)
    corner[0, 0, 0] = True
    assert score_masks(corner, empty, ~corner)["iou"] == 1


def test_fit_mapping_equals_brute_force(masks):
    _, foreground, valid = masks
    labels = np.random.default_rng(1).integers(0, 4, foreground.shape)
    labels[foreground] = np.random.default_rng(2).choice([1, 3, 0], foreground.sum(), p=[0.5, 0.4, 0.1])
    subsets = chain.from_iterable(combinations(range(4), size) for size in (1, 2, 3))
    best = max(subsets, key=lambda subset: score_masks(np.isin(labels, subset), foreground, valid)["iou"])
    assert fit_mapping(labels, foreground, valid, 4) == best == (1, 3)


def test_fit_mapping_empty_region_is_left_out():
    labels = np.zeros((2, 4, 4), int)
    labels[:, :2] = 2
    assert fit_mapping(labels, labels == 2, None, num_regions=3) == (2,)


def test_evaluate_masks_fits_first_images_and_scores_the_rest():
    """The regions swap their meaning after the fitting images: the fixed mapping must fail, the oracle must not."""
    foreground = np.zeros((6, 4, 4), bool)
    foreground[:, 1:3, 1:3] = True
    labels = foreground.astype(int)
    labels[3:] = 1 - labels[3:]
    result = evaluate_masks(labels, foreground, None, num_regions=2, num_fit_images=2)
    assert result["mapping"] == [1] and result["fitted_on"] == 2 and result["scored"] == 4
    assert result["iou"] == pytest.approx(1 / 4) and result["acc"] == pytest.approx(1 / 4)
    assert (result["oracle_acc"], result["oracle_iou"], result["oracle_dice"]) == (1, 1, 1)
    assert result["areas"] == pytest.approx([(12 + 3 * 4) / 64, (4 + 3 * 12) / 64])


def test_evaluate_masks_scores_the_union_of_mapped_regions(masks):
    _, foreground, valid = masks
    labels = np.random.default_rng(3).integers(0, 3, foreground.shape)
    result = evaluate_masks(labels, foreground, valid, 3, num_fit_images=2)
    fixed = score_masks(np.isin(labels, result["mapping"])[2:], foreground[2:], valid[2:])
    assert {name: result[name] for name in fixed} == pytest.approx(fixed)
    assert result["oracle_iou"] >= result["iou"]


@pytest.mark.parametrize("num_fit_images", [0, 6, 9])
def test_evaluate_masks_fit_out_of_range_raises(masks, num_fit_images):
    labels, foreground, valid = masks
    with pytest.raises(ConfigError, match=f"num_fit_images={num_fit_images} of 6"):
        evaluate_masks(labels, foreground, valid, 2, num_fit_images=num_fit_images)


def test_segmentation_metrics_invalid_arguments_raise(masks):
    predicted, foreground, valid = masks
    with pytest.raises(DataError, match=r"\(5, 9, 7\)"):
        score_masks(predicted[:5], foreground, valid)
    with pytest.raises(DataError, match=r"\[3\] have no valid pixel"):
        score_masks(predicted, foreground, valid & (np.arange(6) != 3)[:, None, None])
    with pytest.raises(DataError, match=r"0 to 5.*3 regions"):
        fit_mapping(np.full(foreground.shape, 5) * predicted, foreground, valid, 3)
    with pytest.raises(ConfigError, match="1 region"):
        fit_mapping(np.zeros(foreground.shape, int), foreground, valid, 1)
    with pytest.raises(ConfigError, match="1 labelled image"):
        evaluate_masks(predicted[:1], foreground[:1], valid[:1], 2, num_fit_images=1)


def test_match_classes_equals_the_best_permutation():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, (3, 8, 8))
    hidden = np.array([2, 0, 3, 1])
    labels = np.where(rng.random(truth.shape) < 0.6, np.argsort(hidden)[truth], rng.integers(0, 4, truth.shape))
    counts = count_overlaps(labels, truth, 4, 4)
    found = match_classes(counts)
    assert found.tolist() == hidden.tolist()
    best = max(score_classes(counts, np.array(p))["miou"] for p in permutations(range(4)))
    assert score_classes(counts, found)["miou"] == pytest.approx(best)


def test_match_classes_conflicting_regions_is_not_greedy():
    """Both regions like class 0 best, and the first one more; one to one, the sum decides."""
    counts = np.array([[60, 50], [30, 1]])
    assert match_classes(counts).tolist() == [1, 0]


def test_score_classes_small_example_equals_hand_computed_scores():
    truth = np.array([[[0, 0, 1], [1, 1, IGNORE_LABEL]]])
    labels = np.array([[[1, 1, 1], [0, 0, 0]]])
    found = score_classes(count_overlaps(labels, truth, 2, 2), np.array([1, 0]))
    assert found["acc"] == pytest.approx(4 / 5)
    assert found["miou"] == pytest.approx((2 / 3 + 2 / 3) / 2)


def test_match_classes_surplus_regions_go_to_their_majority_class():
    truth = np.repeat(np.array([0, 0, 1, 1]), 4).reshape(1, 4, 4)
    labels = np.repeat(np.array([0, 2, 1, 1]), 4).reshape(1, 4, 4)
    counts = count_overlaps(labels, truth, 3, 3)
    mapping = match_classes(counts[:, :2])
    assert mapping.tolist() in ([0, 1, 0],)
    assert score_classes(counts, mapping) == {"acc": 1.0, "miou": 1.0}
    lone = match_classes(count_overlaps(np.zeros_like(truth), truth, 1, 2))
    found = score_classes(count_overlaps(np.zeros_like(truth), truth, 1, 2), lone)
    assert found == {"acc": 0.5, "miou": 0.25}, "a class without a region counts 0"


def test_count_overlaps_invalid_arguments_raise():
    truth = np.zeros((1, 2, 2), int)
    with pytest.raises(DataError, match="same sizes"):
        count_overlaps(truth[:, :1], truth, 2, 2)
    with pytest.raises(DataError, match="labels run from 2 to 2; use 0 to 1"):
        count_overlaps(truth + 2, truth, 2, 2)
    with pytest.raises(DataError, match="every pixel is ignored"):
        count_overlaps(truth, truth + IGNORE_LABEL, 2, 2)


def random_truth(seed=0, count=6, classes=9):
    return np.random.default_rng(seed).integers(0, classes, (count, 8, 8))


def test_nested_accuracy_permuted_labels_is_one():
    labels = random_truth()
    things, parts = np.array([2, 0, 1]), np.array([[1, 2, 0], [0, 2, 1], [2, 1, 0]])
    renamed = 3 * things[labels // 3] + parts[labels // 3, labels % 3]
    scores = nested_accuracy(renamed, labels, (3, 3), (3, 3), num_fit_images=3)
    assert scores["accuracy"] == [1, 1] and scores["within"] == [1, 1]
    assert scores["mapping"][0] == [1, 2, 0], "region 0 is thing 1"
    assert np.array_equal(np.array(scores["mapping"][1])[renamed], labels)


def test_nested_accuracy_part_in_wrong_region_is_wrong_at_both_levels():
    labels = np.zeros((2, 1, 10), int)
    labels[:, :, 5:] = [3, 3, 3, 4, 5]
    found = labels.copy()
    found[1, 0, :2] = 3  # a thing's pixels given to the other
    found[1, 0, 9] = 4  # a wrong part of the right thing
    scores = nested_accuracy(found, labels, (2, 3), (2, 3), num_fit_images=1)
    assert scores["accuracy"] == pytest.approx([0.8, 0.7])
    assert scores["within"] == pytest.approx([0.8, 7 / 8])
    assert scores["chance"] == pytest.approx([0.5, 0.5])


def test_nested_accuracy_matches_top_down():
    # by parts alone the regions would change places: region 1 shares 4 pixels of one part with class 0, region 0 only 3
    counts = {(0, 0): 3, (0, 1): 3, (2, 0): 4, (2, 3): 5, (1, 2): 1}
    found, labels = (np.concatenate([np.full(n, pair[i]) for pair, n in counts.items()])[None, None] for i in (0, 1))
    both = np.concatenate([found, found]), np.concatenate([labels, labels])
    scores = nested_accuracy(*both, (2, 2), (2, 2), num_fit_images=1)
    assert scores["mapping"][0] == [0, 1]


def test_nested_accuracy_surplus_regions_stay_unmatched():
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


def test_nested_accuracy_invalid_pixels_are_not_counted():
    labels = random_truth()
    found = labels.copy()
    found[:, :4] = 0
    valid = np.ones(labels.shape, bool)
    valid[:, :4] = False
    assert nested_accuracy(found, labels, (3, 3), (3, 3), valid=valid, num_fit_images=2)["accuracy"] == [1, 1]
    assert nested_accuracy(found, labels, (3, 3), (3, 3), num_fit_images=2)["accuracy"][0] < 1


def test_nested_accuracy_three_levels_permuted_is_one():
    labels = random_truth(classes=8)
    turned = 4 * (1 - labels // 4) + labels % 4
    assert nested_accuracy(turned, labels, (2, 2, 2), (2, 2, 2), num_fit_images=2)["accuracy"] == [1, 1, 1]


def test_nested_accuracy_invalid_arguments_raise():
    labels = random_truth()
    with pytest.raises(ConfigError, match="as many levels"):
        nested_accuracy(labels, labels, (3, 3), (9,))
    with pytest.raises(ConfigError, match="num_fit_images=6"):
        nested_accuracy(labels, labels, (3, 3), (3, 3), num_fit_images=6)
    with pytest.raises(DataError, match="0 to 3"):
        nested_accuracy(labels % 4, labels, (2, 2), (2, 2), num_fit_images=2)
    with pytest.raises(DataError, match="one shape"):
        nested_accuracy(labels[:2], labels, (3, 3), (3, 3))
