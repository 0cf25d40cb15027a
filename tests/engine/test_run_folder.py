from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import factorkit
from factorkit.engine.run_folder import claimed, copy_folder, locked, read_object, read_settings, write_json
from factorkit.engine.run_log import RunLog
from factorkit.utils.errors import CheckpointError
from factorkit.utils.files import read_log

SETTINGS = {"model": "toy", "steps": 10, "model_channels": 8, "channel_mult": [1, 2]}
RESUMABLE = frozenset({"steps"})


def claim(folder: Path, settings: dict, resumable: frozenset, complete=None) -> None:
    with claimed(folder, settings, resumable, complete=complete):
        pass


def test_claim_new_folder_is_created(tmp_path):
    claim(tmp_path / "deep" / "größe", SETTINGS, RESUMABLE)
    assert read_settings(tmp_path / "deep" / "größe") == SETTINGS
    names = [p.name for p in sorted((tmp_path / "deep" / "größe").iterdir())]
    assert names == [".factorkit.jsonl", ".lock", "config.json"]


def test_claim_same_settings_are_accepted(tmp_path):
    claim(tmp_path, SETTINGS, RESUMABLE)
    (tmp_path / "checkpoints").mkdir()
    claim(tmp_path, dict(reversed(SETTINGS.items())), RESUMABLE)
    assert (tmp_path / "checkpoints").is_dir()


def test_claim_other_settings_raise_and_are_named(tmp_path):
    claim(tmp_path, SETTINGS, RESUMABLE)
    asked = {**SETTINGS, "steps": 99, "model_channels": 16, "extra": "new"}
    with pytest.raises(CheckpointError) as caught:
        claim(tmp_path, asked, RESUMABLE)
    message = str(caught.value)
    assert "model_channels: 8 there, 16 requested" in message and "extra: None there, 'new' requested" in message
    assert "steps" not in message and "channel_mult" not in message and str(tmp_path) in message and "out=" in message
    assert read_settings(tmp_path) == SETTINGS  # a refused claim changes nothing


def test_claim_run_of_another_model_raises(tmp_path):
    claim(tmp_path, SETTINGS, RESUMABLE)
    with pytest.raises(CheckpointError, match=r"holds a run of toy, not of nerfdiff; give another out=$"):
        claim(tmp_path, {"model": "nerfdiff", "rays": 5}, RESUMABLE)


def test_claim_missing_setting_raises(tmp_path):
    claim(tmp_path, SETTINGS, RESUMABLE)
    with pytest.raises(CheckpointError, match="model_channels: 8 there, None requested"):
        claim(tmp_path, {k: v for k, v in SETTINGS.items() if k != "model_channels"}, RESUMABLE)


def test_claim_resumable_settings_are_updated(tmp_path):
    claim(tmp_path, SETTINGS, RESUMABLE)
    claim(tmp_path, {**SETTINGS, "steps": 20}, RESUMABLE)
    assert read_settings(tmp_path)["steps"] == 20


def test_claim_folder_with_other_files_raises(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match="not a factorkit run"):
        claim(tmp_path, SETTINGS, RESUMABLE)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_claim_file_in_the_way_raises(tmp_path):
    (tmp_path / "run").write_text("mine")
    for folder in (tmp_path / "run", tmp_path / "run" / "below"):
        with pytest.raises(CheckpointError, match="out="):
            claim(folder, SETTINGS, RESUMABLE)
    assert (tmp_path / "run").read_text() == "mine"


def test_claim_folder_with_hidden_files_is_accepted(tmp_path):
    (tmp_path / ".config.json.123.tmp").write_text('{"mod')
    claim(tmp_path, SETTINGS, RESUMABLE)
    assert read_settings(tmp_path) == SETTINGS


@pytest.mark.parametrize("content", [b"", b'{"steps": 1', b"[1, 2]", b"\xff\xfe"])
def test_claim_damaged_settings_raise(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    for reading in (lambda: claim(tmp_path, SETTINGS, RESUMABLE), lambda: read_settings(tmp_path)):
        with pytest.raises(CheckpointError, match="config.json cannot be read"):
            reading()
    assert (tmp_path / "config.json").read_bytes() == content


def test_claim_unreadable_settings_raise(tmp_path, monkeypatch):
    claim(tmp_path, SETTINGS, RESUMABLE)

    def refuse(path, encoding):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(CheckpointError, match=r"config\.json .*Permission denied"):
        claim(tmp_path, SETTINGS, RESUMABLE)


def test_read_settings_missing_run_raises(tmp_path):
    with pytest.raises(CheckpointError, match="not a run folder"):
        read_settings(tmp_path / "nowhere")


def test_claim_read_only_folder_raises(tmp_path, monkeypatch):
    # injected, for root may write anywhere
    def refuse(source, target):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CheckpointError, match=r"could not write .*config\.json.*Read-only.*out="):
        claim(tmp_path, SETTINGS, RESUMABLE)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_write_json_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "scores.json"
    write_json(path, {"iou": 0.5, "name": "größe"})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_json(path, {"iou": 0.9})
    assert json.loads(path.read_text(encoding="utf-8")) == {"iou": 0.5, "name": "größe"}
    assert [p.name for p in tmp_path.iterdir()] == ["scores.json"]


@pytest.mark.slow
def test_locked_second_process_raises(tmp_path):
    take = f"with locked(Path({str(tmp_path)!r})): pass"
    script = f"from factorkit.engine.run_folder import locked\nfrom pathlib import Path\n{take}"
    environment = {**os.environ, "PYTHONPATH": str(Path(factorkit.__file__).parents[1])}
    other = partial(subprocess.run, [sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    with locked(tmp_path):
        assert "another process is training" in other().stderr
    assert other().returncode == 0


def test_claimed_refused_claim_changes_nothing(tmp_path, monkeypatch):
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


def test_copy_folder_full_disk_raises(tmp_path, monkeypatch):
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
def test_read_object_damaged_file_raises(tmp_path, text):
    path = tmp_path / "scores.json"
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(CheckpointError, match=r"scores\.json cannot be read: .* delete it"):
        read_object(path)
    write_json(path, {"iou": 0.5})
    assert read_object(path) == {"iou": 0.5}


def test_read_log_returns_events_in_order_with_times(tmp_path):
    before = time.time() - 1
    with RunLog(tmp_path / "new" / "run") as log:
        log.event("start", step=0, message="größe\nzwei")
        log.event("step", step=1, loss=0.5)
    events = read_log(tmp_path / "new" / "run")
    assert [(e["event"], e["step"]) for e in events] == [("start", 0), ("step", 1)]
    assert events[0]["message"] == "größe\nzwei"
    assert all(before < e["time"] < time.time() + 1 for e in events)


def test_run_log_event_is_readable_before_close(tmp_path):
    log = RunLog(tmp_path)
    log.event("step", step=7)
    assert read_log(tmp_path)[-1]["step"] == 7
    log.close()
    log.close()


def test_run_log_reopening_appends(tmp_path):
    for step in (1, 2):
        with RunLog(tmp_path) as log:
            log.event("step", step=step)
    assert [e["step"] for e in read_log(tmp_path)] == [1, 2]


def test_run_log_values_unknown_to_json_are_converted(tmp_path):
    with RunLog(tmp_path) as log:
        log.event(
            "step",
            loss=float("nan"),
            nested={"a": [float("inf"), 1.0, (2, float("-inf"))], 3: None},
            tensor=torch.tensor([0.5, float("nan")]),
            scalar=np.float32(0.25),
            folder=tmp_path,
            flag=True,
        )

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    event = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=refuse)
    assert event["loss"] is None
    assert event["nested"] == {"a": [None, 1.0, [2, None]], "3": None}
    assert event["tensor"] == [0.5, None]
    assert event["scalar"] == 0.25
    assert event["folder"] == str(tmp_path)
    assert event["flag"] is True


@pytest.mark.parametrize("tail", [b'{"event": "step", "st', b'{"event": "step"}', b"\xff\x00"])
def test_run_log_opening_drops_only_a_half_line(tmp_path, tail):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"event": "start", "step": 0}\n' + tail)
    with RunLog(tmp_path) as log:
        assert path.read_bytes() == b'{"event": "start", "step": 0}\n'
        log.event("resume", step=0)
    assert [e["event"] for e in read_log(tmp_path)] == ["start", "resume"]


def test_run_log_opening_a_single_half_line_empties_the_file(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"event"')
    RunLog(tmp_path).close()
    assert (tmp_path / "log.jsonl").read_bytes() == b""


def test_read_log_skips_damage_without_repairing_it(tmp_path):
    assert read_log(tmp_path) == []
    content = b'{"event": "start"}\n\n[1, 2]\nnoise\xff\n{"event": "end"}\n{"event": "ha'
    (tmp_path / "log.jsonl").write_bytes(content)
    assert [e["event"] for e in read_log(tmp_path)] == ["start", "end"]
    assert (tmp_path / "log.jsonl").read_bytes() == content


def test_run_log_missing_tensorboard_warns(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.warns(UserWarning, match=r"factorkit\[tensorboard\]"):
        log = RunLog(tmp_path, tensorboard=True)
    log.event("step", step=1, loss=0.5)
    assert len(read_log(tmp_path)) == 1


def test_run_log_tensorboard_has_numbers_by_step(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, *scalar):
            written.append(scalar)

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type("stand_in", (), {"SummaryWriter": Writer}))
    with RunLog(tmp_path, tensorboard=True) as log:
        log.event("step", step=3, loss=0.5, areas=[0.25, None], name="x", skipped=False)
        log.event("start", message="no step")
    assert written == [("step/loss", 0.5, 3), ("step/areas/0", 0.25, 3), "closed"]
