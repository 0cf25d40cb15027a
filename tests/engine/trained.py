"""What tests of the loop ask of runs, and do to them."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import factorkit
from factorkit.engine import checkpoint
from factorkit.engine.checkpoint import read_checkpoint
from factorkit.utils.files import read_log


def run_script(script: Path, folder: Path, timeout: float) -> Path:
    """Run a script of the tests on a folder, with stderr in stderr.txt; it imports the same package and benchmarks."""
    places = [Path(factorkit.__file__).parents[1], Path(__file__).parents[2]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, places))}
    command = [sys.executable, str(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stderr
    (folder / "stderr.txt").write_text(done.stderr)
    return folder


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").glob("step_*.safetensors"))
    return read_checkpoint(newest)[0]


def assert_identical(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def events(folder: Path) -> list[tuple[str, int]]:
    return [(e["event"], e["step"]) for e in read_log(folder)]


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(p.stem.removeprefix("step_")) for p in (folder / "checkpoints").glob("step_*.safetensors"))


def kill_at(step: int, number: int):
    """A hook for the toy that raises a signal in a step."""

    def hook(at, error):
        if at == step:
            os.kill(os.getpid(), number)
        return error

    return hook


def make_nan_losses(*steps: int):
    """A hook for the toy that makes these steps' losses NaN."""
    return lambda step, error: error * float("nan") if step in steps else error


def full_at(monkeypatch, step: int, last: int = 999) -> None:
    """The disk is full when the toy's checkpoints of these steps are written."""
    write = checkpoint.save_file

    def full(tensors, path, metadata):
        if step <= json.loads(metadata["meta"])["step"] <= last:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
