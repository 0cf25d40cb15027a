"""The scripts that launch large runs, with stand-ins for Slurm and torchrun that record their arguments."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

COMMANDS = {
    "scontrol": 'echo scontrol "$@" >> calls; echo alpha; echo beta',
    "srun": 'echo srun "$@" >> calls; echo $$ > srun.pid; trap "echo saved >> calls; exit 143" TERM\n'
    "while [ -e running ]; do sleep 0.02; done; exit 3",
    "scancel": 'echo scancel "$@" >> calls; kill -TERM $(cat srun.pid)',
    "torchrun": 'echo torchrun "$@" >> calls',
    "nvidia-smi": "echo GPU 0; echo GPU 1; echo GPU 2",
}


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a script in a folder where the file ``calls`` lists the commands it called."""
    for name, body in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "running").touch()
    slurm = {"SLURM_JOB_NODELIST": "alpha,beta", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "77"}

    def run(script: str, *arguments: str) -> subprocess.Popen:
        environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return subprocess.Popen(["bash", EXAMPLES / script, *arguments], cwd=tmp_path, env=environment)

    return run


def read_calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


TRAINING = "srun torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d --rdzv-id 77 "
TRAINING += "--rdzv-endpoint alpha:29500 -m factorkit train segdiff --out runs/a b"


def test_slurm_script_time_limit_saves_and_requeues(start, tmp_path):
    job = start("slurm.sbatch", "train", "segdiff", "--out", "runs/a b")
    while not (tmp_path / "srun.pid").exists():
        time.sleep(0.02)
    time.sleep(0.3)  # the script waits by then
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) != 0
    first, *rest = read_calls(tmp_path)
    assert first == "scontrol show hostnames alpha,beta"
    assert rest == [TRAINING, "scancel --signal=TERM 77", "saved", "scontrol requeue 77"]


def test_slurm_script_failed_training_returns_its_exit_status(start, tmp_path):
    (tmp_path / "running").unlink()
    assert start("slurm.sbatch", "train", "segdiff", "--out", "runs/a b").wait(20) == 3
    assert read_calls(tmp_path)[1:] == [TRAINING]


def test_two_machines_script_starts_one_process_per_gpu(start, tmp_path):
    assert start("two_machines.sh", "alpha", "train", "nerfdiff", "--out", "a b").wait(20) == 0
    expected = "torchrun --nnodes 2 --nproc-per-node 3 --max-restarts 3 --rdzv-backend c10d --rdzv-id factorkit "
    assert read_calls(tmp_path) == [f"{expected}--rdzv-endpoint alpha:29500 -m factorkit train nerfdiff --out a b"]
