"""Files and output of the commands: in this process through `main(argv)`, by subprocess where a process matters."""

from __future__ import annotations

import json
import os
import runpy
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.data import draw_flowers, make_procedural_dataset
from factorkit.metrics.baselines import BASELINES
from factorkit.report.content import Verdict
from factorkit.segdiff.inference.outputs import output_names
from factorkit.segdiff.presets import PRESETS
from factorkit.segdiff.verdict import read_verdict

ROOT = Path(__file__).resolve().parents[2]


# --- segment ---


@pytest.mark.slow
def test_segment_writes_images_at_own_size(run, run_json, tmp_path):
    inputs, out = tmp_path / "in", tmp_path / "out"
    rng = np.random.default_rng(0)
    sizes = {"a/x.png": (30, 20), "b/x.png": (18, 40), "ünï.bmp": (16, 16), "x.jpg": (22, 22), "x.png": (9, 33)}
    for name, size in sizes.items():
        (inputs / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(inputs / name)
    (inputs / "broken.jpg").write_bytes((inputs / "x.jpg").read_bytes()[:300])

    result = run_json("segment", run, inputs, "--out", out, "-t", 10)
    assert result["segmented"] == 5 and list(result["skipped"]) == ["broken.jpg"]
    assert sum(result["areas"]) == pytest.approx(1)
    files = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    names = ("a/x", "b/x", "ünï", "x", "x.png")  # the second of two files of one stem is named with its suffix
    endings = ("labels", "mask_0", "mask_1", "overlay")
    assert files == {f"{name}_{ending}.png" for name in names for ending in endings} | {"overview.png"}

    labels, masks = Image.open(out / "a/x_labels.png"), [Image.open(out / f"a/x_mask_{k}.png") for k in (0, 1)]
    assert labels.mode == "P" and labels.size == masks[0].size == (30, 20)
    first, second = (np.asarray(mask).astype(int) for mask in masks)
    assert np.abs(first + second - 255).max() <= 1
    clear = np.abs(first - second) > 2
    assert (np.asarray(labels)[clear] == (second > first)[clear]).all()
    assert Image.open(out / "x.png_overlay.png").size == (9, 33)


@pytest.mark.slow
def test_segment_ignores_earlier_results(run, run_json, run_refused, photos, tmp_path):
    image = tmp_path / "photo.png"
    image.write_bytes((photos / "images/00.png").read_bytes())
    for _ in range(2):
        assert run_json("segment", run, tmp_path, "--out", tmp_path)["segmented"] == 1
    image.unlink()
    assert "results are not data" in run_refused("segment", run, tmp_path, "--out", tmp_path)


def test_output_names_are_distinct_and_below_output_folder():
    names = output_names(["x.jpg", "x.png", "X.tif", "x.jpg.png", "../../up.png", "/etc/root.png", "x.jpg"])
    assert len({name.casefold() for name in names}) == 7
    assert names[:2] == ["x", "x.png"] and names[4:6] == ["up", "etc/root"]


@pytest.mark.slow
def test_segment_zip_and_duplicate_paths(run, photos, run_json, tmp_path):
    images = sorted((photos / "images").iterdir())[:2]
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for image in images:
            archive.write(image, f"deep/{image.name}")
    assert run_json("segment", run, tmp_path / "images.zip", "--out", tmp_path / "a")["segmented"] == 2
    assert (tmp_path / "a/deep/00_labels.png").is_file()
    run_json("segment", run, images[0], images[0], "--out", tmp_path / "b")
    assert len(list((tmp_path / "b").glob("*_labels.png"))) == 2


@pytest.mark.slow
def test_overview_shows_only_first_images(run, photos, run_json, monkeypatch, tmp_path):
    monkeypatch.setattr("factorkit.segdiff.inference.folder.OVERVIEW_IMAGES", 2)
    run_json("segment", run, photos / "images", "--out", tmp_path)
    height = Image.open(tmp_path / "overview.png").height
    assert 2 * 120 <= height < 3 * 120


@pytest.mark.slow
def test_segment_unusable_input_is_refused(run, run_refused, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    out = ("--out", tmp_path / "out")
    assert "broken.png" in run_refused("segment", run, broken, *out)
    assert "nothing.jpg" in run_refused("segment", run, tmp_path / "nothing.jpg", *out)
    assert "t=1000" in run_refused("segment", run, run / "samples", *out, "-t", 1000)
    assert "PATHS" in run_refused("segment", run, *out)
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(b"0" * 100)
    assert "foreign" in run_refused("segment", foreign, broken, *out)


# --- generate, evaluate, prepare, demo, doctor ---


@pytest.mark.slow
def test_generate_writes_images_labels_and_masks(run, run_json, run_refused, tmp_path):
    command = ("generate", run, "-n", 3, "--steps", 2, "--seed", 5)
    result = run_json(*command, "--out", tmp_path / "a", "--trajectory")
    assert result["generated"] == 3 and Path(result["trajectory"]).is_file() and Path(result["overview"]).is_file()
    names = {path.name for path in (tmp_path / "a").glob("generated_*")}
    assert names == {f"generated_000{i}{end}.png" for i in range(3) for end in ("", "_labels", "_mask_0", "_mask_1")}
    run_json(*command, "--out", tmp_path / "b")
    run_json(*command[:-1], 6, "--out", tmp_path / "c")
    first, same, other = (np.asarray(Image.open(tmp_path / c / "generated_0002.png")) for c in "abc")
    assert first.shape == (16, 16, 3) and (first == same).all() and (first != other).any()
    assert "n=0" in run_refused("generate", run, "-n", 0, "--out", tmp_path)


@pytest.mark.slow
def test_plain_ddpm_generates_but_refuses_to_segment(photos, run_json, run_refused, tmp_path, flags):
    assert "scores" in run_json(*flags(regions=1, steps=1), "--data", photos, "--out", tmp_path / "plain")
    run_json("generate", tmp_path / "plain", "-n", 1, "--steps", 2, "--out", tmp_path / "out", "--trajectory")
    names = {path.name for path in (tmp_path / "out").glob("[!.]*")}
    assert names == {"generated_0000.png", "overview.png", "trajectory.png"}
    assert "regions=1" in run_refused("segment", tmp_path / "plain", photos / "images/00.png", "--out", tmp_path / "s")


@pytest.mark.slow
def test_evaluate_generation_beside_a_plain_ddpm(run, run_cli, run_json, run_refused, tmp_path, flags):
    for i, image in enumerate(draw_flowers(34, 16, seed=2)[0]):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "photos" / f"{i:02d}.png")
    for name, changes in (("plain", {"regions": 1}), ("large", {"regions": 1, "resolution": 20})):
        run_json(*flags(**changes, steps=2), "--data", tmp_path / "photos", "--out", tmp_path / name)
    command = ("evaluate", run, "--generation", "--images", tmp_path / "photos")
    code, out, err = run_cli(*command, "--ddpm", tmp_path / "plain")
    assert code == 0, err
    lines = out.splitlines()
    rows = ["drawn images", "plain DDPM  ", "other photos", "shuffled    "]
    assert [line[:12] for line in lines[1:5]] == rows and "not of equal compute" in out
    own, plain = (json.loads((folder / "generation.json").read_text()) for folder in (run, tmp_path / "plain"))
    assert f"{plain['frechet']:.3f}" in lines[2] and f"{own['frechet']:.3f}" in lines[1]
    assert plain["images"] == own["images"] == 17 and "mask_agreement" not in plain and own["mask_agreement"] > 0
    steps = [json.loads(line) for stage in ("", "stages/distil") for line in (run / stage / "log.jsonl").open()]
    assert own["training_seconds"] > sum(event["seconds"] for event in steps if event["event"] == "step") > 0
    assert own["grain"] > 0 and "fewer than 100" in out  # steps: noise of an untrained network, not judged
    assert "--ddpm" in run_cli(*command)[1]
    assert "regions=2" in run_refused(*command, "--ddpm", run)
    assert "20 and 16 pixels" in run_refused(*command, "--ddpm", tmp_path / "large")
    assert "--images" in run_refused("evaluate", run, "--generation")


@pytest.mark.slow
def test_evaluate_prints_table_and_stores_scores(run, photos, run_cli, run_json, run_refused):
    command = ("evaluate", run, "--images", photos / "images", "--masks", photos / "masks", "--num-fit-images", 20)
    code, out, _ = run_cli(*command, "--baselines")
    stored = json.loads((run / "scores.json").read_text())
    assert code == 0 and stored["scored"] == 4 and stored["fitted_on"] == 20
    rows = {line[:30].strip(): line[30:].split() for line in out.splitlines()}
    assert rows["model"] == [f"{stored[key]:.3f}" for key in ("acc", "iou", "dice")]
    names = [name.replace("_", " ") for name in BASELINES]
    assert [name for name in rows if name in names] == names
    assert rows["mean mask"] == [f"{stored['baselines']['mean_mask'][key]:.3f}" for key in ("acc", "iou", "dice")]
    result, stored = run_json(*command), json.loads((run / "scores.json").read_text())
    assert result | stored == result and set(result) - set(stored) == {"failures", "verdict", "status", "checks"}
    assert f"{result['verdict']}." in out.splitlines(), "the verdict follows the table"
    assert "num_fit_images=24" in run_refused(*command[:-1], 24)


@pytest.mark.slow
def test_evaluate_ignore_value_is_not_scored(run, photos, run_json, tmp_path):
    """If every object pixel is ignored, there is no foreground, and the all-foreground predictor scores 0."""
    for path in (photos / "masks").iterdir():
        Image.fromarray(np.where(np.asarray(Image.open(path)), 128, 0).astype(np.uint8)).save(tmp_path / path.name)
    command = (
        "evaluate",
        run,
        "--images",
        photos / "images",
        "--masks",
        tmp_path,
        "--num-fit-images",
        20,
        "--baselines",
    )
    assert run_json(*command, "--ignore", 128)["baselines"]["all_foreground"]["acc"] == 0
    assert run_json(*command)["baselines"]["all_foreground"]["acc"] > 0


@pytest.mark.slow
def test_prepare_fills_cache_that_training_reads(photos, run_json, run_cli, tmp_path, flags):
    (photos / "images" / "broken.png").write_bytes(b"not an image")
    try:
        result = run_json("prepare", photos, "--resolution", 16)
        assert list(result["skipped"]) == ["broken.png"] and result["images"] + result["held_out"] == 24
        entries = set(Path(os.environ["FACTORKIT_CACHE"]).rglob("images.npy"))
        assert Path(result["path"]) / "images.npy" in entries
        assert run_cli(*flags(steps=1), "--data", photos, "--out", tmp_path / "run")[0] == 0
        assert set(Path(os.environ["FACTORKIT_CACHE"]).rglob("images.npy")) == entries, (
            "training must not decode them again"
        )
    finally:
        (photos / "images" / "broken.png").unlink()


@pytest.mark.slow
def test_demo_exit_code_follows_the_verdict_of_the_run(run_cli, monkeypatch, tmp_path, small):
    monkeypatch.setitem(PRESETS, "demo", {**small, "masks": "network"})
    monkeypatch.setattr(
        "factorkit.segdiff.training_images.make_procedural_dataset", partial(make_procedural_dataset, train=16, test=8)
    )
    out = tmp_path / "demo"
    code, text, _ = run_cli("demo", "segdiff", "--out", out, "--seed", 3)
    assert code == 1 and "This run FAILED: Failed" in text and "centre disc" in text
    code, text, _ = run_cli("demo", "--out", out, "--seed", 3, "--json")
    result = json.loads(text)
    assert code == 1 and result["status"] == "bad" and result["verdict"] == read_verdict(out).headline
    assert {"mean_mask", "two_means_image"} <= set(result["scores"]["baselines"])
    assert {"acc", "dice", "seconds"} <= set(result) and Path(result["report"]).is_file()
    assert len(list((out / "segmented").glob("*_labels.png"))) == 8
    assert len(list((out / "generated").glob("*_labels.png"))) == 16
    good = Verdict("good", "The masks beat every baseline", ["IoU 0.500; baselines: none."])
    monkeypatch.setattr("factorkit.report.html.read_verdict", lambda folder, content: good)
    code, text, _ = run_cli("demo", "--out", out, "--seed", 3)
    assert code == 0 and "The masks beat every baseline." in text and "FAILED" not in text
    mixed = Verdict("mixed", "The masks follow content, but do not beat the best baseline, 2-means", [])
    monkeypatch.setattr("factorkit.report.html.read_verdict", lambda folder, content: mixed)
    code, text, _ = run_cli("demo", "--out", out, "--seed", 3)
    assert code == 0 and "do not beat the best baseline" in text and "FAILED" not in text


@pytest.mark.slow
def test_doctor_prints_report(run_cli, run_json):
    assert run_json("doctor")["torch"]["version"] == torch.__version__
    assert torch.__version__ in run_cli("doctor")[1]


# --- examples ---


def run_example(name: str, monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


@pytest.mark.slow
def test_examples_run(run, photos, monkeypatch, capsys, small):
    monkeypatch.setitem(PRESETS, "fast64", small)
    run_example("train_on_a_folder.py", monkeypatch, photos, "trained")
    assert "IoU 0." in capsys.readouterr().out
    run_example("segment_and_generate.py", monkeypatch, run, photos / "images/00.png")
    assert Image.open("region_1.png").mode == "RGBA" and Image.open("generated_3.png").size == (16, 16)
