"""What a training took, with its latents, and the plain DDPM that takes as long."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import save_file

import factorkit
from factorkit.data import draw_flowers
from factorkit.engine.checkpoint import write_checkpoint
from factorkit.engine.run_folder import sum_step_seconds
from factorkit.engine.run_log import RunLog
from factorkit.segdiff import equal_compute
from factorkit.segdiff.config import SegdiffConfig, preset_config
from factorkit.segdiff.equal_compute import REGION_SETTINGS, choose_plain_ddpm, find_changes
from factorkit.segdiff.latents import COPY_NAME, open_autoencoder, read_cost, read_training_seconds
from tests.engine.trained import assert_identical

PHOTOS = draw_flowers(34, 48, seed=0)[0]


@pytest.mark.slow
def test_training_seconds_of_latents_hold_the_encoding_and_the_autoencoder_trained_first(
    load_latent_run, latent_folder
):
    run = load_latent_run()
    scores = run.evaluate_generation(PHOTOS, steps=1)
    autoencoder, steps = sum_step_seconds(latent_folder.parent / "moved"), sum_step_seconds(run.folder)
    assert scores["autoencoder_seconds"] == autoencoder > 0 and scores["own_autoencoder"]
    assert scores["training_seconds"] == pytest.approx(steps + scores["encoding_seconds"] + autoencoder)
    assert scores["encoding_seconds"] > 0


@pytest.mark.slow
def test_training_seconds_leave_out_an_autoencoder_that_was_given_and_name_it(load_latent_run, tmp_path):
    first = load_latent_run()
    sizes = {"resolution": 48, "regions": 1, "model_channels": 8, "channel_mult": (1, 2), "norm_groups": 4}
    given = {"latent": str(first.folder / COPY_NAME), "out": tmp_path / "given", "steps": 1, "batch_size": 4}
    run = factorkit.train_segdiff(PHOTOS, preset="demo", device="cpu", progress=False, **sizes, **given)
    shutil.rmtree(first.folder)
    assert_identical(run.model.space.tensors(), first.model.space.tensors())
    scores = run.evaluate_generation(PHOTOS, steps=1)
    assert not scores["own_autoencoder"] and scores["autoencoder_seconds"] > 0
    assert scores["training_seconds"] == pytest.approx(sum_step_seconds(run.folder) + scores["encoding_seconds"])


@pytest.mark.slow
def test_open_autoencoder_reads_the_copy_of_a_run_but_no_exported_run(load_latent_run, tmp_path):
    run = load_latent_run()
    copy = open_autoencoder(run.folder / COPY_NAME)
    assert_identical(copy.state_dict(), run.model.space.autoencoder.state_dict())
    with pytest.raises(factorkit.utils.errors.CheckpointError, match="holds a 'segdiff' model"):
        open_autoencoder(run.save(tmp_path / "run.safetensors"))


def test_sum_step_seconds_counts_repeated_steps_once_and_every_folder(tmp_path):
    for name, steps in {"run": (1, 2, 2, 3), "stage": (1,)}.items():
        with RunLog(tmp_path / name) as log:
            for number, step in enumerate(steps):
                log.event("step", step=step, seconds=10**number)
            log.event("step", step=9, seconds="a long time")
    assert sum_step_seconds(tmp_path / "run") == 1101
    assert sum_step_seconds(tmp_path / "run", tmp_path / "stage", tmp_path / "none") == 1102


def test_seconds_of_an_autoencoder_that_are_not_stored_are_unknown(tmp_path):
    save_file({"encoder.conv_in.weight": torch.ones(1)}, tmp_path / "format.safetensors")
    assert read_training_seconds(tmp_path / "format.safetensors") is read_training_seconds(tmp_path) is None
    path = write_checkpoint(tmp_path / COPY_NAME, {"autoencoder.mean": torch.ones(1)}, {"model": "latents"})
    unknown = {"encoding_seconds": None, "autoencoder_seconds": None, "own_autoencoder": False}
    assert read_cost(path) == unknown  # of versions before
    write_checkpoint(
        path, {"autoencoder.mean": torch.ones(1)}, {"model": "latents", **unknown, "encoding_seconds": "1"}
    )
    assert read_cost(path) == unknown


@pytest.mark.parametrize(
    ("preset", "changes", "names"),
    [
        ("fast32", {"regions": 3, "resolution": 40}, set()),
        ("fast32", {"masks": "network", "cue_weight": 1.0, "foreground": (1,), "segment_t": 7}, set()),
        ("fast32", {"prediction": "flow", "seed": 3, "random_flip": False}, {"prediction", "seed", "random_flip"}),
        ("fast32", {"prediction": "flow", "schedule": "linear"}, {"prediction", "schedule"}),
        ("fast64", {"form": "thesis", "timesteps": 500, "t_max": 300}, {"form", "timesteps", "t_max"}),
        ("fast64", {"backbone": "uvit", "depth": 3}, {"backbone", "depth"}),
        ("rooms32", {"threads": None}, {"threads"}),
        (
            "demo",
            {"latent_channels": 4, "latent_factor": 4, "resolution": 48, "channel_mult": (1, 2)},
            {"channel_mult"},
        ),
    ],
)
def test_find_changes_are_those_beside_the_preset_and_lead_to_the_same_settings(preset, changes, names):
    config = preset_config(preset, **changes).resolved()
    plain, found = find_changes(config, preset)
    assert found.keys() == names and plain.regions == 1
    for name in vars(plain).keys() - REGION_SETTINGS - {"regions"}:
        assert getattr(plain, name) == getattr(config, name), name
    same = {name: getattr(config, name) for name in ("resolution", "latent_channels", "latent_factor")}
    again = preset_config(preset, regions=1, steps=config.steps, latent=config.latent, **same, **found)
    assert isinstance(again, SegdiffConfig) and again.resolved() == plain


@pytest.mark.slow
def test_choose_plain_ddpm_takes_as_long_as_the_steps_and_the_stages(load_latent_run, monkeypatch):
    run, timed = load_latent_run(), {1: 0.5, 2: 1.5}  # seconds an image
    monkeypatch.setattr(equal_compute, "time_image", lambda config, device: timed[config.regions])
    settings, seconds = choose_plain_ddpm(run, run.folder)
    assert (settings["steps"], seconds) == (3 * run.step, sum_step_seconds(run.folder))
    with RunLog(run.folder / "stages/distil") as log:
        log.event("step", step=1, seconds=seconds)
    settings, twice = choose_plain_ddpm(run, run.folder)
    assert (settings["steps"], twice) == (6 * run.step, pytest.approx(2 * seconds))
    assert settings["latent"] == str(run.folder / COPY_NAME) and settings["resolution"] == 48
    (run.folder / "log.jsonl").unlink()
    assert choose_plain_ddpm(run, run.folder) is None
