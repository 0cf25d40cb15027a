"""Imports are fast and raise no warning; in separate processes, since this one has imported everything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SLOW_TO_IMPORT = (
    "torch",
    "triton",
    "matplotlib",
    "numpy",
    "PIL",
    "scipy",
    "sklearn",
    "cv2",
    "torchmetrics",
    "viser",
    "trimesh",
)
ROOT = Path(__file__).resolve().parents[1]


def run_python(*arguments: str) -> str:
    """Return the output of a Python process that imports this package from this repository."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["OMP_NUM_THREADS"] = "1"
    process = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=280)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize(
    "statement",
    [
        "import factorkit",
        "import factorkit.cli.main",
        "import factorkit.cli.main; factorkit.cli.main.main(['--help'])",
        "import factorkit.cli.main; factorkit.cli.main.main(['--version'])",
        "import factorkit.cli.main; factorkit.cli.main.main(['segment', '-h'])",
    ],
)
def test_import_and_help_load_no_slow_module(statement):
    output = run_python("-W", "error", "-c", f"{statement}\nimport sys\nprint('imported', *sys.modules)")
    names = {name.partition(".")[0] for name in output.split("imported")[-1].split()}
    assert "factorkit" in names and not names.intersection(SLOW_TO_IMPORT)


@pytest.mark.slow
def test_import_of_the_models_loads_no_plotting_module():
    statement = (
        "import factorkit, sys\n"
        "factorkit.SegdiffRun, factorkit.NerfdiffRun, factorkit.train_segdiff, factorkit.train_nerfdiff"
    )
    names = {name.partition(".")[0] for name in run_python("-c", f"{statement}\nprint(*sys.modules)").split()}
    assert "torch" in names and not names & {"matplotlib", "cv2", "sklearn", "viser", "trimesh", "roma"}


@pytest.mark.slow
def test_tiny_runs_with_warnings_as_errors_succeed(tmp_path):
    assert run_python("-W", "error", str(ROOT / "tests/strict_run.py"), str(tmp_path)).splitlines()[-1] == "strict"
