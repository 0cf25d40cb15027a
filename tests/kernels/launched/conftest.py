"""These tests launch kernels: on a GPU (`pytest -m gpu`), or on CPU tensors where TRITON_INTERPRET=1 has Triton
interpret them. tests/kernels/test_without_gpu.py does the latter in a process of its own."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from interpreter import accept_arrays_of_one_element, list_builtins_once

from factorkit.ops import dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]

if INTERPRETED:
    interpreter = importlib.import_module("triton.runtime.interpreter")
    accept_arrays_of_one_element(interpreter)
    list_builtins_once(interpreter)
    dispatch.run_triton_kernels_on("cpu")


def pytest_collection_modifyitems(items):
    for item in items:
        if not INTERPRETED and "launched" in item.path.parts:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def device():
    """Tests make their tensors here without asking for a device by name."""
    torch.manual_seed(0)
    torch.set_default_device("cpu" if INTERPRETED else "cuda")
    yield
    torch.set_default_device(None)


@pytest.fixture
def fill_memory_with_nan():
    """Every number that nobody writes is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
