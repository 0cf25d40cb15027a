"""Options, devices and the measurement of the suites: ``pytest benchmarks/ --benchmark-only``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.contenders import PRESETS
from benchmarks.measure import clock, machine, repeats_of, time_call
from benchmarks.recording import append_row
from factorkit.segdiff.config import SegdiffConfig, preset_config

LARGE_GPU_BYTES = 100 * 2**30  # below it the default batch is half the preset's
MIN_ROUNDS, MAX_ROUNDS = 3, 50
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("factorkit")
    group.addoption("--preset", help="of the model; demo on a CPU and flowers64 on a GPU, if left out")
    group.addoption("--batch", type=int, help="images a step; the preset's if left out, half of it below 100 GB")
    group.addoption("--threads", type=int, default=1, help="CPU threads; with one, the process's own time is measured")
    group.addoption("--compiler", default="inductor", help="torch.compile's backend")
    group.addoption("--rows", type=Path, help="takes each result as soon as it is measured, one line of JSON each")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test the clock of its device: pytest-benchmark reads it from a marker."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if "device_name" in parameters:
            item.add_marker(pytest.mark.benchmark(timer=clock(torch.device(parameters["device_name"]))))


@pytest.fixture(params=DEVICES)
def device_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device(device_name: str) -> Iterator[torch.device]:
    torch.manual_seed(0)
    yield torch.device(device_name)
    if device_name == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def segdiff_config(request: pytest.FixtureRequest, device: torch.device) -> SegdiffConfig:
    """The configuration whose sizes are measured."""
    preset = request.config.getoption("--preset") or PRESETS[device.type]
    config = preset_config(preset, masks="network").resolved()
    batch = request.config.getoption("--batch") or config.batch_size
    if device.type == "cuda" and not request.config.getoption("--batch"):
        large = torch.cuda.get_device_properties(device).total_memory > LARGE_GPU_BYTES
        batch = batch if large else max(1, batch // 2)
    return preset_config(None, **{**config.to_dict(), "batch_size": batch}).resolved()


@dataclass
class Measurement:
    """Calls a function a few times and hands its times to pytest-benchmark."""

    benchmark: Any
    device: torch.device
    max_seconds: float
    rows: Path | None = None

    def __call__(self, run: Callable[[], object], group: str, **info: object) -> None:
        """Measure ``run``; ``group`` is the table it appears in, ``info`` is stored with the times."""
        out_of_memory_skips(run)
        seconds = time_call(run, self.device)
        repeats = repeats_of(seconds, self.device)
        rounds = int(self.max_seconds / max(1e-9, repeats * seconds))
        self.benchmark.group = f"{group}, {self.device.type}"
        self.benchmark.extra_info.update(machine(self.device), **info)
        self.benchmark.pedantic(run, iterations=repeats, rounds=min(MAX_ROUNDS, max(MIN_ROUNDS, rounds)))
        if self.rows and self.benchmark.stats:
            times = self.benchmark.stats.stats
            quartiles = {f"{name}_ms": round(1e3 * getattr(times, name), 5) for name in ("median", "q1", "q3")}
            name = {"name": self.benchmark.name, "group": self.benchmark.group}
            append_row(self.rows, {**name, **quartiles, "rounds": times.rounds, **self.benchmark.extra_info})


@pytest.fixture
def measure(benchmark: Any, device: torch.device, request: pytest.FixtureRequest) -> Measurement:
    options = request.config
    return Measurement(benchmark, device, float(options.getoption("benchmark_max_time")), options.getoption("--rows"))


def out_of_memory_skips(run: Callable[[], Any]) -> Any:
    """Return what ``run`` returns; skip the test where the GPU's memory is too small."""
    try:
        return run()
    except torch.cuda.OutOfMemoryError:
        pytest.skip("out of GPU memory; a smaller --batch may fit")
