"""The benchmark of killed trainings still runs, in a process of its own: it forks before torch is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import random, sys
from pathlib import Path
from benchmarks.faults import Notes, endure
result = endure("segdiff, network", 1, Path(sys.argv[1]), random.Random(0), Notes())
assert result["kills"] == result["runs"] == 1 and not result["differing"], result
"""


@pytest.mark.slow
def test_endure_one_kill_ends_as_the_unbroken_run(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
