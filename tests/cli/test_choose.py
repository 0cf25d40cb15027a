"""`factorkit choose-regions`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FLAGS = ("--candidates", 2, 3, "--seed-trials", 1, "--steps", 2, "--resolution", 16, "--device", "cpu")


@pytest.mark.slow
def test_choose_regions_prints_table_and_number(photos, ask, answer):
    found = answer("choose-regions", photos, "--out", "k", *FLAGS)
    assert found["regions"] in (2, 3) and set(found["errors"]) == {"2", "3"} and Path(found["image"]).exists()
    assert json.loads(Path("k/config.json").read_text())["random_flip"] is True
    answer("choose-regions", photos, "--out", "one_way", *FLAGS, "--no-random-flip")
    assert json.loads(Path("one_way/config.json").read_text())["random_flip"] is False
    code, said, _ = ask("choose-regions", photos, "--out", "k", *FLAGS, "--min-improvement", 0.9)
    assert code == 0 and "regions  2" in said and "to the next" in said.splitlines()[0]


def test_choose_regions_bad_options_are_refused(photos, refused):
    assert "two numbers" in refused("choose-regions", photos, "--out", "k", "--candidates", 3)
    assert "no masks" in refused("choose-regions", photos / "images", "--out", "k", "--holdout", 3)
