"""Objectives, classes and guidance from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from factorkit.data import draw_flowers


@pytest.fixture
def class_folders(tmp_path) -> Path:
    """Two folders, of three flowers each."""
    for kind, seed in (("iris", 1), ("rose", 2)):
        (tmp_path / "class_folders" / kind).mkdir(parents=True)
        for i, image in enumerate(draw_flowers(3, 16, seed)[0]):
            Image.fromarray(image).save(tmp_path / "class_folders" / kind / f"{i}.png")
    return tmp_path / "class_folders"


@pytest.mark.slow
def test_run_with_classes_trains_and_generates(class_folders, run_json, run_refused, flags, tmp_path):
    out = tmp_path / "run"
    settings = {"prediction": "flow", "loss_weighting": "min_snr", "label_dropout": 0.2}
    words = [*flags(**settings), "--data", class_folders, "--classes", "folders"]
    assert run_json(*words, "--out", out)["steps"] == 4
    config = json.loads((out / "config.json").read_text())
    assert (config["class_names"], config["schedule"]) == (["iris", "rose"], "flow")
    assert (config["loss_weighting"], config["label_dropout"]) == ("min_snr", 0.2)
    assert run_json(*words, "--out", out)["steps"] == 4  # the same command resumes

    run_cli = ["generate", out, "--steps", "2", "-n", "4"]
    result = run_json(*run_cli, "--out", tmp_path / "all", "--classes", "all", "--guidance", "2", "--sampler", "heun")
    assert result["classes"] == ["iris", "rose", "iris", "rose"]
    result = run_json(*run_cli, "--out", tmp_path / "two", "--classes", "rose", "iris", "--sampler", "dpm++")
    assert result["classes"][:2] == ["rose", "iris"]
    assert Image.open(result["overview"]).height > 2 * 90
    assert "classes" not in run_json(*run_cli, "--out", tmp_path / "any")
    assert "'rosee'" in run_refused(*run_cli, "--out", tmp_path / "x", "--classes", "rosee")
    assert "needs classes=" in run_refused(*run_cli, "--out", tmp_path / "x", "--guidance", "3")


@pytest.mark.slow
def test_dry_run_reads_file_of_classes(class_folders, run_json, run_refused, flags, tmp_path):
    table = tmp_path / "classes.csv"
    table.write_text(
        "".join(
            f"{p.relative_to(class_folders)},{'odd' if int(p.stem) % 2 else 'even'}\n"
            for p in sorted(class_folders.rglob("*.png"))
        )
    )
    words = [*flags(), "--data", class_folders, "--dry-run"]
    assert run_json(*words, "--classes", table)["parameters"] == run_json(*words)["parameters"] + 3 * 32
    table.write_text("iris/0.png,even\n")
    assert "missing from its names" in run_refused(*words, "--classes", table)
    assert "have no folders" in run_refused(*flags(), "--classes", "folders")  # the procedural flowers have none


def test_train_impossible_combination_is_refused(photos, run_refused, flags):
    output = run_refused(*flags(prediction="eps", schedule="flow"), "--data", photos)
    assert "pure noise" in output
