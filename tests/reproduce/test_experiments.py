"""Every experiment, tiny, end to end; its numbers are compared with an independent computation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import factorkit
from factorkit.reproduce import list_experiments
from factorkit.reproduce.experiment import SCALES, Setup
from factorkit.reproduce.experiments import generated_images
from factorkit.reproduce.segdiff_runs import Trainings
from factorkit.segdiff.config import preset_config

OURS = "ours, objects (the default)"
THESIS = "ours, the thesis' form"


def find_images(report) -> list[Path]:
    result = [report.folder / name for name in report.data["images"]]
    for path in result:
        with Image.open(path) as image:
            assert min(image.size) > 50
    return result


def read_means(report) -> dict[str, dict[str, float]]:
    """Return the means of the rows that were run."""
    return {row["row"]: row["mean"] for row in report.data["rows"] if row["cells"]}


def test_experiments_are_described_completely():
    names = list(list_experiments())
    assert names.index("table2.1") < names.index("table2.6") < names.index("table3.1") and "fig3.13" in names
    for name, experiment in list_experiments().items():
        assert experiment.name == name and set(experiment.duration) == set(SCALES) and experiment.data
        keys = {column.key for column in experiment.columns}
        assert all(set(cited.values) <= keys for cited in experiment.citations)
        assert all(cited.values or "no poses found" in cited.row for cited in experiment.citations), "no number"
        for scale in SCALES:
            rows = [row.name for row in experiment.rows(Setup(name, None, scale, Path("nowhere")))]
            assert rows and len(set(rows)) == len(rows)


def test_scales_have_documented_settings():
    def read_settings(scale, full="cub64"):
        return Trainings(Setup("table2.2", None, scale, Path("nowhere")), full).config()

    small, gpu, full = map(read_settings, SCALES)
    assert (small.resolution, small.model_channels, small.steps, small.form) == (32, 16, 800, "regional")
    assert (gpu.resolution, gpu.model_channels, gpu.num_res_blocks, gpu.form) == (64, 128, 3, "regional")
    assert (full.resolution, full.model_channels, full.batch_size, full.steps, full.form) == (
        64,
        128,
        128,
        50_000,
        "thesis",
    )
    assert full.regions == 3 and read_settings("full", "imagenet64").batch_size == 512


@pytest.mark.slow
def test_table_2_1_scores_equal_those_of_the_run(small, tmp_path):
    report = small("table2.1", seeds=2)
    result = read_means(report)
    run = factorkit.load(tmp_path / "runs" / "small-photos-ours-seed0", device="cpu")
    cells = {row["row"]: row["cells"] for row in report.data["rows"]}
    ours = cells[OURS]
    assert len(ours) == len(cells["ours, masks by mixture, K = 3"]) == 2
    for key in ("acc", "iou", "dice"):
        assert ours[0]["scores"][key] == pytest.approx(run.scores[key])
        assert ours[0]["scores"][f"best_{key}"] == pytest.approx(run.scores[f"oracle_{key}"])
    thesis = factorkit.load(tmp_path / "runs" / "small-photos-thesis-seed0", device="cpu")
    assert thesis.config.form == "thesis" and len(cells["ours, the thesis' form"]) == 1
    other = factorkit.load(tmp_path / "runs" / "small-photos-mixture-seed1", device="cpu").config
    assert (other.masks, other.regions) == ("mixture", 3)
    # The better polarity of a full mask is a full or an empty mask.
    every = result["all foreground"]
    assert every["best_iou"] == every["iou"] and every["acc"] < 0.5 < 1 - every["acc"]
    assert len(find_images(report)) == 1
    with np.load(report.folder / "cells" / "all_foreground-seed0.npz") as stored:
        assert stored["foreground"].all() and stored["foreground"].shape == (8, 16, 16)


@pytest.mark.slow
def test_tables_2_3_and_2_5_share_their_trainings(small, tmp_path):
    report = small("table2.3", rows=["supervised U-Net", "DatasetDDPM-unsup.", OURS])
    result = read_means(report)
    assert set(result) == {"supervised U-Net", "DatasetDDPM-unsup.", OURS} and len(find_images(report)) == 1
    assert all(0 < row["acc"] <= 1 and 0 < row["miou"] <= row["acc"] for row in result.values())
    before = {path.parent.name for path in (tmp_path / "runs").glob("*/config.json")}
    assert before == {f"small-photos-{label}-seed0" for label in ("supervised", "plain", "ours")}

    rows = ["plain DDPM, equal steps", "plain DDPM, equal compute", OURS]
    with pytest.warns(UserWarning, match="the FID needs the weights"):
        report = small("table2.5", rows=rows + [f"{row}: FID" for row in rows])
    after = {path.parent.name for path in (tmp_path / "runs").glob("*/config.json")}
    assert after - before == {"small-photos-plain-compute-seed0"}
    result = read_means(report)
    settings = json.loads((tmp_path / "runs" / "small-photos-plain-compute-seed0" / "config.json").read_text())
    assert settings["steps"] == result["plain DDPM, equal compute"]["steps"] > result[OURS]["steps"] == 2
    assert all(result[row]["frechet"] > 0 and 0 <= result[row]["consistency"] <= 1 for row in list(result)[:3])
    weights = [row for row in report.data["rows"] if row["row"].endswith(": FID")]
    not_run = [row["not_run"].get("0", "") for row in weights]
    assert sum("weights-inception" in reason for reason in not_run) == 3


@pytest.mark.slow
def test_table_2_6_changes_only_the_decoding(small, tmp_path):
    with pytest.warns(UserWarning, match="the FID needs the weights"):
        report = small("table2.6")
    rows = {"concat": "concat", "masked_mid": "masked_mid", "unshared": "unshared", "network": "masked_skips"}
    for label, decoding in rows.items():
        config = json.loads((tmp_path / "runs" / f"small-photos-{label}-seed0" / "config.json").read_text())
        assert config["decoding"] == decoding and config["form"] == "regional"
    assert all(
        {"iou", "frechet"} <= set(read_means(report)[row]) for row in ("concat", "w/o weight sharing", OURS, THESIS)
    )
    assert len(find_images(report)) == 1


@pytest.mark.slow
def test_figures_of_chapter_2_share_one_training(small, tmp_path):
    for name in ("fig2.9", "fig2.10", "fig2.12"):
        assert len(find_images(small(name))) == 1
    with pytest.warns(UserWarning, match="must have classes"):
        assert small("fig2.11").data["rows"][0]["not_run"]
    levels = [f"{OURS}, t = {t}" for t in range(0, 70, 10)]
    assert list(read_means(small("fig2.18", rows=levels))) == levels
    runs = [path.parent.name for path in (tmp_path / "runs").glob("*/checkpoints")]
    assert runs == ["small-photos-ours-seed0"]


@pytest.mark.slow
def test_table_3_1_and_ablations_share_trainings(scene, tmp_path):
    result = read_means(scene("table3.1"))
    assert result["supervised"]["rotation_median_deg"] < 1e-2 < result["NeRF--"]["rotation_median_deg"]
    assert all({"psnr", "ssim", "psnr_encoder"} <= set(row) for row in result.values())
    joint = result["ours, joint as in the thesis"]
    result = read_means(scene("fig3.10"))
    assert result["noise"] == joint, "the common baseline is trained once"
    assert result["no noise (autoencoder)"] != joint
    runs = {path.parent.name for path in (tmp_path / "runs").glob("*/config.json")}
    ends = ("poses=known", "poses=learned", "usual", "search=dictionary", "noise=False")
    assert runs == {f"small-procedural-{end}-seed0" for end in ends}
    for name in ("fig3.4", "fig3.6", "fig3.7", "fig3.8", "fig3.9"):
        assert find_images(scene(name))
    assert len(list((tmp_path / "runs").iterdir())) == len(runs)


def test_multiply_adds_equal_independent_count():
    """Independent count at 64 px, C = 128: 39.7 G for the plain DDPM, 123.7 G for three branches.

    The latter counts the skips' part of each shortcut once per branch.
    """
    counts = [generated_images.count_multiply_adds(preset_config("flowers64", regions=k).resolved()) for k in (1, 3)]
    assert np.array(counts) / 1e9 == pytest.approx([39.7, 123.7], rel=0.015)
