from __future__ import annotations

from factorkit.engine.log import RunLog
from factorkit.utils.jsonl import read_log, timeline


def test_timeline_repeated_step_keeps_the_later_line(tmp_path):
    with RunLog(tmp_path) as log:
        for step, loss in ((10, 1.0), (20, 2.0), (30, 3.0)):
            log.event("step", step=step, loss=loss)
        log.event("resume", step=15)
        for step, loss in ((20, 2.5), (30, 3.5)):
            log.event("step", step=step, loss=loss)
    steps = timeline(read_log(tmp_path), "step")
    assert [(e["step"], e["loss"]) for e in steps] == [(10, 1.0), (20, 2.5), (30, 3.5)]


def test_timeline_repeated_step_drops_all_later_lines():
    lines = [(10, 0), (20, 0), (30, 0), (40, 0), (20, 1)]
    log = [{"event": "step", "step": step, "run": run} for step, run in lines]
    assert [(e["step"], e["run"]) for e in timeline(log, "step")] == [(10, 0), (20, 1)]
