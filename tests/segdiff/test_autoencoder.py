"""Training an autoencoder: its round trip, exact resume, files and errors."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest

import factorkit
from factorkit.cli.main import main
from factorkit.data import draw_flowers
from factorkit.segdiff.autoencoder import AutoencoderConfig, AutoencoderTask, check_round_trip
from factorkit.utils.errors import CheckpointError, ConfigError, DataError
from factorkit.utils.files import read_log, timeline
from tests.engine.trained import assert_identical, final_state

TINY = {"resolution": 16, "model_channels": 8, "steps": 3, "progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def images():
    return draw_flowers(24, 16, seed=0)[0]


@pytest.mark.slow
def test_train_autoencoder_resumed_is_bit_identical_and_other_settings_raise(tmp_path, images):
    factorkit.train_autoencoder(images, out=tmp_path / "whole", **TINY)
    factorkit.train_autoencoder(images, out=tmp_path / "parts", **{**TINY, "steps": 1})
    run = factorkit.train_autoencoder(images, out=tmp_path / "parts", **TINY)
    assert_identical(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))
    with pytest.raises(CheckpointError, match=r"latent_channels: 4 there, 2 requested"):
        factorkit.train_autoencoder(images, out=tmp_path / "parts", latent_channels=2, **TINY)
    saved = factorkit.load(run.save(tmp_path / "autoencoder.safetensors"), device="cpu")
    assert_identical(saved.model.state_dict(), run.model.state_dict())
    assert saved.reconstruct(images[:2]).equal(run.reconstruct(images[:2]))
    assert (tmp_path / "parts/report.html").exists()
    names = sorted(path.name for path in (tmp_path / "parts/samples").iterdir())
    assert names == ["000001_round_trip.png", "000003_round_trip.png"]


@pytest.mark.slow
def test_train_autoencoder_round_trip_of_photos_kept_out_improves(tmp_path, images):
    settings = {**TINY, "latent_channels": 2, "steps": 60, "sample_every": 20}  # too few channels for shortcuts
    factorkit.train_autoencoder(images, out=tmp_path / "run", **settings)
    first, _, last = timeline(read_log(tmp_path / "run"), "alarms")
    assert last["psnr"] > first["psnr"] + 2


def test_check_round_trip_of_a_small_copy_of_the_photo_fails():
    assert check_round_trip(24.0, 22.0, 500).status == "passed"
    assert check_round_trip(44.0, 45.0, 500).status == "passed"  # smooth images
    for decibels in (20.0, 22.5):
        check = check_round_trip(decibels, 22.0, 500)
        assert check.status == "failed" and f"{decibels} dB, less than 23.0" in check.failures[0]
    assert check_round_trip(20.0, 22.0, 5).status == "not run"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"downsample": 3}, r"downsample=3 must be one of 4, 8"),
        ({"resolution": 18}, r"resolution=18 must be divisible by downsample=4 .* use resolution=16"),
        ({"resolution": 4}, r"resolution=4 must be .* use resolution=8"),
        ({"crop_size": 10}, r"crop_size=10 must be divisible by downsample=4"),
        ({"model_channels": 12}, r"model_channels=12 must be divisible by norm_groups=8"),
        ({"latent_channels": 0}, r"latent_channels=0 must be at least 1"),
        ({"kl_weight": -1.0}, r"kl_weight=-1.0 must be a finite weight"),
    ],
)
def test_train_autoencoder_impossible_setting_raises(tmp_path, images, changes, message):
    with pytest.raises(ConfigError, match=message):
        factorkit.train_autoencoder(images, out=tmp_path / "run", **{**TINY, **changes})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("downsample", [4, 8])
def test_config_sizes_of_both_factors_have_two_levels(downsample):
    sizes = AutoencoderConfig(downsample=downsample).sizes
    assert sizes.downsample == downsample and (sizes.encoder_channels, sizes.channels) == ((8, 16), (32, 64))


def test_config_sizes_of_few_channels_leave_the_encoder_whole_groups():
    sizes = AutoencoderConfig(model_channels=8, norm_groups=8).sizes
    assert sizes.encoder_channels == (8, 16) and AutoencoderConfig(model_channels=64).sizes.encoder_channels == (16, 32)


@pytest.mark.slow
def test_train_autoencoder_interrupted_resumes_bit_identically(tmp_path, images, monkeypatch):
    factorkit.train_autoencoder(images, out=tmp_path / "whole", **TINY)
    loss, settings = AutoencoderTask.loss, {**TINY, "checkpoint_every": 100}

    def interrupt(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return loss(self, *arguments)

    monkeypatch.setattr(AutoencoderTask, "loss", interrupt)
    with pytest.raises(KeyboardInterrupt):
        factorkit.train_autoencoder(images, out=tmp_path / "parts", **settings)
    monkeypatch.setattr(AutoencoderTask, "loss", loss)
    assert len(list((tmp_path / "parts/checkpoints").glob("*.safetensors"))) == 1
    factorkit.train_autoencoder(images, out=tmp_path / "parts", **settings)
    assert_identical(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))


def test_train_autoencoder_too_few_images_raise(tmp_path, images):
    with pytest.raises(DataError, match="7 images: too few"):
        factorkit.train_autoencoder(images[:7], out=tmp_path / "run", **TINY)


@pytest.mark.slow
def test_commands_train_an_autoencoder_and_refuse_it_as_segdiff(tmp_path, images, capsys):
    np.save(tmp_path / "images.npy", images)
    options = ["--resolution", "16", "--model-channels", "8", "--steps", "2", "--device", "cpu", "--json"]
    run = tmp_path / "run"
    assert main(["train", "autoencoder", "--dry-run", "--out", str(run), *options]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] > 0 and not run.exists()
    assert main(["train", "autoencoder", "--data", str(tmp_path / "images.npy"), "--out", str(run), *options]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2
    assert main(["segment", str(run), str(tmp_path / "images.npy"), "--out", str(tmp_path / "out")]) == 2
    assert "holds a 'autoencoder' model, not segdiff" in capsys.readouterr().err
    assert main(["checkpoint", "export", str(run), "--out", str(tmp_path / "small.safetensors")]) == 0
    assert factorkit.load(tmp_path / "small.safetensors", device="cpu").step == 2
