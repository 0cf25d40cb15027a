from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import factorkit
from factorkit.engine.run_folder import claim, claimed, copy_folder, locked, read_object, read_settings, write_json
from factorkit.utils.errors import CheckpointError

SETTINGS = {"model": "toy", "steps": 10, "model_channels": 8, "channel_mult": [1, 2]}
RESUMABLE = frozenset({"steps"})


def test_a_new_folder_becomes_the_run(tmp_path):
    claim(tmp_path / "deep" / "größe", SETTINGS, RESUMABLE)
    assert read_settings(tmp_path / "deep" / "größe") == SETTINGS
    assert [p.name for p in (tmp_path / "deep" / "größe").iterdir()] == ["config.json"]


def test_the_same_settings_resume(tmp_path):
    claim(tmp_path, SETTINGS, RESUMABLE)
    (tmp_path / "checkpoints").mkdir()
    claim(tmp_path, dict(reversed(SETTINGS.items())), RESUMABLE)
    assert (tmp_path / "checkpoints").is_dir()


def test_other_settings_are_refused_and_only_they_are_named(tmp_path):
    claim(tmp_path, SETTINGS, RESUMABLE)
    asked = {**SETTINGS, "steps": 99, "model_channels": 16, "extra": "new"}
    with pytest.raises(CheckpointError) as caught:
        claim(tmp_path, asked, RESUMABLE)
    message = str(caught.value)
    assert "model_channels: 8 there, 16 requested" in message and "extra: None there, 'new' requested" in message
    assert "steps" not in message and "channel_mult" not in message and str(tmp_path) in message and "out=" in message
    assert read_settings(tmp_path) == SETTINGS  # a refused claim changes nothing


def test_a_run_of_another_kind_is_named_without_its_settings(tmp_path):
    claim(tmp_path, SETTINGS, RESUMABLE)
    with pytest.raises(CheckpointError, match=r"holds a run of toy, not of nerfdiff; give another out=$"):
        claim(tmp_path, {"model": "nerfdiff", "rays": 5}, RESUMABLE)


def test_a_setting_that_is_gone_is_a_difference(tmp_path):
    claim(tmp_path, SETTINGS, RESUMABLE)
    with pytest.raises(CheckpointError, match="model_channels: 8 there, None requested"):
        claim(tmp_path, {k: v for k, v in SETTINGS.items() if k != "model_channels"}, RESUMABLE)


def test_resumable_settings_may_change_and_are_recorded(tmp_path):
    claim(tmp_path, SETTINGS, RESUMABLE)
    claim(tmp_path, {**SETTINGS, "steps": 20}, RESUMABLE)
    assert read_settings(tmp_path)["steps"] == 20


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match="not a factorkit run"):
        claim(tmp_path, SETTINGS, RESUMABLE)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "run").write_text("mine")
    for folder in (tmp_path / "run", tmp_path / "run" / "below"):
        with pytest.raises(CheckpointError, match="out="):
            claim(folder, SETTINGS, RESUMABLE)
    assert (tmp_path / "run").read_text() == "mine"


def test_what_a_kill_left_of_the_first_settings_is_no_foreign_folder(tmp_path):
    (tmp_path / ".config.json.123.tmp").write_text('{"mod')
    claim(tmp_path, SETTINGS, RESUMABLE)
    assert read_settings(tmp_path) == SETTINGS


@pytest.mark.parametrize("content", [b"", b'{"steps": 1', b"[1, 2]", b"\xff\xfe"])
def test_damaged_settings_are_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    for reading in (lambda: claim(tmp_path, SETTINGS, RESUMABLE), lambda: read_settings(tmp_path)):
        with pytest.raises(CheckpointError, match="config.json cannot be read"):
            reading()
    assert (tmp_path / "config.json").read_bytes() == content


def test_settings_that_may_not_be_read_are_named(tmp_path, monkeypatch):
    claim(tmp_path, SETTINGS, RESUMABLE)

    def refuse(path, encoding):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(CheckpointError, match=r"config\.json .*Permission denied"):
        claim(tmp_path, SETTINGS, RESUMABLE)


def test_reading_where_there_is_no_run(tmp_path):
    with pytest.raises(CheckpointError, match="not a run folder"):
        read_settings(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    # injected, for root may write anywhere
    def refuse(source, target):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CheckpointError, match=r"could not write .*config\.json.*Read-only.*out="):
        claim(tmp_path, SETTINGS, RESUMABLE)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "scores.json"
    write_json(path, {"iou": 0.5, "name": "größe"})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_json(path, {"iou": 0.9})
    assert json.loads(path.read_text(encoding="utf-8")) == {"iou": 0.5, "name": "größe"}
    assert [p.name for p in tmp_path.iterdir()] == ["scores.json"]


def test_one_process_at_a_time_trains_in_a_folder(tmp_path):
    take = f"with locked(Path({str(tmp_path)!r})): pass"
    script = f"from factorkit.engine.run_folder import locked\nfrom pathlib import Path\n{take}"
    environment = {**os.environ, "PYTHONPATH": str(Path(factorkit.__file__).parents[1])}
    other = partial(subprocess.run, [sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    with locked(tmp_path):
        assert "another process is training" in other().stderr
    assert other().returncode == 0


def test_who_is_refused_changes_nothing(tmp_path, monkeypatch):
    with claimed(tmp_path, SETTINGS, RESUMABLE):
        assert read_settings(tmp_path) == SETTINGS
        with (
            pytest.raises(CheckpointError, match="another process is training"),
            claimed(tmp_path, {**SETTINGS, "steps": 99}, RESUMABLE),
        ):
            pytest.fail("two at once")
        assert read_settings(tmp_path) == SETTINGS
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match="not a factorkit run"), claimed(tmp_path / "other", SETTINGS, RESUMABLE):
        pytest.fail("somebody else's")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]
    monkeypatch.setattr(Path, "mkdir", lambda *given, **options: os.mkdir("/proc/nowhere"))
    new = claimed(tmp_path / "new", SETTINGS, RESUMABLE)
    with pytest.raises(CheckpointError, match="could not write .*new.*out="), new:
        pytest.fail("not there")


def test_a_copy_that_finds_no_room_says_why(tmp_path, monkeypatch):
    (tmp_path / "from/deep").mkdir(parents=True)
    (tmp_path / "from/deep/a").write_text("a")
    copy_folder(tmp_path / "from", tmp_path / "to")
    assert (tmp_path / "to/deep/a").read_text() == "a"

    def full(*given, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(CheckpointError, match=r"could not copy .*from to .*to: .*No space left on device\. Fix"):
        copy_folder(tmp_path / "from", tmp_path / "to")


@pytest.mark.parametrize("text", ["{", "[1]", "\ufffe"])
def test_a_damaged_file_of_a_run_is_named_with_what_to_do(tmp_path, text):
    path = tmp_path / "scores.json"
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(CheckpointError, match=r"scores\.json cannot be read: .* delete it"):
        read_object(path)
    write_json(path, {"iou": 0.5})
    assert read_object(path) == {"iou": 0.5}
