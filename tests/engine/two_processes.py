"""Train the tiny segdiff in one process and in two, joined by gloo as torchrun would. For test_distributed.py.

python two_processes.py FOLDER leaves the runs ``<form>_1`` and ``<form>_2`` there, and ``stopped``: two processes of
which one gets SIGTERM. The processes are forks of this one, which has imported torch but never used it.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch._dynamo  # noqa: F401

from factorkit.engine import loop
from factorkit.segdiff.task import SegdiffTask
from factorkit.segdiff.train import train_segdiff

IN_TWO: dict[str, dict[str, Any]] = {
    "regional": {},
    "thesis": {"micro_batch_size": 3},  # of a share of 4: the last piece is smaller
}


def train(out: Path, **changes: Any) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8)
    train_segdiff(
        images, out=out, width=8, resolution=16, multipliers=(1, 2), blocks=1, attention=(), groups=4, batch_size=8,
        device="cpu", precision="fp32", log_every=1, progress=False, **{"steps": 3, **changes},
    )  # fmt: skip


def start(out: Path, rank: int, world: int, port: int, terminate: bool, **changes: Any) -> int:
    if child := os.fork():
        return child
    signal.alarm(120)  # processes that wait for each other forever are to end, and fail the test
    try:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
        SegdiffTask.inspect = lambda *arguments: {}
        loop.write_report = lambda folder: None
        if terminate and rank == 1:
            stop_in(2)
        train(out, **changes)
        os._exit(0)
    except SystemExit as end:
        os._exit(end.code)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def stop_in(step: int) -> None:
    loss = SegdiffTask.loss

    def watched(task, model, indices, draw, at):
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(task, model, indices, draw, at)

    SegdiffTask.loss = watched


def run(out: Path, world: int, *, terminate: bool = False, **changes: Any) -> list[int]:
    """Exit codes of the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [start(out, rank, world, port, terminate, **changes) for rank in range(world)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(folder: Path) -> None:
    for form, changes in IN_TWO.items():
        assert run(folder / f"{form}_1", 1, form=form) == [0]
        assert run(folder / f"{form}_2", 2, form=form, **changes) == [0, 0]
    codes = run(folder / "stopped", 2, terminate=True, steps=50)
    assert codes == [143, 143], codes


if __name__ == "__main__":
    main(Path(sys.argv[1]))
