from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import factorkit
from factorkit.engine import distributed
from factorkit.engine.checkpoint import read_checkpoint
from factorkit.engine.log import read_log
from factorkit.errors import ConfigError

TWO_PROCESSES = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    done = subprocess.run(
        [sys.executable, str(TWO_PROCESSES), str(folder)], capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(factorkit.__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def lines(folder: Path) -> list[dict]:
    return [event for event in read_log(folder) if event["event"] == "step"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors, _ = read_checkpoint(folder / "checkpoints/step_00000003.safetensors")
    return tensors


@pytest.mark.parametrize("form", ["regional", "thesis"])
def test_two_processes_train_as_one(runs, form):
    """The thesis' form in pieces too: it has no statistics over the batch."""
    alone, together = runs / f"{form}_1", runs / f"{form}_2"
    assert [line["step"] for line in lines(together)] == [1, 2, 3]  # one process writes
    for one, two in zip(lines(alone), lines(together), strict=True):
        for name in ("loss", "loss_by_quarter", "areas", "entropy", "images"):
            found, expected = (np.array(line[name], float) for line in (two, one))  # an empty quarter's None is NaN
            np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=f"{name} at step {one['step']}")
    expected, found = weights(alone), weights(together)
    assert expected.keys() == found.keys()
    for name in expected:
        # Adam divides by the gradient's size: of a gradient that is only rounding, it makes a whole step
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=5e-5, msg=name)


def test_a_signal_to_one_process_stops_all_of_them_together(runs):
    assert [p.name for p in (runs / "stopped/checkpoints").iterdir()] == ["step_00000003.safetensors"]
    assert [e["step"] for e in read_log(runs / "stopped") if e["event"] == "signal"] == [3]


def test_a_batch_that_cannot_be_shared_equally_is_refused(toy, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(ConfigError, match="batch_size=4 .* 3 processes.* batch_size=3 or 6"):
        toy(batch_size=4)
    with pytest.raises(ConfigError, match="such as batch_size=3 "):
        toy(batch_size=2)
    monkeypatch.setattr("factorkit.segdiff.train.prepare", lambda *given, **options: pytest.fail("prepared already"))
    with pytest.raises(ConfigError, match="batch_size=16 .* 3 processes"):
        factorkit.train_segdiff(out="runs", preset="demo", device="cpu")


def test_alone_nothing_is_joined_or_changed(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    cpu = torch.device("cpu")
    distributed.join(cpu)
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(distributed.average(values), values)
    assert distributed.greatest(15, cpu) == 15
    distributed.barrier()


def test_each_process_of_a_machine_takes_its_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert distributed.local_device(torch.device("cuda")) == torch.device("cuda", 2)
    assert distributed.local_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert distributed.local_device(torch.device("cpu")) == torch.device("cpu")
