from __future__ import annotations

import sys

import numpy as np
import pytest

from factorkit.metrics.baselines import BASELINES, score_baselines
from factorkit.metrics.segmentation import score_masks
from factorkit.utils.errors import ConfigError, DataError

N, FIT, SIZE = 10, 4, 24


@pytest.fixture(scope="module")
def discs():
    """Discs about the centre, of one colour an image that the set does not share, on a textured dark ground."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE]
    centre = 11.5 + rng.uniform(-3, 3, (N, 2, 1, 1))
    inside = np.hypot(y - centre[:, 0], x - centre[:, 1]) < rng.uniform(4.5, 7, (N, 1, 1))
    colour = rng.uniform(110, 250, (N, 1, 1, 3))
    images = np.where(inside[..., None], colour, 40) + rng.normal(0, 12, (N, SIZE, SIZE, 3))
    return images.clip(0, 255).astype(np.uint8), inside


@pytest.fixture(scope="module")
def rows(discs):
    pytest.importorskip("sklearn", reason="scikit-learn is missing")
    pytest.importorskip("cv2", reason="opencv is missing")
    return score_baselines(*discs, num_fit_images=FIT)


@pytest.mark.slow
def test_score_baselines_default_scores_every_baseline(rows):
    assert list(rows) == list(BASELINES)
    assert all(set(row) == {"acc", "iou", "dice"} for row in rows.values())


@pytest.mark.slow
def test_score_baselines_coloured_discs_ranks_colour_above_position(discs, rows):
    """Colour tells the object here, position only roughly, and its area not at all."""
    iou = {name: row["iou"] for name, row in rows.items()}
    _, inside = discs
    assert iou["all_foreground"] == pytest.approx(inside[FIT:].mean((1, 2)).mean())
    assert iou["all_foreground"] + 0.2 < min(iou["centre_disc"], iou["mean_mask"])
    assert max(iou["centre_disc"], iou["mean_mask"]) < 0.85
    assert min(iou["two_means_image"], iou["two_means_set"], iou["grabcut"]) > 0.9


def test_score_baselines_inverted_scored_labels_invert_accuracy(discs):
    """Each predictor sees the fitting images' labels only: turning the others round must turn the accuracy round."""
    images, inside = discs
    turned = np.concatenate([inside[:FIT], ~inside[FIT:]])
    names = ["centre_disc", "mean_mask", "all_foreground"]
    rows, turned_rows = (score_baselines(images, m, num_fit_images=FIT, names=names) for m in (inside, turned))
    for name in names:
        assert turned_rows[name]["acc"] == pytest.approx(1 - rows[name]["acc"])


def test_position_baselines_same_disc_everywhere_are_exact():
    """One and the same disc in every image, of radius 5 and with one corner unlabelled: both must find it exactly."""
    y, x = np.mgrid[:SIZE, :SIZE]
    inside = np.broadcast_to(np.hypot(y - 11.5, x - 11.5) <= 5, (3, SIZE, SIZE))
    valid = np.ones_like(inside)
    valid[:, 11, 11] = False
    rows = score_baselines(
        np.zeros((3, SIZE, SIZE, 3), np.uint8), inside, valid, num_fit_images=1, names=["centre_disc", "mean_mask"]
    )
    assert rows["centre_disc"]["iou"] == rows["mean_mask"]["iou"] == 1


def test_mean_mask_is_cut_at_the_best_threshold():
    """Two of three fitting masks are the left half, one is everything: the level of 2/3 gives (.5 + .5 + 1) / 3 for
    everything and (1 + 1 + .5) / 3 for the left half, so the left half it is.
    """
    masks = np.zeros((4, 4, 4), bool)
    masks[:, :, :2] = True
    masks[2] = True
    predicted = BASELINES["mean_mask"](np.zeros((4, 4, 4, 3), np.uint8), masks[:3], np.ones_like(masks[:3]))
    assert (predicted == masks[0]).all() and len(predicted) == 4


def test_two_means_image_takes_the_cluster_away_from_the_border(discs):
    pytest.importorskip("sklearn", reason="scikit-learn is missing")
    images, inside = discs
    none = np.zeros((0, SIZE, SIZE), bool)
    for image in (images, 255 - images):  # whichever of the two is the brighter
        predicted = BASELINES["two_means_image"](image, none, none)
        assert score_masks(predicted, inside)["iou"] > 0.9
    large = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    large[:, 2:-2, 2:-2] = 200  # 69% of the image
    assert (BASELINES["two_means_image"](large, none, none) == (large[..., 0] == 200)).all()


def test_two_means_large_image_is_fitted_to_some_of_its_pixels(monkeypatch):
    cluster = pytest.importorskip("sklearn.cluster", reason="scikit-learn is missing")
    fit, fitted, none = cluster.KMeans.fit, [], np.zeros((0, 160, 160), bool)

    def record(self, pixels):
        fitted.append(len(pixels))
        return fit(self, pixels)

    monkeypatch.setattr(cluster.KMeans, "fit", record)
    image = np.zeros((1, 160, 160, 3), np.uint8)
    image[:, 30:90, 50:120] = 200
    assert (BASELINES["two_means_image"](image, none, none) == (image[..., 0] == 200)).all()
    assert fitted == [20_000]


@pytest.mark.parametrize(("module", "name"), [("cv2", "grabcut"), ("sklearn.cluster", "two_means_image")])
def test_score_baselines_missing_library_reports_unavailable(discs, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    rows = score_baselines(*discs, num_fit_images=FIT, names=["all_foreground", name])
    assert "iou" in rows["all_foreground"]
    assert module in rows[name]["unavailable"] and "factorkit[baselines]" in rows[name]["unavailable"]


def test_score_baselines_images_of_one_colour_are_scored(discs):
    pytest.importorskip("sklearn", reason="scikit-learn is missing")
    pytest.importorskip("cv2", reason="opencv is missing")
    images, inside = discs
    rows = score_baselines(np.full_like(images[:3], 90), inside[:3], num_fit_images=1)
    assert all(0 <= row["iou"] <= 1 for row in rows.values())


def test_score_baselines_invalid_arguments_raise(discs):
    images, inside = discs
    with pytest.raises(ConfigError, match=r"magic.*all_foreground"):
        score_baselines(images, inside, num_fit_images=FIT, names=["magic"])
    with pytest.raises(ConfigError, match="num_fit_images=10 of 10"):
        score_baselines(images, inside, num_fit_images=10)
    with pytest.raises(DataError, match="float64"):
        score_baselines(images / 255, inside, num_fit_images=FIT)
    with pytest.raises(DataError, match=r"\(9, 24, 24\)"):
        score_baselines(images, inside[:9], num_fit_images=FIT)
