"""No command replaces a file that it did not write for the same input; --overwrite does, except for inputs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image

from factorkit.cli.scene import file_stems


def refuse(run_cli, *words) -> str:
    code, out, err = run_cli(*words, "--json")
    assert code != 0 and "Traceback" not in err
    return json.loads(out)["error"]


@pytest.fixture
def image(photos) -> Path:
    return photos / "images" / "00.png"


def words_of(command, run, image):
    other = image.with_name("01.png")
    return {
        "generate": ["generate", run, "-n", 1, "--steps", 2],
        "interpolate": ["interpolate", run, image, other, "--frames", 3, "--steps", 2],
        "branches": ["branches", run, image],
        "recompose": ["recompose", run, image, "--region", 1, "--steps", 2],
        "segment": ["segment", run, image],
    }[command]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("generate", "overview.png"),
        ("interpolate", "pair_0000_01.png"),
        ("branches", "00_estimate.png"),
        ("recompose", "overview.png"),
        ("segment", "00_labels.png"),
    ],
)
def test_command_keeps_file_of_the_user(run, run_cli, run_json, image, tmp_path, command, name):
    words, out = words_of(command, run, image), tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    assert f"{name} exists and was not written by factorkit" in refuse(run_cli, *words, "--out", out)
    assert (out / name).read_text() == "mine" and not list(out.glob("*_overlay.png"))
    run_json(*words, "--out", out, "--overwrite")
    before = Image.open(out / name).size
    run_json(*words, "--out", out)  # its own files are replaced
    assert Image.open(out / name).size == before
    (out / name).write_text("edited")
    message = refuse(run_cli, *words, "--out", out) if command != "segment" else "changed after factorkit wrote it"
    assert "changed after factorkit wrote it" in message
    assert (out / name).read_text() == "edited"


@pytest.mark.slow
def test_generate_with_other_seed_keeps_earlier_images(run, run_cli, run_json, tmp_path):
    words = ["generate", run, "-n", 1, "--steps", 2, "--out", tmp_path / "out"]
    run_json(*words)
    before = (tmp_path / "out" / "generated_0000.png").read_bytes()
    assert "written for another input (generate, seed 0" in refuse(run_cli, *words, "--seed", 1)
    assert (tmp_path / "out" / "generated_0000.png").read_bytes() == before


@pytest.mark.slow
def test_commands_on_one_image_share_a_folder_without_loss(run, run_json, image, tmp_path):
    out = tmp_path / "out"
    contents: dict[str, str] = {}
    for words in (
        words_of("segment", run, image),
        words_of("recompose", run, image),
        [*words_of("recompose", run, image), "--seed", 5],
        [*words_of("recompose", run, image), "--remove"],
        words_of("branches", run, image),
    ):
        run_json(*words, "--out", out)
        found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.png")}
        assert contents.items() <= found.items() and len(found) > len(contents)
        contents = found


@pytest.mark.slow
def test_checkpoint_export_keeps_file_of_the_user(run, run_cli, run_json, tmp_path):
    words = ["checkpoint", "export", run, "--out", tmp_path / "a.safetensors"]
    (tmp_path / "a.safetensors").write_text("mine")
    assert "was not written by factorkit" in refuse(run_cli, *words)
    assert (tmp_path / "a.safetensors").read_text() == "mine"
    run_json(*words, "--overwrite")
    run_json(*words)


def test_names_of_renders_are_distinct():
    assert file_stems(["a/b.png", "a_b.jpg", "overview.png", "a_b-2.png"]) == ["a_b", "a_b-2", "overview-2", "a_b-2-2"]
