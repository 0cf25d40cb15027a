from __future__ import annotations

import json
import sys
import time

import numpy as np
import pytest
import torch

from factorkit.engine.log import RunLog
from factorkit.utils.jsonl import read_log


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
