"""Every command that writes: the user's files stay, a full disk leaves no half file, and one process alone writes."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import factorkit
from factorkit.cli.main import COMMANDS, command_class
from factorkit.utils import distributed
from factorkit.utils.files import UNFINISHED
from factorkit.utils.output_record import RECORD_NAME

SCENE = Path(__file__).parents[1] / "engine" / "stored" / "nerfdiff_1.safetensors"
ON_CPU = ("--device", "cpu")


@pytest.fixture
def image(photos) -> Path:
    return photos / "images" / "00.png"


@pytest.fixture
def tiny_image(tmp_path) -> Path:
    path = tmp_path / "view.png"
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(path)
    return path


@pytest.fixture
def words_of(run, photos, image, tiny_image, small, flags, tmp_path):
    """words_of(case, out): the command that writes to ``out``."""

    def make(case: str, out: Path) -> list:
        training, other = {"steps": 1, "log_every": 1}, image.with_name("01.png")
        return {
            "demo": ["demo", "--out", out],
            "train": [*flags(**training), "--data", photos, "--out", out],
            "segment": ["segment", run, image, "--out", out],
            "segment, formats": ["segment", run, image, "--out", out, "--formats", "cutout", "labelme", "yolo"],
            "generate": ["generate", run, "-n", 1, "--steps", 2, "--out", out],
            "interpolate": ["interpolate", run, image, other, "--frames", 3, "--steps", 2, "--out", out],
            "branches": ["branches", run, image, "--out", out],
            "recompose": ["recompose", run, image, "--region", 1, "--steps", 2, "--out", out],
            "pose": ["pose", SCENE, tiny_image, *ON_CPU, "--out", out / "poses.json"],
            "reconstruct": ["reconstruct", SCENE, tiny_image, *ON_CPU, "--out", out],
            "render": ["render", SCENE, *ON_CPU, "--frames", 2, "--out", out],
            "render, gif": ["render", SCENE, *ON_CPU, "--frames", 2, "--out", out / "orbit.gif"],
            "sample": ["sample", SCENE, *ON_CPU, "-n", 1, "--steps", 2, "--trajectory", "--out", out],
            "export": ["export", SCENE, out / "transforms.json", *ON_CPU],
            "reproduce": ["reproduce", "table2.1", "--out", out, "--seeds", 1, *ON_CPU],
            "evaluate": ["evaluate", out, "--images", photos / "images", "--masks", photos / "masks", *ON_CPU],
            "choose-regions": ["choose-regions", photos, "--out", out, "--steps", 1, *ON_CPU],
            "checkpoint": ["checkpoint", "export", run, "--out", out / "a.safetensors"],
            "prepare": ["prepare", photos, "--resolution", 8],
        }[case]

    return make


# The file of the user that is in the way of each command, in its output folder.
IN_THE_WAY = {
    "demo": "notes.txt",
    "train": "notes.txt",
    "segment": "00_labels.png",
    "segment, formats": "labelme/00.json",
    "generate": "generated_0000.png",
    "interpolate": "pair_0000_01.png",
    "branches": "00_estimate.png",
    "recompose": "00_labels.png",
    "pose": "poses.json",
    "reconstruct": "view_depth.png",
    "render": "0001.png",
    "render, gif": "orbit.gif",
    "sample": "trajectory.png",
    "export": "images_factorkit/view_0000.png",
    "reproduce": "table2.1/notes.txt",
    "evaluate": "report.html",
    "choose-regions": "notes.txt",
    "checkpoint": "a.safetensors",
    "prepare": "prepared",  # a file where the folder of the cache should be
}
WRITE_NOTHING = {
    "app": "shows a page; a run of its photos is written as train does",
    "view": "shows a run in the browser",
    "doctor": "reports on the installation",
}
OVERWRITE = [case for case in IN_THE_WAY if hasattr(command_class(case.split(",")[0]), "overwrite")]


def test_every_command_has_a_case():
    assert {case.split(",")[0] for case in IN_THE_WAY} | WRITE_NOTHING.keys() == COMMANDS.keys()


@pytest.fixture
def out(tmp_path, run, request, monkeypatch):
    """The output folder of a case; evaluate writes into the run."""
    folder = tmp_path / "out"
    if "evaluate" in request.node.name:
        shutil.copytree(run, folder)
        (folder / "report.html").unlink(missing_ok=True)
    if "prepare" in request.node.name:
        monkeypatch.setenv("FACTORKIT_CACHE", str(folder))
    return folder


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case == "demo" else ()) for case in IN_THE_WAY]
)
def test_command_keeps_a_file_of_the_user(words_of, out, run_cli, case):
    put(out / IN_THE_WAY[case])
    before = {path for path in out.rglob("*") if not path.name.startswith(".")}
    code, text, err = run_cli(*words_of(case, out), "--json")
    assert code in (1, 2) and "Traceback" not in err
    error = json.loads(text)["error"]
    assert str(out) in error and ("exists" in error or "is a file" in error or "Not a directory" in error)
    assert (out / IN_THE_WAY[case]).read_text() == "mine"
    if not case.startswith("segment"):  # which segments the other images
        assert {path for path in out.rglob("*") if not path.name.startswith(".")} == before


@pytest.mark.parametrize("case", OVERWRITE)
@pytest.mark.slow
def test_command_replaces_with_overwrite_and_its_own_files_without(words_of, out, run_cli, case):
    put(out / IN_THE_WAY[case])
    for extra in (["--overwrite"], []):
        code, _, err = run_cli(*words_of(case, out), *extra)
        assert code == 0, err
        assert (out / IN_THE_WAY[case]).read_bytes() != b"mine"


@pytest.mark.parametrize("case", ["pose", "reconstruct"])
def test_inputs_are_never_replaced(words_of, run_cli, tiny_image, case):
    own = tiny_image.read_bytes()
    out = tiny_image.parent
    words = ["pose", SCENE, tiny_image, *ON_CPU, "--out", tiny_image] if case == "pose" else words_of(case, out)
    code, text, _ = run_cli(*words, "--overwrite", "--json")
    assert code == 1 and "is one of the inputs" in json.loads(text)["error"]
    assert tiny_image.read_bytes() == own


@pytest.mark.parametrize("case", OVERWRITE)
def test_result_for_another_input_is_kept(words_of, out, run_cli, tmp_path, case):
    if case in ("segment", "segment, formats", "branches", "interpolate", "recompose"):
        pytest.skip("files of another image have other names")
    assert run_cli(*words_of(case, out))[0] == 0
    other = tmp_path / ("other" + (SCENE.suffix if SCENE in words_of(case, out) else ""))
    words = words_of(case, out)
    if SCENE in words:
        shutil.copy(SCENE, other)
        run = factorkit.load(SCENE, device="cpu")
        run.model.intrinsics[0, 0] += 0.1
        other.unlink()
        run.save(other)
    else:
        other = Path(shutil.copytree(words[1] if case == "generate" else words[2], other))
    place = next(i for i, word in enumerate(words) if isinstance(word, Path))
    target = out / IN_THE_WAY[case]
    before = target.read_bytes()
    code, text, _ = run_cli(*words[:place], other, *words[place + 1 :], "--json")
    assert code == 1 and "was written for another input" in json.loads(text)["error"]
    assert target.read_bytes() == before


@pytest.fixture
def full_disk(monkeypatch):
    """full_disk(folder, allowed): after ``allowed`` written bytes a write to a file below the folder fails halfway."""

    def fill(folder: Path, allowed: int) -> None:
        plain = builtins.open

        def open_limited(file, mode="r", *args, **kwargs):
            opened = plain(file, mode, *args, **kwargs)
            path = os.fspath(file) if isinstance(file, (str, os.PathLike)) else ""
            if not str(path).startswith(str(folder)) or not set(mode) & set("wxa+"):
                return opened
            if str(path).endswith((RECORD_NAME, ".jsonl", ".lock")):
                return opened
            write = opened.write

            def write_limited(data):
                if opened.tell() + len(data) > allowed:
                    write(data[: len(data) // 2])
                    opened.flush()
                    raise OSError(errno.ENOSPC, "No space left on device", str(path))
                return write(data)

            return _Limited(opened, write_limited)

        monkeypatch.setattr(builtins, "open", open_limited)
        monkeypatch.setattr(io, "open", open_limited)

        def save_file(tensors, path, *args, **kwargs):
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        monkeypatch.setattr("factorkit.engine.checkpoint.save_file", save_file)

    return fill


class _Limited:
    """A file whose ``write`` is replaced."""

    def __init__(self, file, write):
        self._file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def __iter__(self):
        return iter(self._file)


# Files that are complete however early a command stops.
STATE = {RECORD_NAME, ".lock", "log.jsonl", "segments.jsonl"}


@pytest.mark.parametrize("case", [case for case in IN_THE_WAY if case not in ("demo", "reproduce", "evaluate")])
@pytest.mark.parametrize("end", ["full", "interrupted"])
def test_command_that_fails_while_writing_leaves_no_half_file(
    words_of, out, run_cli, full_disk, monkeypatch, case, end
):
    out.mkdir(exist_ok=True)
    words = words_of(case, out)
    if end == "full":
        full_disk(out, 20)
    else:  # Ctrl-C before the first file gets its name
        for name in ("os.replace", "os.rename"):
            monkeypatch.setattr(name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    code, _, err = run_cli(*words)
    assert code != 0 and "Traceback" not in err
    monkeypatch.undo()
    left = {path for path in out.rglob("*") if path.is_file() and path.name not in STATE}
    assert {path for path in left if UNFINISHED not in path.name} == set(), err
    assert not left or case in ("train", "choose-regions")


@pytest.mark.parametrize("case", ["checkpoint", "export", "prepare", "choose-regions"])
def test_second_process_of_torchrun_writes_nothing(words_of, out, run_cli, monkeypatch, case):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("factorkit.cli.main.join_processes", lambda command: None)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    code, text, err = run_cli(*words_of(case, out))
    assert code == 0, err
    assert text == "" and not [path for path in out.rglob("*") if path.is_file()]


def test_reproduce_with_torchrun_is_refused(words_of, out, run_refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "run it without torchrun" in run_refused(*words_of("reproduce", out))
    assert not out.exists()


@pytest.mark.parametrize("path", [SCENE, SCENE.with_name("segdiff_1.safetensors")])
def test_save_in_second_process_writes_nothing(tmp_path, monkeypatch, path):
    run = factorkit.load(path, device="cpu")
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert run.save(tmp_path / "a.safetensors") == tmp_path / "a.safetensors"
    assert not list(tmp_path.iterdir())
    assert torch.is_tensor(next(run.model.parameters()))
