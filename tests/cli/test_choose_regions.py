"""`factorkit choose-regions`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FLAGS = ("--candidates", 2, 3, "--seed-trials", 1, "--steps", 2, "--resolution", 16, "--device", "cpu")


@pytest.mark.slow
def test_choose_regions_prints_table_and_number(photos, run_cli, run_json):
    result = run_json("choose-regions", photos, "--out", "k", *FLAGS)
    assert result["regions"] in (2, 3) and set(result["errors"]) == {"2", "3"} and Path(result["image"]).exists()
    assert json.loads(Path("k/config.json").read_text())["random_flip"] is True
    run_json("choose-regions", photos, "--out", "one_way", *FLAGS, "--no-random-flip")
    assert json.loads(Path("one_way/config.json").read_text())["random_flip"] is False
    code, output, _ = run_cli("choose-regions", photos, "--out", "k", *FLAGS, "--min-improvement", 0.9)
    assert code == 0 and "regions  2" in output and "to the next" in output.splitlines()[0]


def test_choose_regions_bad_options_are_refused(photos, run_refused):
    assert "two numbers" in run_refused("choose-regions", photos, "--out", "k", "--candidates", 3)
    assert "no masks" in run_refused("choose-regions", photos / "images", "--out", "k", "--holdout", 3)
