"""Train the tiny segdiff twice: ``whole`` without interruption, ``killed`` with repeated SIGKILLs. For test_resume.py.

python killed_run.py FOLDER pixels|latents prints the number of kills by moment; "latents": with an own autoencoder.
The runs are forks of this process, which has imported torch but not used it; importing it after each kill would take
most of the time.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch._dynamo  # noqa: F401

from factorkit.engine import checkpoint
from factorkit.segdiff import autoencoder, settle
from factorkit.segdiff import train as training
from factorkit.segdiff.autoencoder import AutoencoderTask
from factorkit.segdiff.masks.cued_mixture import CuedMixtureTask
from factorkit.segdiff.masks.distil import DistilTask
from factorkit.segdiff.task import SegdiffTask
from factorkit.segdiff.train import train_segdiff

SIDE = 48  # of photos that are denoised as latents
#: in the order of a run
TASKS = {
    "autoencoder": AutoencoderTask,
    "mixture": CuedMixtureTask,
    "mask network": DistilTask,
    "branches": SegdiffTask,
}
#: by kind of run: its settings, and when it is killed, one time after another
RUNS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "pixels": (
        {"steps": 40, "masks": "network", "resolution": 16},
        ["step", "half a file", "step", "before the rename", "step", "after the rename"],
    ),
    "latents": ({"steps": 5, "mixture_steps": 5, "distil_steps": 5, "resolution": SIDE, "preset": "demo"}, list(TASKS)),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train(out: Path, **settings: Any) -> None:
    side = settings["resolution"]
    images = np.random.default_rng(0).integers(0, 256, (12, side, side, 3), np.uint8)
    train_segdiff(
        images,
        out=out,
        model_channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),
        norm_groups=4,
        batch_size=4,
        device="cpu",
        checkpoint_every=2,
        progress=False,
        **settings,
    )


def die_in_a_step(chance: random.Random) -> None:
    """Die at a random moment of one of the next few steps, or of the saves between them."""
    loss, calls, fatal, started = SegdiffTask.loss, itertools.count(1), chance.randint(2, 4), [0.0]

    def die_in_loss(*arguments):
        call = next(calls)
        if call == 1:
            started[0] = time.perf_counter()
        elif call == fatal:
            step = (time.perf_counter() - started[0]) / (call - 1)
            threading.Timer(chance.uniform(0, 1.5) * step, die).start()
        return loss(*arguments)

    SegdiffTask.loss = die_in_loss


def die_in_a_loss(task: type[Any]) -> None:
    """Die in the fourth step of a training, once its first checkpoint is written."""
    loss, write, calls, saved = task.loss, checkpoint.write_checkpoint, itertools.count(1), threading.Event()

    def write_checkpoint(*arguments):
        path = write(*arguments)
        saved.set()
        return path

    def die_in_loss(*arguments):
        call = next(calls)
        if call == 1:
            saved.clear()  # of the training before
        elif call == 4:
            saved.wait()
            die()
        return loss(*arguments)

    checkpoint.write_checkpoint, task.loss = write_checkpoint, die_in_loss


def die_in_a_save(moment: str) -> None:
    """Die in the second save, so that the run makes progress."""
    write, replace, saves = checkpoint.save_file, os.replace, itertools.count(1)

    def save_file(tensors, path, metadata):
        write(tensors, path, metadata)
        if next(saves) == 2:
            if moment == "half a file":
                os.truncate(path, path.stat().st_size // 2)
                die()
            os.replace = replace_and_die

    def replace_and_die(source, target):
        if moment == "after the rename":
            replace(source, target)
        die()

    checkpoint.save_file = save_file


def run(out: Path, kill: str | None, settings: dict[str, Any]) -> int:
    """Train in a separate process; return its exit status."""
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    try:
        # Recovery from damage is tested elsewhere; no kill may damage a file.
        warnings.filterwarnings("error", message=".*Using the previous")
        SegdiffTask.inspect = AutoencoderTask.inspect = lambda *arguments: {}
        training.write_report = autoencoder.write_report = lambda folder: None
        settle.MANY_PIXELS = SIDE
        small = {"steps": 5, "model_channels": 8, "batch_size": 2, "crop_size": 16, "checkpoint_every": 2}
        autoencoder.SETTINGS |= small
        if kill == "step":
            die_in_a_step(random.Random())
        elif kill in TASKS:
            die_in_a_loss(TASKS[kill])
        elif kill:
            die_in_a_save(kill)
        train(out, **settings)
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def main(folder: Path, kind: str) -> None:
    settings, kills = RUNS[kind]
    assert run(folder / "whole", None, settings) == 0
    for kill in kills:
        status = run(folder / "killed", kill, settings)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (kill, status)
    assert run(folder / "killed", None, settings) == 0
    print(json.dumps({kill: kills.count(kill) for kill in kills}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
