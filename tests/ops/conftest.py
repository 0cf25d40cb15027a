"""These tests compare the compiled module with the references, so they fail where the module is missing."""

from __future__ import annotations

import pytest

from factorkit.ops import dispatch


@pytest.fixture(autouse=True)
def compiled_module():
    assert not dispatch.MISSING_KERNELS.get("cpu"), "factorkit._C is not built"
    yield
    assert not dispatch.MISSING_KERNELS.get("cpu"), "this test left the others without factorkit._C"
