"""The suites of benchmarks/ on tiny settings: what is compared before it is timed, and what is stored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="the suites need pytest-benchmark: pip install -e '.[test]'")

from benchmarks.conftest import Measurement
from benchmarks.contenders import REGION_OPS, count_bytes, make_step, make_task, region_op
from benchmarks.measure import median_seconds, peak_bytes, repeats_of
from benchmarks.rendering_cases import RENDERING_OPS, import_peer, rendering_op
from benchmarks.test_ops import DIRECTIONS, IMPLEMENTATIONS, time_op
from benchmarks.test_training import gradient_error
from factorkit import ops
from factorkit.segdiff.config import preset_config

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = {
    "masks": "network",
    "resolution": 8,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "norm_groups": 2,
    "regions": 2,
    "steps": 1,
}


def test_suites_store_each_result_at_once_and_skip_what_is_absent(tmp_path):
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "--rows", str(rows)]
    command += ["--batch", "2", "--compiler", "aot_eager", "--benchmark-max-time", "0.01", "-p", "no:cacheprovider"]
    command += ["-k", "region_pool or segment or sample_pdf", "-rs"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    results = {row["name"]: row for row in map(json.loads, rows.read_text().splitlines())}
    wanted = {f"test_region_op[cpu-region_pool-{way}-{kind}]" for way in IMPLEMENTATIONS for kind in DIRECTIONS}
    wanted |= {f"test_rendering_op[cpu-sample_pdf-{way}-forward]" for way in IMPLEMENTATIONS} | {"test_segment[cpu]"}
    assert set(results) == wanted and "sample_pdf has no gradient" in done.stdout
    for row in results.values():
        assert 0 < row["q1_ms"] <= row["median_ms"] <= row["q3_ms"] and row["rounds"] >= 3 and row["threads"] == 1
    assert results["test_region_op[cpu-region_pool-ours-both]"]["error"] < 0.05
    assert "benchmark 'region_pool both, cpu': 3 tests" in done.stdout


def test_every_op_has_a_case():
    assert {name.split()[0] for name in (*REGION_OPS, *RENDERING_OPS)} == set(ops.IMPLEMENTATIONS)


def test_implementations_with_different_results_are_not_timed():
    config = preset_config(None, **TINY).resolved()
    case, calls = region_op("region_pool", config, 2, CPU, torch.float32), []
    case.peers["peer"] = lambda *x: 1.01 * case.reference(*x)
    request = SimpleNamespace(config=SimpleNamespace(getoption=lambda name: "eager"))

    def time_way(way):
        time_op(case, "region_pool", way, "both", 1e-3, lambda run, group, **info: calls.append((group, info)), request)

    with pytest.raises(pytest.skip.Exception, match="off by 1.0e-02, allowed 1e-03: not timed"):
        time_way("peer")
    time_way("ours")
    case.ours = case.peers["peer"]
    with pytest.raises(pytest.fail.Exception, match="region_pool is off by 1.0e-02"):
        time_way("ours")
    assert [(group, sorted(info)) for group, info in calls] == [("region_pool both", ["error"])]


def test_peer_that_fails_at_import_is_absent_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "broken_peer.py").write_text("raise RuntimeError('Error building extension\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_peer("broken_peer") == "broken_peer is absent: RuntimeError: Error building extension"
    monkeypatch.setitem(sys.modules, "nerfacc", None)
    with pytest.raises(ModuleNotFoundError, match="nerfacc is absent: ModuleNotFoundError"):
        rendering_op("composite dense", 4, CPU).peers["nerfacc"]()


def test_function_without_enough_gpu_memory_is_skipped():
    def run():
        raise torch.cuda.OutOfMemoryError("out of memory")

    with pytest.raises(pytest.skip.Exception, match="a smaller --batch may fit"):
        Measurement(None, CPU, 1.0)(run, "group")


def test_our_kernels_bytes_are_counted_without_a_gpu():
    pytest.importorskip("triton")
    config = preset_config(None, **TINY).resolved()
    moved = count_bytes(region_op("group_norm_silu", config, 2, CPU, torch.float32))
    assert moved["both"] > moved["forward"] > 0


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
    for name in ("reference", "folded", "ours"):
        step, net = make_step(name, config, CPU, "eager")
        for _ in range(4):
            step()
        ends[name] = torch.cat([(p - s).flatten() for p, s in zip(net.parameters(), start, strict=True)]).detach()
    for name, end in ends.items():
        assert (end - ends["reference"]).norm() < 0.02 * ends["reference"].norm(), name


def test_peak_memory_counts_simultaneous_allocations():
    def run():
        for _ in range(3):
            x = torch.zeros(1 << 20, dtype=torch.uint8)
            y = x.clone()
            del x, y

    assert 2 << 20 <= peak_bytes(run, CPU) < 3 << 20


def test_short_functions_are_repeated_on_a_gpu_only():
    assert repeats_of(1e-3, torch.device("cuda")) == 20 and repeats_of(1e-3, CPU) == repeats_of(1, CPU) == 1
    calls = []
    assert median_seconds(lambda: calls.append(1), 3, CPU) >= 0 and len(calls) == 5


def test_gradient_error_of_a_model_that_loses_one_gradient_is_1():
    config = preset_config(None, **TINY, form="thesis", batch_size=2, precision="fp32").resolved()
    model = make_task(config, CPU).model
    assert gradient_error(model, config, CPU) < 1e-5
    bias = next(p for name, p in model.named_parameters() if name.endswith("bias"))
    bias.register_hook(torch.zeros_like)
    assert gradient_error(model, config, CPU) == 1.0
