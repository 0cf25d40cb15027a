"""benchmarks/samplers.py on tiny settings: every cell runs once, its cost is counted, and a table is written."""

from __future__ import annotations

import json
import sys

import pytest

import factorkit
from benchmarks import samplers
from tests.data.flower_folder import write_flowers

TINY = {
    "masks": "network",
    "resolution": 16,
    "regions": 2,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "norm_groups": 2,
    "steps": 1,
    "batch_size": 4,
    "sample_every": 0,
    "device": "cpu",
}


@pytest.mark.slow
def test_samplers_cells_run_once_and_appear_in_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FACTORKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("factorkit.segdiff.train.write_report", lambda folder: None)
    photos = write_flowers(tmp_path / "photos", 12, 16)
    factorkit.train_segdiff(photos, out=tmp_path / "run", preset="demo", progress=False, holdout=4, **TINY)

    def run_samplers(*words) -> str:
        out = ["--out", str(tmp_path / "results.json")]
        monkeypatch.setattr(sys, "argv", ["samplers", *map(str, words), *out])
        samplers.main()
        return capsys.readouterr().out

    words = ["tiny", "--run", tmp_path / "run", "--data", photos, "--images", 4, "--steps", 2, 1]
    output = run_samplers(*words, "--samplers", "ddim", "heun")
    results = json.loads((tmp_path / "results.json").read_text())
    cells = {(r["sampler"], r.get("steps")): r for r in results.values()}
    assert set(cells) == {("held-out images", None), ("ddim", 1), ("ddim", 2), ("heun", 1), ("heun", 2)}
    assert f"held-out images {cells['held-out images', None]['frechet']:.3f}" in output
    assert [cells["heun", n]["evaluations"] for n in (1, 2)] == [1, 3]
    # With one step both samplers return the estimate of the clean image, so their scores are equal.
    assert cells["ddim", 1]["frechet"] == pytest.approx(cells["heun", 1]["frechet"]) != cells["ddim", 2]["frechet"]
    assert "| sampler | 1 steps | 2 steps |" in output
    assert f"| heun | {cells['heun', 1]['frechet']:.3f} (1) | {cells['heun', 2]['frechet']:.3f} (3) |" in output

    first = (tmp_path / "results.json").read_text()
    assert run_samplers(*words, "--samplers", "ddim").count(": ") == 0  # No images are generated again.
    assert (tmp_path / "results.json").read_text() == first


def test_format_seeds_of_several_seeds_gives_mean_and_deviation():
    records = [{"frechet": value, "evaluations": 20} for value in (0.1, 0.2, 0.3)]
    assert samplers.format_seeds(records) == "0.200 ± 0.100 (20)"
    assert samplers.format_seeds(records[:1]) == "0.100 (20)" and samplers.format_seeds([]) == ""
