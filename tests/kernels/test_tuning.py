"""The number of warps by measurement: only when asked for, once for a GPU, never while a graph is captured."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton", reason="the kernels' tests need triton: pip install -e '.[test]' on Linux")

from factorkit.kernels import tiles, tuning

from factorkit import ops


class Kernel:
    """Stands for a compiled kernel; notes the warps it is launched with."""

    __name__ = "sums_kernel"

    def __init__(self):
        self.warps = []

    def __getitem__(self, grid):
        return lambda *arguments, num_warps, **options: self.warps.append(num_warps)


@pytest.fixture
def counting_kernel(monkeypatch, tmp_path):
    """Tuning is on; a launch takes as many milliseconds as its warps are away from 2, and 16 do not fit."""
    monkeypatch.setenv("FACTORKIT_TUNE", "1")
    monkeypatch.setenv("FACTORKIT_CACHE", str(tmp_path / "cache"))
    kernel = Kernel()

    def measured(run):
        run()
        return math.inf if kernel.warps[-1] == 16 else abs(kernel.warps[-1] - 2)

    monkeypatch.setattr(tuning, "measure", measured)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # a CPU build of torch has none
    tuning.load_table.cache_clear()
    yield kernel
    tuning.load_table.cache_clear()


def start(kernel, rows=3):
    tiles.launch(kernel, 7, torch.empty(4), rows, warps=4, BLOCK=8)


def test_fastest_warps_are_measured_once_and_stored(counting_kernel):
    start(counting_kernel)
    assert counting_kernel.warps == [*tuning.WARP_COUNTS, 2]
    start(counting_kernel)
    assert counting_kernel.warps[-1] == 2 and len(counting_kernel.warps) == len(tuning.WARP_COUNTS) + 2
    assert list(json.loads(tuning.table_path().read_text()).values()) == [2]

    tuning.load_table.cache_clear()  # another process
    start(counting_kernel)
    assert len(counting_kernel.warps) == len(tuning.WARP_COUNTS) + 3 and counting_kernel.warps[-1] == 2
    start(counting_kernel, rows=5)  # another shape
    assert len(counting_kernel.warps) == 2 * len(tuning.WARP_COUNTS) + 4


def test_nothing_is_measured_while_a_graph_is_captured(counting_kernel, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    start(counting_kernel)
    assert counting_kernel.warps == [4]


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 3}', "\x00"])
def test_damaged_table_is_rewritten(counting_kernel, text):
    tuning.table_path().parent.mkdir(parents=True)
    tuning.table_path().write_text(text)
    start(counting_kernel)
    assert counting_kernel.warps[-1] == 2
    assert list(json.loads(tuning.table_path().read_text()).values()) == [2]


def test_unwritable_cache_is_ignored(counting_kernel, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FACTORKIT_CACHE", str(tmp_path / "file"))
    start(counting_kernel)
    start(counting_kernel)
    assert counting_kernel.warps == [*tuning.WARP_COUNTS, 2, 2]


def test_without_tuning_the_default_warps_are_used(counting_kernel, monkeypatch):
    monkeypatch.delenv("FACTORKIT_TUNE")
    start(counting_kernel)
    assert counting_kernel.warps == [4] and not tuning.table_path().exists()


def test_register_limit_follows_warps():
    assert [tiles.compiler_options(warps)["maxnreg"] for warps in tuning.WARP_COUNTS] == [255, 255, 255, 255, 128]


def test_launch_runs_on_the_device_of_its_tensors(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    kernel = Kernel()
    with FakeTensorMode():
        tiles.launch(kernel, 7, None, torch.empty(4, device="cuda:1"), 3, warps=4)
    tiles.launch(kernel, 7, torch.empty(4), 3, warps=4)
    assert entered == [torch.device("cuda", 1)] and kernel.warps == [4, 4]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernel_on_the_second_device_leaves_the_first_current():
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(8)
    want = ops.group_norm_silu(x, weight, weight, groups=2)
    got = ops.group_norm_silu(*(v.to("cuda:1") for v in (x, weight, weight)), groups=2)
    assert got.device.index == 1 and torch.cuda.current_device() == 0
    torch.testing.assert_close(got.cpu(), want)
