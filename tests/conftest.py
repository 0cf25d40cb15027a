"""What tests of several folders need."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def real_data():
    """real_data(name): a folder of real photographs beside the repository, or a skip that names it."""

    def find(name: str) -> Path:
        folder = Path(__file__).resolve().parents[1] / "../shared/data" / name
        if not folder.is_dir():
            pytest.skip(f"the real photographs {name} are not beside this repository (../shared/data)")
        return folder

    return find
