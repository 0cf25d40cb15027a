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
from factorkit.engine.checkpoint import Checkpoints
from factorkit.engine.log import read_log
from factorkit.errors import ConfigError

PROCESSES = Path(__file__).with_name("processes.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    done = subprocess.run(
        [sys.executable, str(PROCESSES), str(folder)], capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(factorkit.__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def lines(folder: Path) -> dict[str, list[dict]]:
    """What each stage of a run logged of its steps."""
    logs = {str(path.parent.relative_to(folder)): read_log(path.parent) for path in folder.rglob("log.jsonl")}
    return {stage: [event for event in log if event["event"] == "step"] for stage, log in logs.items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return Checkpoints(folder / "checkpoints").latest()[0]


@pytest.mark.parametrize(
    ("name", "world"),
    [("regional", 2), ("regional", 4), ("thesis", 2), ("dictionary", 2), ("dictionary", 4), ("joint", 2)],
)
def test_several_processes_train_as_one(runs, name, world):
    """The thesis' form in pieces too: it has no statistics over the batch."""
    alone, together = lines(runs / f"{name}_1"), lines(runs / f"{name}_{world}")
    assert alone.keys() == together.keys() and len(alone) == {"dictionary": 7}.get(name, 1)
    for stage, expected in alone.items():
        assert [line["step"] for line in together[stage]] == list(range(1, len(expected) + 1))  # one process writes
        for one, other in zip(expected, together[stage], strict=True):
            for key in one.keys() - {"event", "time", "step", "seconds", "seconds_left", "images_per_second"}:
                found, wanted = (np.array(line[key], float) for line in (other, one))  # an empty quarter's None is NaN
                close = {"rtol": 1e-4, "atol": 1e-6, "err_msg": f"{key} at step {one['step']} of {stage}"}
                np.testing.assert_allclose(found, wanted, **close)
    expected, found = weights(runs / f"{name}_1"), weights(runs / f"{name}_{world}")
    assert expected.keys() == found.keys()
    for name in expected:
        # Adam divides by the gradient's size: of a gradient that is only rounding, it makes a whole step
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=5e-4, msg=name)


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
    assert distributed.greatest(15) == 15
    distributed.barrier()


def test_each_process_of_a_machine_takes_its_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert distributed.local_device(torch.device("cuda")) == torch.device("cuda", 2)
    assert distributed.local_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert distributed.local_device(torch.device("cpu")) == torch.device("cpu")
