"""The tests that need a GPU are found on a machine that has no more than a GPU machine's packages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Packages of the `test` and other extras that no image for GPUs brings, beside the package's own dependencies.
ABSENT = (
    "av",
    "datasets",
    "grimp",
    "importlinter",
    "ipykernel",
    "mypy",
    "nbclient",
    "nbformat",
    "pi_heif",
    "pillow_heif",
    "plyfile",
    "pycocotools",
    "pycolmap",
    "viser",
)
COLLECT = f"""
import sys
from importlib.machinery import PathFinder

import pytest

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
sys.exit(pytest.main(["-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider", "--assert=plain"]))
"""


def test_packages_absent_on_gpu_machines_are_not_imported_by_whole_test_files():
    pattern = re.compile(rf"^(?:import|from) (?:{'|'.join(ABSENT)})\b", re.MULTILINE)
    files = [path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    offenders = [str(path.relative_to(ROOT)) for path in files if pattern.search(path.read_text())]
    assert offenders == [], "use pytest.importorskip, so that pytest -m gpu collects all other files"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_gpu_tests_in_a_bare_environment_are_collected():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run([sys.executable, "-c", COLLECT], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    for folder in ("engine", "kernels", "nerfdiff", "ops", "segdiff"):
        assert f"tests/{folder}/" in done.stdout, folder
