"""What these tests compare with the references is the compiled module: where it is missing they would prove nothing."""

from __future__ import annotations

import pytest

from factorkit.ops import compiled


@pytest.fixture(autouse=True)
def compiled_module():
    """Before and after each test, so that none leaves the others without it."""
    assert compiled.extension() is not None, "factorkit._C is not built"
    yield
    assert compiled.extension() is not None, "this test left the others without factorkit._C"
