"""The commands of `edit`: what they write and print, and which errors they report."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from factorkit.segdiff.editing import editor
from factorkit.segdiff.editing.recompose import recompose_images


def read_image(path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.mark.slow
def test_interpolate_writes_frames_and_labels(run, photos, run_json, run_cli, tmp_path):
    first, second = photos / "images/00.png", photos / "images/01.png"
    words = ("interpolate", run, first, second, "--frames", 3, "--steps", 2)
    result = run_json(*words, "--out", tmp_path / "a")
    assert (result["pairs"], result["frames"]) == (1, 3)
    names = {path.name for path in (tmp_path / "a").glob("[!.]*")}
    assert names == {f"pair_0000_0{i}{end}.png" for i in range(3) for end in ("", "_labels")} | {"overview.png"}
    assert read_image(tmp_path / "a/pair_0000_01.png").shape == (16, 16, 3)
    assert Image.open(tmp_path / "a/pair_0000_01_labels.png").mode == "P"
    run_json(*words, "--out", tmp_path / "b")
    run_json(*words[:-1], 6, "--out", tmp_path / "c")
    middle = [read_image(tmp_path / f"{c}/pair_0000_01.png") for c in "abc"]
    assert (middle[0] == middle[1]).all() and (middle[0] != middle[2]).any()
    code, out, _ = run_cli(*words, "--out", tmp_path / "a")
    assert code == 0 and "1 done" in out and str(tmp_path / "a/overview.png") in out


@pytest.mark.slow
def test_branches_have_masks_as_transparency(run, photos, run_json, tmp_path):
    result = run_json("branches", run, photos / "images", "--out", tmp_path, "-t", 100)
    assert (result["images"], result["regions"]) == (24, 2) and sum(result["areas"]) == pytest.approx(1)
    first, second = (read_image(tmp_path / f"03_branch_{k}.png") for k in (0, 1))
    assert first.shape == second.shape == (16, 16, 4)
    assert np.abs(first[..., 3].astype(int) + second[..., 3] - 255).max() <= 1
    assert read_image(tmp_path / "03_estimate.png").shape == (16, 16, 3)
    assert (tmp_path / "overview.png").is_file() and len(list(tmp_path.glob("[!.]*"))) == 24 * 3 + 1
    again = run_json("branches", run, tmp_path, photos / "images", "--out", tmp_path)
    assert again["images"] == 24, "results must not be read as input"


@pytest.mark.slow
def test_recompose_writes_edited_images(run, photos, run_json, tmp_path, monkeypatch):
    removed = []

    def recompose(*args, remove, **options):
        removed.append(remove)
        return recompose_images(*args, remove=remove, **options)

    monkeypatch.setattr(editor, "recompose_images", recompose)
    images = [photos / "images/00.png", photos / "images/01.png"]
    words = ("recompose", run, *images, "--region", 0, "--steps", 2)
    changes = {"anew": (), "seed": ("--seed", 3), "from": ("--from", photos / "images/02.png"), "gone": ("--remove",)}
    results = {}
    for name, flags in changes.items():
        result = run_json(*words, *flags, "--out", tmp_path / name)
        assert (result["images"], result["region"], len(result["kept"])) == (2, 0, 2)
        written = {path.name for path in (tmp_path / name).glob("[!.]*")}
        assert written == {f"0{i}_{end}.png" for i in (0, 1) for end in ("recomposed", "labels")} | {"overview.png"}
        results[name] = read_image(tmp_path / name / "01_recomposed.png")
        assert results[name].shape == (16, 16, 3)
    assert [name for name in ("seed", "from") if (results["anew"] == results[name]).all()] == []
    assert removed == [False, False, False, True]  # the branches of four steps may paint the same without the region
    result = run_json(
        "recompose",
        run,
        images[0],
        "--region",
        1,
        "--from",
        photos / "images",
        "--steps",
        1,
        "--out",
        tmp_path / "many",
    )
    assert result["images"] == 24 and (tmp_path / "many/00_0023_recomposed.png").is_file()


@pytest.mark.slow
def test_edit_errors_name_the_option(run, photos, run_refused, tmp_path):
    one, out = photos / "images/00.png", ("--out", tmp_path / "out")
    assert "PATHS" in run_refused("branches", run, *out)
    assert "PATHS" in run_refused("recompose", run, "--region", 0, *out)
    assert "region=7: this run has regions 0 to 1" in run_refused("recompose", run, one, "--region", 7, *out)
    assert "--region" in run_refused("recompose", run, one, *out)
    assert "not both" in run_refused("recompose", run, one, "--region", 0, "--remove", "--from", one, *out)
    assert "t=1000" in run_refused("branches", run, one, "-t", 1000, *out)
    assert "frames=1" in run_refused("interpolate", run, one, one, "--frames", 1, *out)
    assert "nothing.jpg" in run_refused("interpolate", run, one, tmp_path / "nothing.jpg", *out)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    assert "broken.png" in run_refused("recompose", run, one, broken, "--region", 0, *out)
    assert not (tmp_path / "out").exists(), "no file may be written"
