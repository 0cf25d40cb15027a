"""Train tiny models in one process and in several, joined by gloo as torchrun would. For test_distributed.py.

python processes.py FOLDER leaves the runs ``<name>_<processes>`` there, and ``stopped``: two processes of which one
gets SIGTERM. The processes are forks of this one, which has imported torch but never used it.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # noqa: F401

from benchmarks import tiny_runs
from factorkit.segdiff.task import SegdiffTask

#: by name: the training, its settings, and in how many processes beside one, with what changes of settings
RUNS: dict[str, tuple[str, dict[str, Any], dict[int, dict[str, Any]]]] = {
    "regional": ("segdiff", {}, {2: {}, 4: {}}),
    "thesis": ("segdiff", {"form": "thesis"}, {2: {"micro_batch_size": 3}}),  # of 4: the last piece is smaller
    "dictionary": ("nerfdiff", {"tuning_steps": 3}, {2: {}, 4: {}}),
    "joint": ("nerfdiff", {"search": "joint", "field": "hashgrid", "occupancy": True}, {2: {}}),
}


def train(model: str, out: Path, **changes: Any) -> None:
    """A few steps of a tiny model, every one of which is logged."""
    steps = {"steps": 3, "precision": "fp32"} if model == "segdiff" else {}
    tiny_runs.train(model, out, **{"log_every": 1, "sample_every": 0, **steps, **changes})


def start(work: Callable[[], None], rank: int, world: int, port: int) -> int:
    """Do ``work`` in a process of its own, one of ``world``; answers its id."""
    if child := os.fork():
        return child
    signal.alarm(120)  # processes that wait for each other forever are to end, and fail the test
    try:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        torch.set_num_threads(1)
        work()
        os._exit(0)
    except SystemExit as end:
        os._exit(end.code)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def stop_in(step: int) -> None:
    """SIGTERM in a step of segdiff's training."""
    loss = SegdiffTask.loss

    def watched(task, model, indices, draw, at):
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(task, model, indices, draw, at)

    SegdiffTask.loss = watched


def run(world: int, work: Callable[[int], None]) -> list[int]:
    """Exit codes of the processes, each of which does ``work(rank)``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [start(lambda rank=rank: work(rank), rank, world, port) for rank in range(world)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def stopped(out: Path, rank: int) -> None:
    if rank == 1:
        stop_in(2)
    train("segdiff", out, steps=50)


def main(folder: Path) -> None:
    for name, (model, settings, several) in RUNS.items():
        for world, changes in {1: {}, **several}.items():
            out, chosen = folder / f"{name}_{world}", settings | changes
            codes = run(world, lambda rank, out=out, model=model, chosen=chosen: train(model, out, **chosen))
            assert codes == [0] * world, (name, world, codes)
    codes = run(2, lambda rank: stopped(folder / "stopped", rank))
    assert codes == [143, 143], codes


if __name__ == "__main__":
    main(Path(sys.argv[1]))
