"""A training step of each stage reads nothing from the device and copies nothing to it, so no step waits for a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.engine.test_step import Watched

pytest.importorskip("triton", reason="benchmarks.contenders counts launches of Triton's kernels")

from benchmarks.contenders import make_nerfdiff_step
from factorkit.ops import dispatch, march

CASES = {
    "search": ("search", {}),
    "refine": ("refine", {"optimize_camera": ("focal", "roll", "aim")}),
    "fit": ("fit", {"occupancy": False}),
    "fit of a hash grid": ("fit", {"field": "hashgrid", "occupancy": False}),
    "fit of a perceptron": ("fit", {"field": "mlp", "occupancy": False}),
    "free cameras": ("fit", {"poses": "learned"}),
    "distil": ("distil", {}),
    "joint": ("joint", {}),
}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Ops check values on the CPU only."""
    for module in (dispatch, march):
        monkeypatch.setattr(module, "is_readable", lambda x: False)
    monkeypatch.setattr("factorkit.rendering.cameras.is_readable", lambda x: False)


def find_host_reads(stage, views, settings) -> list[str]:
    step = make_nerfdiff_step(stage, torch.device("cpu"), views, **settings)
    for _ in range(2):
        step()
    step.take._prepare(2)
    with Watched() as watched:
        step.take._work()
    return watched.found


@pytest.mark.parametrize("case", CASES)
def test_step_of_a_stage_reads_nothing_on_the_host(as_on_a_gpu, scene_views, tiny, case):
    stage, changes = CASES[case]
    settings = {name: value for name, value in tiny.items() if name not in ("preset", "device", "progress")}
    assert find_host_reads(stage, scene_views, {**settings, **changes}) == []


def test_step_through_occupied_cells_reads_the_number_of_samples(as_on_a_gpu, scene_views, tiny):
    settings = {name: value for name, value in tiny.items() if name not in ("preset", "device", "progress")}
    reads = find_host_reads("fit", scene_views, {**settings, "occupancy": True})
    assert reads == ["aten._local_scalar_dense.default"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_step_of_a_stage_does_not_wait_for_the_gpu(scene_views, tiny, case):
    stage, changes = CASES[case]
    settings = {name: value for name, value in tiny.items() if name not in ("preset", "device", "progress")}
    step = make_nerfdiff_step(stage, torch.device("cuda"), scene_views, **{**settings, **changes})
    for _ in range(3):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
