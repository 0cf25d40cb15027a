from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from factorkit.engine.checkpoint import Checkpoints
from factorkit.nerfdiff.registered_views import LOCALISED
from factorkit.utils.files import read_log, timeline
from tests.engine.trained import run_script

NO_STAGE = ("localise", "set aside", "take up")  # without checkpoints


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_train_killed_in_every_stage_resumes_bit_identically(tmp_path):
    run_script(Path(__file__).with_name("killed_run.py"), tmp_path, timeout=900)
    kills = json.loads((tmp_path / "kills.json").read_text())
    assert [k for k in kills if k.startswith("dictionary")][4] == "dictionary: refine again" and len(kills) == 28
    for name in {k.split(":")[0] for k in kills}:
        whole, killed = (tmp_path / name / kind for kind in ("whole", "killed"))
        stages = {folder.relative_to(whole) for folder in whole.rglob("checkpoints")}
        assert stages == {folder.relative_to(killed) for folder in killed.rglob("checkpoints")}
        for stage in stages:
            expected, found = (Checkpoints(run / stage).latest() for run in (whole, killed))
            assert expected[1] == found[1] and expected[0].keys() == found[0].keys()
            assert [k for k in expected[0] if not torch.equal(expected[0][k], found[0][k])] == [], (name, stage)
        alarms, resumed_alarms = (timeline(read_log(run), "alarms")[-1] for run in (whole, killed))
        assert alarms | {"time": 0} == resumed_alarms | {"time": 0}
        logs = [read_log(log.parent) for log in killed.rglob("log.jsonl")]
        resumed = [event for log in logs for event in log if event["event"] == "resume"]
        fatal = [k for k in kills if k.startswith(name) and k.split(": ")[1] not in NO_STAGE]
        assert len(resumed) >= len(fatal), "each kill left a checkpoint to go on from"
    runs = [tmp_path / "registered" / kind for kind in ("whole", "killed")]
    for file in (LOCALISED, "search.json", "config.json", "rejected/dictionary/config.json"):
        assert len({(run / file).read_text() for run in runs}) == 1
    assert all([path.name for path in (run / "rejected").iterdir()] == ["dictionary"] for run in runs)
    assert json.loads((runs[1] / LOCALISED).read_text())["names"] == ["8", "9"]
