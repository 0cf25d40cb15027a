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

import numpy as np
import torch
import torch._dynamo  # noqa: F401

from factorkit.data.views import Views
from factorkit.engine import loop
from factorkit.nerfdiff import distil, fit, joint, search
from factorkit.nerfdiff import train as nerfdiff
from factorkit.segdiff.task import SegdiffTask
from factorkit.segdiff.train import train_segdiff

#: by name: the training, its settings, and in how many processes beside one, with what changes of settings
RUNS: dict[str, tuple[str, dict[str, Any], dict[int, dict[str, Any]]]] = {
    "regional": ("segdiff", {}, {2: {}, 4: {}}),
    "thesis": ("segdiff", {"form": "thesis"}, {2: {"micro_batch_size": 3}}),  # of 4: the last piece is smaller
    "dictionary": ("nerfdiff", {"tuning_steps": 3}, {2: {}, 4: {}}),
    "joint": ("nerfdiff", {"search": "joint", "field": "hashgrid", "occupancy": True}, {2: {}}),
}


def train(model: str, out: Path, **changes: Any) -> None:
    """A few steps of a tiny model on noise."""
    SegdiffTask.inspect = lambda *arguments: {}
    loop.write_report = lambda folder: None
    if model == "segdiff":
        images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8)
        train_segdiff(
            images, out=out, width=8, resolution=16, multipliers=(1, 2), blocks=1, attention=(), groups=4,
            batch_size=8, device="cpu", precision="fp32", log_every=1, progress=False, **{"steps": 3, **changes},
        )  # fmt: skip
        return
    nerfdiff.HALF_STEPS = 3
    for module in (distil, fit, joint, search):
        for sheet in {"cameras_sheet", "renders_sheet"} & vars(module).keys():
            setattr(module, sheet, lambda *arguments: None)
    images = torch.from_numpy(np.random.default_rng(0).random((10, 3, 8, 8), np.float32))
    intrinsics = torch.tensor([[12.0, 0, 4], [0, 12, 4], [0, 0, 1]]).expand(10, 3, 3)
    settings = {
        "preset": "demo", "resolution": 8, "cameras": 3, "azimuths": 6, "rings": 2, "search_field": 6, "grid": 8,
        "samples": 4, "views": 4, "rays": 8, "search_steps": 22, "field_steps": 12, "steps": 12, "batch_size": 4,
        "width": 8, "multipliers": (1, 2), "encoder_resolution": 8, "rendered": 5, "flip_rounds": 1, "log_every": 1,
        "device": "cpu", "progress": False, "threads": 1,
    }  # fmt: skip
    views = Views(images, [str(i) for i in range(10)], intrinsics)
    nerfdiff.train_nerfdiff(views, out=out, **settings | changes)


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
