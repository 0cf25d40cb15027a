"""A training step of each stage reads nothing from the device and copies nothing to it, so no step waits for a GPU."""

from __future__ import annotations

import warnings

import pytest
import torch

from factorkit.engine.cuda_graph import WARM_UP
from tests.engine.host_reads import Watched
from tests.nerfdiff.forward import forward_views

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
    "colours of each view": ("fit", {"appearance_dim": 2, "background": "field"}),
    "unbounded": ("fit", {"unbounded": "yes"}),
    "forward": ("refine", {}),
    "distil": ("distil", {}),
    "distil of a transformer": ("distil", {"encoder": "vit", "encoder_depth": 2}),
    "joint": ("joint", {}),
    "joint forward": ("joint", {"optimize_camera": ()}),
}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Ops check values on the CPU only."""
    for module in (dispatch, march):
        monkeypatch.setattr(module, "is_readable", lambda x: False)
    monkeypatch.setattr("factorkit.rendering.cameras.is_readable", lambda x: False)


@pytest.fixture
def make_step(scene_views, tiny):
    """``make_step(case, device, ...)``: a training step of a stage."""
    settings = {name: value for name, value in tiny.items() if name not in ("preset", "device", "progress")}
    transformer = {name: value for name, value in settings.items() if name != "channel_mult"}

    def make(case, device, **changes):
        stage, own = CASES[case]
        views = forward_views(size=(6, 8), columns=3, rows=3) if "forward" in case else scene_views
        shared = transformer if own.get("encoder") == "vit" else settings
        return make_nerfdiff_step(stage, torch.device(device), views, **{**shared, **own, **changes})

    return make


def find_host_reads(step) -> list[str]:
    for _ in range(2):
        step()
    step.take._prepare(2)
    with Watched() as watched:
        step.take._work()
    return watched.found


@pytest.mark.parametrize("case", CASES)
def test_step_of_a_stage_reads_nothing_on_the_host(as_on_a_gpu, make_step, case):
    step = make_step(case, "cpu")
    assert find_host_reads(step) == [] and step.take.task.capturable


def test_step_through_occupied_cells_reads_the_number_of_samples(as_on_a_gpu, make_step):
    step = make_step("fit", "cpu", occupancy=True)
    assert find_host_reads(step) == ["aten._local_scalar_dense.default"] and not step.take.task.capturable


def addresses(step) -> list[int]:
    """Return where the tensors lie that a graph reads and ``prepare`` writes."""
    task, field = step.take.task, step.take.model.field
    found = [getattr(task, name, None) for name in ("target_images", "target_masks", "temperature")]
    return [x.data_ptr() for x in (*found, getattr(field, "_blur", None)) if x is not None]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["search", "joint"])
def test_step_of_a_stage_changes_its_form_and_no_address(make_step, case):
    step, forms = make_step(case, "cpu", steps=40, search_steps=40, grid_resolution=16, search_grid_resolution=16), []
    plain = step.take.run
    step.take.run = lambda form: (forms.append(form), plain(form))
    step()
    first = addresses(step)
    for _ in range(39):
        step()
    assert addresses(step) == first
    changes = [form for i, form in enumerate(forms) if not i or form != forms[i - 1]]
    assert changes[0] == (True, True) and changes[-1] == (False, False) and len(changes) <= 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_graphed_steps_of_a_stage_equal_eager_steps(make_step, case):
    ends = []
    for graph in (True, False):
        torch.manual_seed(0)
        step = make_step(case, "cuda", cuda_graph=graph, precision="fp32")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*could not be captured")
            for _ in range(WARM_UP + 5):
                step()
        assert not graph or step.take.run.graph is not None
        ends.append(step.take.model.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_step_of_a_stage_does_not_wait_for_the_gpu(make_step, case):
    step = make_step(case, "cuda")
    for _ in range(WARM_UP + 1):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
