"""These tests compare the compiled module with the references, so they fail where the module is missing."""

from __future__ import annotations

import pytest
import torch

from factorkit.ops import dispatch


@pytest.fixture(autouse=True)
def compiled_module():
    assert not dispatch.MISSING_KERNELS.get("cpu"), "factorkit._C is not built"
    yield
    assert not dispatch.MISSING_KERNELS.get("cpu"), "this test left the others without factorkit._C"


@pytest.fixture
def fill_memory_with_nan():
    """Make torch fill all memory that it allocates with NaN, which stays where nobody writes."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
