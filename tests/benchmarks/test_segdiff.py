"""benchmarks/segdiff.py on tiny settings: it completes, checks agreement before timing, and writes what it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.contenders import make_task, op_cases, step_contenders
from benchmarks.measure import by_turns, peak_bytes, spread
from benchmarks.segdiff import measure_op
from benchmarks.segdiff_table import ops_table, tables
from factorkit.segdiff.config import preset_config

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = ["resolution=8", "model_channels=8", "channel_mult=[1,2]", "norm_groups=2"]


@pytest.mark.slow
def test_segdiff_benchmark_writes_what_it_prints(tmp_path):
    out = tmp_path / "results" / "segdiff.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.segdiff",
        "--device",
        "cpu",
        "--batch",
        "2",
        "--rounds",
        "2",
        "--compiler",
        "aot_eager",
        "--out",
        str(out),
        "--set",
        *TINY,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(out.read_text())
    (result,) = results.values()
    assert done.stdout.rstrip().endswith(tables(results))
    assert result["machine"]["device"] in results and result["machine"]["threads"] == 1
    assert min(result["roofs"].values()) > 0 and result["step"]["flops"] > 0
    contenders = result["step"]["contenders"]
    assert list(contenders) == ["textbook", "folded", "compiled", "factorkit"]
    for run in [*contenders.values(), *result["scaling"].values(), result["segment"]]:
        assert 0 < run["low_ms"] <= run["median_ms"] <= run["high_ms"]
    assert all(max(run["errors"]) < 0.05 and run["peak_bytes"] > 0 for run in contenders.values())
    assert list(result["scaling"]) == ["1", "2", "4"]
    assert {name.split()[0] for name in result["ops"]} == {
        "masked_skip_norm_silu",
        "group_norm_silu",
        "masked_skip_projection",
        "region_blend",
        "mask_pyramid",
        "region_pool",
    }
    assert all(op["bytes"]["both"] > op["bytes"]["forward"] > 0 for op in result["ops"].values())


@pytest.mark.slow
def test_contenders_with_different_results_are_not_timed():
    config = preset_config(
        None, resolution=8, model_channels=8, channel_mult=(1, 2), norm_groups=2, regions=2, steps=1
    ).resolved()
    case = op_cases(config, 2, CPU, torch.float32)["region_pool"]
    case.factorkit, right = lambda *x: 1.01 * right(*x), case.factorkit
    with pytest.raises(SystemExit, match="factorkit is off by 1.0e-02, allowed 1e-03: nothing is timed"):
        measure_op(case, CPU, 1, "eager", 1e-3)
    case.factorkit = right

    def wrong(graph, inputs):
        return lambda *args: [x * 1.01 for x in graph(*args)]

    result = measure_op(case, CPU, 1, wrong, 1e-3)
    assert list(result["both"]) == ["textbook", "factorkit"] and max(result["errors"]["compiled"]) > 5e-3
    roofs = {"copy_gb_s": 1.0, "matrix_tflop_s": 1.0}
    row = ops_table({"roofs": roofs, "ops": {"region_pool": result}}).splitlines()[-1]
    assert "off by 0.01, not timed" in row and row.count("|") == 9


@pytest.mark.slow
def test_contenders_take_the_same_step():
    """Equal images, noise and weights; Adam's first step shows the gradient's sign only, so several are taken."""
    config = preset_config(
        None,
        resolution=8,
        model_channels=8,
        channel_mult=(1, 2),
        norm_groups=2,
        regions=2,
        batch_size=4,
        steps=9,
        precision="fp32",
        gradient_clip=1.0,
        learning_rate=1e-3,
        mask_learning_rate=1.0,
    ).resolved()
    start = [p.detach().clone() for p in make_task(config, CPU).model.parameters()]
    ends = {}
    for name, make in step_contenders(config, CPU, "eager").items():
        step, net = make()
        for _ in range(4):
            step()
        ends[name] = torch.cat([(p - s).flatten() for p, s in zip(net.parameters(), start, strict=True)]).detach()
    for name, end in ends.items():
        assert (end - ends["textbook"]).norm() < 0.02 * ends["textbook"].norm(), name


def test_peak_memory_counts_simultaneous_allocations():
    def run():
        for _ in range(3):
            x = torch.zeros(1 << 20, dtype=torch.uint8)
            y = x.clone()
            del x, y

    assert 2 << 20 <= peak_bytes(run, CPU) < 3 << 20


def test_spread_equals_median_and_quartiles():
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median_ms": 3.0, "low_ms": 1.5, "high_ms": 4.5}
    assert spread([2.0])["median_ms"] == 2.0
    called = []
    by_turns({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 2, CPU)
    assert called == ["a", "b", "a", "b"]
