"""Fixtures of several test folders."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

# The process that hands the tests to others reads this file too: torch is imported in fixtures, not here.

# Folders and modules of which nearly every test takes seconds: compilers, interpreted kernels, experiments, trainings.
SLOW = (
    "benchmarks/",
    "cli/test_every_writer.py",
    "csrc/",
    "kernels/",
    "nerfdiff/cameras/test_registration.py",
    "nerfdiff/export/test_originals.py",
    "nerfdiff/fields/test_appearance.py",
    "nerfdiff/fields/test_background.py",
    "nerfdiff/fields/test_occupancy.py",
    "nerfdiff/stages/test_duplication.py",
    "nerfdiff/test_box.py",
    "nerfdiff/test_commands.py",
    "nerfdiff/test_forward_run.py",
    "nerfdiff/test_kill.py",
    "nerfdiff/test_train.py",
    "nerfdiff/test_training_views.py",
    "reproduce/",
    "segdiff/editing/test_recompose.py",
    "segdiff/test_choose_regions.py",
    "segdiff/test_hierarchy.py",
    "segdiff/test_resume.py",
)


def is_slow(path: Path) -> bool:
    return path.relative_to(Path(__file__).parent).as_posix().startswith(SLOW)


def pytest_ignore_collect(collection_path, config):
    """Leave slow modules unimported where no slow test runs: importing them takes seconds."""
    return True if config.option.markexpr == "not slow" and is_slow(collection_path) else None


def pytest_collection_modifyitems(items):
    """Mark every test of the slow folders and modules, and run the modules with slow tests first.

    Otherwise one of two processes would still run a long module where the other has nothing left.
    """
    for item in items:
        if is_slow(item.path):
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection(session):
    """Search no garbage during the collection: it frees next to nothing of what is imported."""
    gc.disable()


def pytest_collection_finish(session):
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def full_precision():
    """Compute convolutions on a GPU in fp32, as tests expect: torch's default is TF32, of 10 bits of mantissa."""
    import torch

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(scope="session", autouse=True)
def reports_without_curves():
    """Leave the curves out of reports: drawing them takes longer than a tiny training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("factorkit.report.html.draw_curves", lambda *args: [])
        yield


@pytest.fixture(scope="session", autouse=True)
def previews_in_few_steps():
    """Draw the generated images of segdiff's previews in 2 steps of 25: they take longer than a tiny training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("factorkit.segdiff.task.NUM_PREVIEW_STEPS", 2)
        yield


@pytest.fixture(scope="module")
def reports_with_curves():
    """Draw the curves of reports after all, until the end of the module."""
    from factorkit.report.curves import draw_curves

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("factorkit.report.html.draw_curves", draw_curves)
        yield


@pytest.fixture
def real_data():
    """Return a function from a data set's name to its folder beside the repository; without one it skips the test."""

    def find(name: str) -> Path:
        folder = Path(__file__).resolve().parents[1] / "../shared/data" / name
        if not folder.is_dir():
            pytest.skip(f"the images {name} are not beside this repository (../shared/data)")
        return folder

    return find
