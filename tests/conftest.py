"""Fixtures of several test folders."""

from __future__ import annotations

from pathlib import Path

import pytest

# Compiling, interpreting kernels and whole experiments: nearly every test here takes seconds.
SLOW_FOLDERS = ("benchmarks", "csrc", "kernels", "reproduce")


def pytest_collection_modifyitems(items):
    """Mark every test of the slow folders."""
    for item in items:
        if item.path.relative_to(Path(__file__).parent).parts[0] in SLOW_FOLDERS:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def real_data():
    """Return a function from a data set's name to its folder beside the repository; without one it skips the test."""

    def find(name: str) -> Path:
        folder = Path(__file__).resolve().parents[1] / "../shared/data" / name
        if not folder.is_dir():
            pytest.skip(f"the images {name} are not beside this repository (../shared/data)")
        return folder

    return find
