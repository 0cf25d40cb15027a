from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from factorkit.engine.checkpoint import Checkpoints
from factorkit.utils.files import read_log


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_train_killed_in_every_stage_resumes_bit_identically(tmp_path):
    script = Path(__file__).with_name("killed_run.py")
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout)
    assert [k for k in kills if k.startswith("dictionary")][4] == "dictionary: refine again" and len(kills) == 15
    for name in {k.split(":")[0] for k in kills}:
        whole, killed = (Checkpoints(tmp_path / name / kind / "checkpoints").latest() for kind in ("whole", "killed"))
        assert whole[1] == killed[1] and whole[0].keys() == killed[0].keys()
        assert [k for k in whole[0] if not torch.equal(whole[0][k], killed[0][k])] == [], name
        logs = [read_log(log.parent) for log in (tmp_path / name / "killed").rglob("log.jsonl")]
        resumed = [event for log in logs for event in log if event["event"] == "resume"]
        assert len(resumed) >= sum(k.startswith(name) for k in kills), "each kill left a checkpoint to go on from"
