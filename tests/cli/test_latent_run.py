"""Commands on a run with latent="auto", whose autoencoder was trained first and is gone."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

import factorkit
from factorkit.cli import app, evaluate, score_tables
from factorkit.cli.main import main, parse
from factorkit.segdiff import equal_compute, settle
from factorkit.segdiff.app import segment_photos
from factorkit.segdiff.autoencoder import SETTINGS
from factorkit.segdiff.config import SegdiffConfig
from factorkit.segdiff.training_images import describe_data, load_data
from tests.data.flower_folder import write_flowers

SIZES = {"resolution": 48, "masks": "network", "steps": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """A data set of 40 drawn flowers of 48 pixels with masks."""
    return write_flowers(tmp_path_factory.mktemp("data") / "my flowers", 40, 48, seed=1)


@pytest.fixture(scope="module")
def latent_run(flowers, flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FACTORKIT_CACHE", str(folder.parent / "cache"))
        patch.setattr(settle, "MANY_PIXELS", 48)
        for name, value in {"steps": 3, "model_channels": 8, "batch_size": 2, "crop_size": 16, "log_every": 1}.items():
            patch.setitem(SETTINGS, name, value)
        data = ["--data", str(flowers), "--out", str(folder), "--holdout", "none"]
        assert main([*flags(**SIZES), *data]) == 0
    shutil.rmtree(folder.parent / "run_autoencoder")
    return folder


@pytest.mark.slow
def test_evaluate_generation_of_latents_beside_pixels_compares_at_one_scale(
    latent_run, flowers, run_cli, flags, tmp_path
):
    data = ("--data", flowers, "--holdout", "none", "--out", tmp_path / "pixels", "--latent", "no")
    assert run_cli(*flags(**SIZES | {"regions": 1}), *data)[0] == 0
    ddpm = ("--ddpm", tmp_path / "pixels")
    code, out, err = run_cli("evaluate", latent_run, "--generation", "--images", flowers / "images", *ddpm)
    assert code == 0, err
    own, plain = (json.loads((path / "generation.json").read_text()) for path in (latent_run, tmp_path / "pixels"))
    assert own["side"] == plain["side"] == 12 and own["frechet_photos"] == plain["frechet_photos"]
    assert "steps, compared at 12 px, averaged; Fr" in out
    own_line = r"images: training s with \d+ s for encoding the photos and with \d+ s for its autoencoder\n"
    assert re.search(own_line, out) and "DDPM: training s" not in out


@pytest.mark.slow
def test_evaluate_generation_prints_a_command_that_trains_the_plain_ddpm_of_the_same_latents(
    latent_run, flowers, run_cli
):
    command = ("evaluate", latent_run, "--generation", "--images", flowers / "images")
    plain_folder = latent_run.with_name("run_plain")
    _, out, err = run_cli(*command)
    advice, line = out[out.index("no plain DDPM") :].splitlines()[:2]
    words = shlex.split(line)
    assert words[0] == "factorkit" and advice.endswith(f"--ddpm {plain_folder}"), err
    code, _, err = run_cli(*words[1:])
    assert code == 0, err
    own, plain = (json.loads((folder / "config.json").read_text()) for folder in (latent_run, plain_folder))
    differing = {name for name in own if own[name] != plain[name]}
    assert differing >= {"regions", "latent"}
    assert differing <= {"regions", "latent", "steps"} | equal_compute.REGION_SETTINGS
    out = run_cli(*command, "--ddpm", plain_folder)[1]
    given = (
        r"plain DDPM: training s with \d+ s for encoding the photos and without \d+ s for its autoencoder, which was"
    )
    assert re.search(given, out)


def test_compute_of_latents_counts_every_autoencoder_and_names_what_is_unknown():
    def describe(**changes):
        part = {"images": 2, "side": 12, "resolution": 48, "sampler": "ddim", "steps": 2, "training_seconds": 100.0}
        part |= dict.fromkeys(("frechet", "grain", "precision", "recall", "frechet_photos", "frechet_noise"), 0.0)
        return part | dict.fromkeys(("photos_precision", "photos_recall"), 0.0) | changes

    own = {"encoding_seconds": 10.0, "autoencoder_seconds": 50.0, "own_autoencoder": True}
    given = {**own, "own_autoencoder": False, "training_seconds": 50.0}
    unknown = {"encoding_seconds": None, "autoencoder_seconds": None, "own_autoencoder": False}
    text = score_tables.format_generation(describe(**own, ddpm=describe(**given)))
    assert "drawn images: training s with 10 s for encoding the photos and with 50 s for its autoencoder\n" in text
    assert (
        "plain DDPM: training s with 10 s for encoding the photos and without 50 s for its autoencoder, which" in text
    )
    assert "not of equal compute" not in text
    text = score_tables.format_generation(describe(**own, ddpm=describe(**given | {"training_seconds": 150.0})))
    assert text.endswith("not of equal compute: the plain DDPM was trained 2 times as long, with the autoencoder")
    text = score_tables.format_generation(describe(**unknown, ddpm=describe(training_seconds=50.0)))
    assert "without an unknown time for encoding the photos and without an unknown time for its autoencoder" in text
    assert text.endswith("the plain DDPM was trained 0.5 times as long")
    advice = {"ddpm_command": "factorkit train", "ddpm_out": "plain", "ddpm_seconds": 1.0, "ddpm_data": "the photos a"}
    assert "\n    factorkit train\n    TRAINING_PHOTOS: the photos a" in score_tables.format_generation(
        describe(**advice)
    )
    assert "compared at 48 px; Fr" in score_tables.format_generation(describe(side=48))


@pytest.mark.parametrize(
    ("name", "trained", "images", "data"),
    [
        ("my photos", "my photos", "my photos/images", "my photos"),
        ("renamed", "my photos", "my photos", "my photos"),
        ("images", "other/images", "my photos/images", None),
        ("more photos", "more photos", "my photos", None),
        ("procedural flowers", None, "x", None),
    ],
)
def test_printed_command_is_read_as_the_settings(tmp_path, monkeypatch, name, trained, images, data):
    monkeypatch.setenv("FACTORKIT_CACHE", str(tmp_path / "cache"))
    for seed, (folder, count) in enumerate({"my photos": 9, "other": 9, "more photos": 12}.items()):
        write_flowers(tmp_path / folder, count, 16, seed=seed)
    stored = {"name": name}
    if trained:
        dataset, prepared, _ = load_data(tmp_path / trained, 16, "auto", None, False)
        stored |= describe_data(dataset, prepared) | {"name": name}
    config = SimpleNamespace(resolution=16, holdout="auto", mask_set=None)
    changes = {"channel_mult": (1, 2), "attention_resolutions": (), "random_flip": False, "tensorboard": True}
    changes |= {
        "preset": "fast64",
        "threads": None,
        "holdout": 3,
        "ema_decay": 0.5,
        "latent": "my run/copy",
        "regions": 1,
    }
    monkeypatch.setattr(equal_compute, "choose_plain_ddpm", lambda run, folder: (dict(changes), 12.5))
    (tmp_path / "config.json").write_text(json.dumps({"model": "segdiff", "data": stored}))
    advice = evaluate._advise_ddpm(SimpleNamespace(config=config), tmp_path, tmp_path / images)
    options = parse("train", shlex.split(advice["ddpm_command"])[2:])
    if trained and data is None:
        assert str(options.data) == "TRAINING_PHOTOS"
        assert advice["ddpm_data"] == f"the photos that the run was trained on, {name} ({stored['images']} images)"
    else:
        assert options.data == (None if data is None else tmp_path / data) and "ddpm_data" not in advice
    assert f"{options.out}" == advice["ddpm_out"] == f"{tmp_path}_plain" and advice["ddpm_seconds"] == 12.5
    assert {key: getattr(options, key) for key in changes} == {**changes, "holdout": "3"}
    assert isinstance(options, SegdiffConfig) and options.learning_rate == 1e-3  # the preset's


@pytest.mark.slow
def test_evaluate_masks_of_a_latent_run_scores_at_the_size_of_the_photos(latent_run, flowers, run_json):
    scores = run_json("evaluate", latent_run, "--images", flowers / "images", "--masks", flowers / "masks")
    assert scores["size"] == 48 and scores["scored"] == 24 and 0 <= scores["iou"] <= 1


@pytest.mark.slow
def test_exported_latent_run_evaluates_alone_as_its_folder(latent_run, flowers, run_json, tmp_path):
    run_json("checkpoint", "export", latent_run, "--out", tmp_path / "run.safetensors")
    command = ("--generation", "--images", flowers / "images", "--device", "cpu")
    folder, file = (run_json("evaluate", run, *command) for run in (latent_run, tmp_path / "run.safetensors"))
    assert folder["frechet"] == file["frechet"] and file["side"] == 12
    assert "training_seconds" in folder and "training_seconds" not in file and "ddpm_command" not in file


@pytest.mark.slow
def test_app_opens_a_latent_run_and_segments_photos_at_their_size(latent_run, flowers, run_json, tmp_path, monkeypatch):
    photo, pages = flowers / "images/00.png", []

    def build_page(gradio, run, folder, region, verdict):
        pages.append((segment_photos(run, [photo], tmp_path / "out", region), verdict))
        return SimpleNamespace(close=lambda verbose: None)

    def stop():
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))
    monkeypatch.setattr(app, "build_page", build_page)
    monkeypatch.setattr(app, "serve_page", lambda *arguments: "http://here")
    monkeypatch.setattr(app, "threading", SimpleNamespace(Event=lambda: SimpleNamespace(wait=stop)))
    assert run_json("app", latent_run, "--region", 1, "--device", "cpu")["url"] == "http://here"
    ((result, verdict),) = pages
    assert result.summary.startswith("1 photo segmented. Cut-outs: region 1.") and verdict.startswith("The run: ")
    mask = Image.open(next(path for path in result.files if path.name == "00_mask_1.png"))
    assert mask.size == (48, 48) and factorkit.load(latent_run, device="cpu").config.latent_factor == 4
