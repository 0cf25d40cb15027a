"""reproduce(..., regions=(2, 2)): tables of foreground and classes for a hierarchy."""

from __future__ import annotations

import numpy as np
import pytest

import factorkit
from factorkit.data.masks import LabelledImages
from factorkit.reproduce import segdiff_runs
from factorkit.reproduce.experiment import Setup
from factorkit.reproduce.experiments import class_segmentation
from factorkit.utils.errors import ConfigError

NESTED = {"regions": (2, 2), "norm_groups": 2}


@pytest.mark.slow
def test_foreground_of_hierarchy_equals_that_of_run(small, tmp_path):
    report = small("table2.1", rows=["ours, masks of the network"], **NESTED)
    run = factorkit.load(tmp_path / "runs" / "small-photos-ours-seed0", device="cpu")
    result = report.data["rows"][5]["cells"][0]["scores"]
    assert run.config.num_leaf_regions == 4 and run.scores["level"] == result["level"] == 2
    for key in ("acc", "iou", "dice"):
        assert result[key] == pytest.approx(run.scores[key])
        assert result[f"best_{key}"] == pytest.approx(run.scores[f"oracle_{key}"])
    small("fig2.18", rows=["ours, masks of the network, t = 0"], **NESTED)
    small("table2.6", rows=["ours, masks of the network"], **NESTED)
    with pytest.raises(ConfigError, match="one number of regions"):
        small("table2.6", rows=["concat"], **NESTED)
    assert len(list((tmp_path / "runs").glob("*/checkpoints"))) == 1


@pytest.mark.slow
def test_classes_of_hierarchy_are_scored(small):
    for name, row in (("table2.3", "ours, masks of the network"), ("table2.5", "ours, masks of the network")):
        (result,) = [one for one in small(name, rows=[row], **NESTED).data["rows"] if one["row"] == row]
        assert result["cells"] and 0 < result["cells"][0]["scores"].get("acc", 1) <= 1


def test_hierarchy_with_too_few_regions_gets_more_parts(monkeypatch, tmp_path):
    class Known:
        num_classes = 5

    monkeypatch.setattr(class_segmentation, "load_class_labels", lambda trainings: Known)

    def choose(**changes):
        setup = Setup("table2.3", None, "small", tmp_path, changes=changes)
        return class_segmentation.choose_our_regions(segdiff_runs.Trainings(setup, "ffhq64"))

    assert choose(regions=(2, 2)) == choose(regions=(2, 3)) == (2, 3)
    assert choose() == 5


def test_drawn_foreground_is_of_scored_level():
    """16 leaves of (4, 4): level 1 is scored, whose region 2 is the foreground."""
    truth = np.zeros((10, 8, 8), bool)
    truth[:, 2:5, 3:7] = True
    leaves = np.where(truth, 8, 3) + np.arange(8) % 4 * truth
    known = LabelledImages(
        np.zeros((10, 8, 8, 3), np.uint8), truth, np.ones_like(truth), [""] * 10, truth.astype(np.int32)
    )
    result = segdiff_runs.score_regions(segdiff_runs.HeldOutImages(None, known, 2), leaves, (4, 4))
    assert result.scores["iou"] == 1 and result.scores["level"] == 1
    assert np.array_equal(result.arrays["foreground"], truth[2:10])


def test_fig_2_16_refuses_other_regions(small, tmp_path):
    with pytest.raises(ConfigError, match="leave regions= out"):
        small("fig2.16", **NESTED)
    assert not (tmp_path / "runs").exists()
