"""What an import costs, and that nothing warns: in processes of their own, for this one has imported everything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "triton", "matplotlib", "numpy", "PIL", "scipy", "sklearn", "cv2", "torchmetrics", "viser", "trimesh")
ROOT = Path(__file__).resolve().parents[1]


def python(*words: str) -> str:
    """What a Python said that imports this package from where it lies."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "act",
    [
        "import factorkit",
        "import factorkit.cli.main",
        "import factorkit.cli.main; factorkit.cli.main.main(['--help'])",
        "import factorkit.cli.main; factorkit.cli.main.main(['--version'])",
        "import factorkit.cli.main; factorkit.cli.main.main(['segment', '-h'])",
    ],
)
def test_neither_importing_nor_help_imports_what_takes_long(act):
    said = python("-W", "error", "-c", f"{act}\nimport sys\nprint('imported', *sys.modules)")
    names = {name.partition(".")[0] for name in said.split("imported")[-1].split()}
    assert "factorkit" in names and not names & set(HEAVY)


def test_what_the_models_import_draws_and_shows_nothing_yet():
    act = "import factorkit, sys\nfactorkit.SegdiffRun, factorkit.NerfdiffRun, factorkit.train_segdiff"
    names = {name.partition(".")[0] for name in python("-c", f"{act}\nprint(*sys.modules)").split()}
    assert "torch" in names and not names & {"matplotlib", "cv2", "sklearn", "viser", "trimesh"}


def test_everything_runs_where_warnings_are_errors(tmp_path):
    assert python("-W", "error", str(ROOT / "tests/strict_run.py"), str(tmp_path)).splitlines()[-1] == "strict"
