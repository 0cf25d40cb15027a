"""The benchmark of segmentation on a tiny network."""

from __future__ import annotations

import json
import sys
from functools import partial
from types import SimpleNamespace

import pytest

from benchmarks import segmentation
from benchmarks.segmentation import measure_step
from factorkit.data import make_procedural_dataset
from factorkit.segdiff.config import preset_config


@pytest.mark.slow
def test_segmentation_of_equal_processor_time_stores_steps_and_drawn_images(tmp_path, monkeypatch, capsys):
    small = partial(make_procedural_dataset, train=64, test=8)
    monkeypatch.setattr("factorkit.segdiff.training_images.make_procedural_dataset", small)
    monkeypatch.setattr(segmentation, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(segmentation, "DRAWN_IMAGES", 16)
    measured = []
    monkeypatch.setattr(segmentation, "measure_step", lambda config: measured.append(measure_step(config)) or 0.25)
    settings = ("resolution=20", "model_channels=8", "channel_mult=[1,2]", "norm_groups=4", 'masks="network"')
    words = ["segmentation", "tiny", "--set", *settings, "--processor-seconds", "1", "--seeds", "0"]
    words += ["--mask-size", "32", "--image-size", "10"]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "runs")])
    segmentation.main()
    ((key, record),) = json.loads((tmp_path / "results.json").read_text()).items()
    assert (
        0 < measured[0] < 5
        and "processor_seconds=1" in key
        and record["steps"] == 4
        and record["processor_seconds_used"] > 0
    )
    assert record["scores"]["size"] == 32 and "mask_size=32 image_size=10" in key
    assert record["drawn"]["images"] == 16 and record["drawn"]["grain"] > 0
    frechet = f"{record['drawn']['frechet']:.3f}".lstrip("0")
    assert f"| 4 | {frechet} |" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "latent"), [([], "no"), (["--latent", "autoencoder"], "autoencoder")])
def test_segmentation_many_pixels_are_denoised_unless_latent_is_given(tmp_path, monkeypatch, words, latent):
    def settle(preset, changes, folder, stored):
        return SimpleNamespace(config=preset_config(preset, **{**changes, "latent": "no"}))

    requested = []

    def train(data, **settings):
        requested.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr("factorkit.segdiff.settle.settle_latents", settle)
    monkeypatch.setattr("factorkit.train_segdiff", train)
    monkeypatch.setattr(segmentation, "RESULTS", tmp_path / "results.json")
    words = ["segmentation", "tiny", "--set", "resolution=128", "--seeds", "0", "--out", str(tmp_path), *words]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(KeyboardInterrupt):
        segmentation.main()
    assert requested[0]["latent"] == latent and requested[0]["resolution"] == 128
