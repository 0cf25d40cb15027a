"""What settings leave open: latents of an autoencoder that is trained first, by the photo's size and the run's past."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

import factorkit
from factorkit.cli.base import format_duration
from factorkit.cli.main import main
from factorkit.data import draw_flowers
from factorkit.segdiff import settle
from factorkit.segdiff import train as training
from factorkit.segdiff.autoencoder import SETTINGS, AutoencoderConfig, AutoencoderTask
from factorkit.segdiff.config import preset_config
from factorkit.segdiff.object_stages import ObjectStages
from factorkit.segdiff.settle import add_autoencoder, settle_latents
from factorkit.utils import distributed
from factorkit.utils.errors import CheckpointError, ConfigError
from factorkit.utils.files import read_log, timeline
from tests.engine.trained import assert_identical, final_state

SIDE = 48
RUN = {
    **{"preset": "demo", "resolution": SIDE, "regions": 2, "masks": "network", "model_channels": 8},
    **{"channel_mult": (1, 2), "norm_groups": 4, "batch_size": 4, "steps": 1, "device": "cpu"},
}
LINE = "latents, many times faster than pixels. Their autoencoder is trained on these images first, for 3 steps, in "


@pytest.fixture(scope="module")
def images():
    return draw_flowers(12, SIDE, seed=0)[0]


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    """Make photos of 48 pixels many, and autoencoders small."""
    monkeypatch.setattr(settle, "MANY_PIXELS", SIDE)
    for name, value in {"steps": 3, "model_channels": 8, "batch_size": 2, "crop_size": 16}.items():
        monkeypatch.setitem(SETTINGS, name, value)


def train(images, folder, **changes):
    return factorkit.train_segdiff(images, out=folder / "run", **{**RUN, **changes})


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.slow
def test_train_many_pixels_trains_an_autoencoder_first_and_denoises_its_latents(tmp_path, images, capsys):
    run, own = train(images, tmp_path, seed_trials=2, seed=5), tmp_path / "run_autoencoder"
    assert f'resolution={SIDE}: the model denoises {LINE}{own}; latent="no" denoises' in capsys.readouterr().err
    assert run.config.latent == settings_of(tmp_path / "run")["latent"] == str(own)
    assert (run.config.latent_factor, run.config.latent_channels, run.config.side) == (4, 4, SIDE // 4)
    assert run.generate(2, steps=2).images.shape == (2, 3, SIDE, SIDE)
    autoencoder = factorkit.load(own, device="cpu")
    assert (autoencoder.step, autoencoder.config.resolution, autoencoder.config.seed) == (3, SIDE, 5)
    assert_identical(run.model.space.autoencoder.state_dict(), autoencoder.model.state_dict())
    shutil.rmtree(own)  # the run has a copy
    assert train(images, tmp_path, seed_trials=2, seed=5, steps=2).step == 2
    assert not own.exists() and "denoises latents" not in capsys.readouterr().err


@pytest.mark.slow
def test_train_latent_no_stays_on_pixels_and_resumes_on_them_by_default(tmp_path, images, capsys):
    run, line = train(images, tmp_path, latent="no"), f'latent="no": {tmp_path / "run"} was started with it'
    assert run.config.latent == "no" and run.config.latent_channels == 0
    assert "latent" not in capsys.readouterr().err
    assert train(images, tmp_path, steps=2).step == 2 and line in capsys.readouterr().err
    stored = settings_of(tmp_path / "run")
    earlier = {**stored, "latent": None}, {k: v for k, v in stored.items() if not k.startswith("latent")}
    for steps, settings in enumerate(earlier, 3):  # of versions before
        (tmp_path / "run/config.json").write_text(json.dumps(settings))
        assert train(images, tmp_path, steps=steps).step == steps and line in capsys.readouterr().err
        assert factorkit.load(tmp_path / "run", device="cpu").config.latent == "no"
    assert not (tmp_path / "run_autoencoder").exists()


@pytest.mark.slow
def test_train_interrupted_in_the_autoencoder_resumes_exactly_by_the_same_command(
    tmp_path, images, monkeypatch, capsys
):
    np.save(tmp_path / "images.npy", images)
    words = ["train", "segdiff", "--data", str(tmp_path / "images.npy"), "--preset", "demo", "--device", "cpu"]
    words += [
        "--resolution",
        str(SIDE),
        "--regions",
        "2",
        "--masks",
        "network",
        "--model-channels",
        "8",
        "--steps",
        "1",
    ]
    words += ["--batch-size", "4", "--channel-mult", "1", "2", "--norm-groups", "4", "--out"]
    assert main([*words, str(tmp_path / "whole")]) == 0
    loss = AutoencoderTask.loss

    def interrupt(self, indices, draw, step, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return loss(self, indices, draw, step, *arguments)

    monkeypatch.setattr(AutoencoderTask, "loss", interrupt)
    capsys.readouterr()
    assert main([*words, str(tmp_path / "parts")]) == 130
    assert f"a checkpoint is saved in {tmp_path / 'parts_autoencoder'}; the same" in capsys.readouterr().err
    assert not (tmp_path / "parts").exists()
    monkeypatch.setattr(AutoencoderTask, "loss", loss)
    assert main([*words, str(tmp_path / "parts")]) == 0
    assert "goes on from step 1 of 3; latent" in capsys.readouterr().err
    for name in ("_autoencoder", ""):
        assert_identical(final_state(tmp_path / f"parts{name}"), final_state(tmp_path / f"whole{name}"))
    events = read_log(tmp_path / "parts_autoencoder")
    assert [event["step"] for event in timeline(events, "resume")] == [1]


@pytest.mark.slow
def test_train_without_progress_logs_once_what_it_denoises_and_why(tmp_path, images, capsys):
    for steps in (1, 2):
        train(images, tmp_path, progress=False, seed_trials=2, steps=steps)
        logged = [event["message"] for event in read_log(tmp_path / "run") if event["event"] == "latents"]
        assert len(logged) == 1 and f"denoises {LINE}{tmp_path / 'run_autoencoder'}; " in logged[0]
    assert "trained on these images first, for 3 steps" in (tmp_path / "run/report.html").read_text()
    assert "denoises" not in capsys.readouterr().err


@pytest.mark.slow
def test_train_interrupted_in_the_stages_goes_on_under_another_name_without_its_autoencoder(
    tmp_path, images, monkeypatch
):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    settings = {"masks": None, "regions": None, "mixture_steps": 2, "distil_steps": 2}
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(ObjectStages, "choose_regions", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(images, Path(), **settings)
    (tmp_path / "run").rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "run_autoencoder")
    assert factorkit.train_segdiff(images, out=tmp_path / "moved", **{**RUN, **settings}).step == 1
    assert not (tmp_path / "moved_autoencoder").exists()


@pytest.mark.slow
def test_train_interrupted_while_photos_are_encoded_leaves_no_run(tmp_path, images, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "encode_images", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(images, tmp_path)
    assert (tmp_path / "run_autoencoder").exists() and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_train_finished_autoencoder_is_used_again_and_another_is_refused(tmp_path, images, capsys):
    train(images, tmp_path)
    state = final_state(tmp_path / "run_autoencoder")
    shutil.rmtree(tmp_path / "run")
    train(images, tmp_path)
    assert (
        f"autoencoder in {tmp_path / 'run_autoencoder'} is finished, and used again for the same images; "
        in capsys.readouterr().err
    )
    assert_identical(final_state(tmp_path / "run_autoencoder"), state)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(CheckpointError, match="run_autoencoder holds a run with other data"):
        train(images[::-1].copy(), tmp_path)
    assert not (tmp_path / "run").exists()


def test_train_in_a_folder_that_is_refused_trains_no_autoencoder(tmp_path, images):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").touch()
    with pytest.raises(CheckpointError, match="exists and is not a factorkit run"):
        train(images, tmp_path)
    assert not (tmp_path / "run_autoencoder").exists()


@pytest.mark.slow
def test_train_few_photos_stay_on_pixels_with_a_line(tmp_path, images, capsys):
    assert train(images[:7], tmp_path).config.latent == "no"
    line = 'latent="no": 7 images, and an autoencoder takes 8'
    assert line in capsys.readouterr().err and line in (tmp_path / "run/log.jsonl").read_text().replace('\\"', '"')
    assert not (tmp_path / "run_autoencoder").exists()


@pytest.mark.slow
def test_train_started_in_latents_of_a_given_autoencoder_resumes_in_them(tmp_path, images, monkeypatch, capsys):
    given = tmp_path / "given"
    factorkit.train_autoencoder(images, out=given, resolution=SIDE, device="cpu", progress=False)
    train(images, tmp_path, latent=given)
    for steps, limit in ((2, SIDE), (3, 1000)):  # whether latents would be the default or not
        monkeypatch.setattr(settle, "MANY_PIXELS", limit)
        run = train(images, tmp_path, steps=steps)
        assert run.config.latent == str(given) and f'latent="{given}": {tmp_path}' in capsys.readouterr().err
    assert not (tmp_path / "run_autoencoder").exists()


def write_autoencoder(folder, step, **changes):
    """Write what a training of the run's own autoencoder leaves, without its weights."""
    config = AutoencoderConfig.from_dict(add_autoencoder(preset_config("demo", resolution=SIDE, device="cpu"))[0])
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model": "autoencoder", **config.to_dict(), **changes}))
    (folder / f"checkpoints/step_{step:08d}.safetensors").touch()
    return folder


def settle_new(preset, folder, **changes):
    return settle_latents(preset, {"resolution": SIDE, **changes}, folder, {})


@pytest.mark.parametrize(
    ("preset", "changes", "line"),
    [
        ("demo", {"resolution": SIDE - 4}, ""),
        ("demo", {"form": "thesis"}, ""),
        ("flowers64", {}, ""),
        ("fast64", {}, 'preset="fast64" is a network for pixels. A step on latents is many times faster: `factorkit'),
        ("demo", {"masks": "mixture"}, 'masks="mixture" is for pixels'),
        ("demo", {"regions": (3, 2)}, "regions=(3, 2) was measured on pixels alone; latent="),
    ],
)
def test_settle_latents_what_latents_do_not_suit_stays_on_pixels(tmp_path, preset, changes, line):
    settled = settle_new(preset, tmp_path, **changes)
    assert settled.config.latent == "no" and settled.config.latent_channels == 0 and not settled.training
    assert settled.note.startswith(f'latent="no": {line}' if line else "") and bool(line) == bool(settled.note)


@pytest.mark.parametrize(
    ("preset", "levels", "resolution", "sizes", "pixels"),
    [
        *(("fast64", 4, 130, (128, 160), 128), ("fast64", 4, 250, (224, 256), 248)),
        *(("fast64", 4, 1000, (960, 1024), None), ("uvit64", None, 1000, (992, 1024), None)),
        *(("fast64", 7, 140, (512,), 128), ("fast64", 7, 128, (512,), None), ("fast64", 8, 130, (), 128)),
    ],
)
def test_settle_latents_resolution_that_they_do_not_suit_raises_with_advice_that_works(
    tmp_path, monkeypatch, preset, levels, resolution, sizes, pixels
):
    monkeypatch.setattr(settle, "MANY_PIXELS", 128)
    changes = {"channel_mult": (1,) * levels} if levels else {}
    listed = " or ".join(f"resolution={size}" for size in sizes) + ", or " * bool(sizes)
    slow = f"resolution={pixels} with " * bool(pixels) + 'latent="no" to denoise pixels, which takes many times longer$'
    with pytest.raises(ConfigError, match=f"^resolution={resolution} does not suit .*; use {listed}{slow}"):
        settle_new(preset, tmp_path, resolution=resolution, **changes)
    for size in sizes:
        assert settle_new(preset, tmp_path, resolution=size, **changes).config.resolved().latent_channels
    assert settle_new(preset, tmp_path, resolution=pixels or resolution, latent="no", **changes).config.resolved()
    settled = settle_latents(preset, {"resolution": resolution}, tmp_path, {"latent": "no"})  # started on pixels
    assert settled.config.latent == "no" and "was started with it" in settled.note


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": 0}, "^threads=0 must be an integer of at least 1$"),
        ({"precision": "fp16x"}, "^precision='fp16x' is unknown"),
        ({"channel_mult": (1, 0)}, r"^channel_mult=\(1, 0\) must be"),
        ({"channel_mult": (1,) * 5}, r"use resolution=64, or latent=\"no\""),
        ({"channel_mult": (1,) * 10, "resolution": 512}, r'nor does any within 512 pixels of it; use latent="no" to'),
        ({"latent": ""}, 'latent=\'\' names nothing; give "auto", "no" or'),
    ],
)
def test_settle_latents_settings_that_cannot_work_raise(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        settle_new("demo", tmp_path, **changes)


@pytest.mark.parametrize(
    ("step", "trained", "state"),
    [
        (2, 2, "autoencoder in {} goes on from step 2 of 3; latent"),
        (3, 3, "autoencoder in {} is finished, and used again for the same images; latent"),
    ],
)
def test_settle_latents_note_says_how_far_the_autoencoder_is(tmp_path, step, trained, state):
    own = write_autoencoder(tmp_path / "run_autoencoder", step)
    settled = settle_new("demo", tmp_path / "run")
    assert settled.trained_steps == trained and state.format(own) in settled.note
    assert settled.for_images(8) is settled


@pytest.mark.parametrize(
    ("changes", "step", "error"),
    [
        ({"seed": 3}, 3, r"run_autoencoder holds a run with other settings \(seed: 3 there, 0 requested\)"),
        ({"resolution": 64}, 2, r"holds a run with other settings \(resolution: 64 there, 48 requested\)"),
        (
            {"data": {"name": "a", "images": 9}},
            3,
            r"holds a run with other data \(data.images: 9 there, 12 requested\)",
        ),
        ({"model": "segdiff"}, 3, "run_autoencoder holds a run of segdiff, not of autoencoder"),
        ({}, 4, "run_autoencoder has 4 steps already, more than steps=3"),
    ],
)
def test_for_images_autoencoder_of_other_settings_or_images_is_refused(tmp_path, changes, step, error):
    stored = {"data": {"name": "b", "images": 12}, **changes}
    write_autoencoder(tmp_path / "run_autoencoder", step, **stored)
    settled = settle_new("demo", tmp_path / "run")
    assert settled.for_images(7).config.latent == "no"  # which needs none
    with pytest.raises((CheckpointError, ConfigError), match=error):
        settled.for_images(12, {"name": "c", "images": 12})
    if "data" in changes:
        assert settled.for_images(12) is settled


@pytest.mark.parametrize(("side", "factor", "channels"), [(48, 4, 4), (240, 4, 4), (256, 8, 8), (512, 8, 8)])
def test_settle_latents_autoencoder_of_very_many_pixels_is_8_times_smaller(tmp_path, side, factor, channels):
    settled = settle_new("demo", tmp_path / "run", resolution=side, seed=3, holdout=2)
    assert settled.config.latent == str(tmp_path / "run_autoencoder")
    sizes = {"resolution": side, "downsample": factor, "latent_channels": channels, "seed": 3, "holdout": 2}
    assert settled.training.items() >= sizes.items()
    assert settled.config.resolved().side == side // factor


def test_settle_latents_batch_of_the_autoencoder_suits_the_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "run_on_first", lambda work: work())
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    assert settle_new("demo", tmp_path).training["batch_size"] == 3


def test_train_own_autoencoder_names_its_alarm(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(settle, "train_autoencoder", lambda *arguments, **options: None)
    monkeypatch.setattr(settle, "open_autoencoder", lambda folder: folder)
    monkeypatch.setattr(settle, "judged_alarms", lambda log: (None, ["round trip: 20 dB"]))
    assert settle.train_own_autoencoder(None, tmp_path, {}, False) == tmp_path
    assert capsys.readouterr().err == "autoencoder: round trip: 20 dB\n"


@pytest.mark.slow
def test_command_dry_run_names_pixels_or_latents(tmp_path, images, capsys, monkeypatch):
    np.save(tmp_path / "images.npy", images[:9])
    np.save(tmp_path / "few.npy", images[:7])
    words = ["train", "segdiff", "--preset", "demo", "--resolution", str(SIDE), "--masks", "network", "--device", "cpu"]
    words += ["--model-channels", "8", "--dry-run", "--out", str(tmp_path / "run"), "--data"]
    assert main([*words, str(tmp_path / "images.npy")]) == 0
    out = capsys.readouterr().out
    assert f"{LINE}{tmp_path / 'run_autoencoder'}" in out and "for the autoencoder first" in out
    checkpoints = tmp_path / "run_autoencoder/checkpoints"
    for step, state in ((2, "goes on from step 2 of 3"), (3, "is finished, and used again for the same images")):
        shutil.rmtree(checkpoints.parent, ignore_errors=True)
        write_autoencoder(checkpoints.parent, step)
        monkeypatch.setattr(training, "estimate_autoencoder", lambda **settings: {"seconds": 6000.0})
        assert main([*words, str(tmp_path / "images.npy")]) == 0
        out = capsys.readouterr().out
        assert f"{checkpoints.parent} {state}; " in out and ("first" in out) == (step == 2)
        assert step == 3 or f"of which {format_duration(2000)} for the autoencoder first" in out
    assert main([*words, str(tmp_path / "images.npy"), "--seed", "3"]) == 2
    assert "holds a run with other settings (seed: 0 there, 3 requested)" in capsys.readouterr().err
    shutil.rmtree(checkpoints.parent)
    assert main([*words, str(tmp_path / "few.npy")]) == 0
    assert "7 images, and an autoencoder takes 8" in capsys.readouterr().out
    assert main([*words, str(tmp_path / "images.npy"), "--latent", "no"]) == 0
    assert "latents" not in capsys.readouterr().out
    assert not list(tmp_path.glob("run*"))
