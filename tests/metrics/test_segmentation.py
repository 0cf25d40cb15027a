from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import pytest
import torch

from factorkit.metrics.segmentation import evaluate_masks, fit_mapping, score_masks
from factorkit.utils.errors import ConfigError, DataError


@pytest.fixture
def masks():
    rng = np.random.default_rng(0)
    foreground = rng.random((6, 9, 7)) < 0.3
    valid = rng.random((6, 9, 7)) < 0.9
    return rng.random((6, 9, 7)) < 0.4, foreground, valid


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
