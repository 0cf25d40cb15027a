"""Train tiny models in one process and in several, joined by gloo as torchrun would. For test_distributed.py.

python processes.py FOLDER leaves the runs ``<name>_<processes>`` there; ``stopped``: two processes of which one gets
SIGTERM; ``aside``: two, in shards, of which the first draws a preview until the second is two steps further;
``spoilt``: two of which the first cannot draw a preview; ``restarted``: two of which one gets SIGKILL, under torchrun's
agent; ``grown``: one, and then four; ``resharded``: two in shards, one, and two in shards; ``registered_<processes>``:
by structure from motion, or its stand-in, without cameras for two of the views. Each process of ``latents`` leaves
hashes of its weights in ``latents_<processes>_rank_<rank>``. The processes are forks of this one, which has imported
torch but never used it.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor

from benchmarks import tiny_runs
from factorkit.engine import sharding
from factorkit.engine.run_folder import identify_run
from factorkit.engine.step import StepLoss
from factorkit.engine.trainer import Trainer
from factorkit.nerfdiff import search, unregistered
from factorkit.nerfdiff.stages import stage_training
from factorkit.report import html
from factorkit.segdiff import settle
from factorkit.segdiff.autoencoder import SETTINGS
from factorkit.segdiff.task import SegdiffTask
from factorkit.utils import distributed
from factorkit.utils.errors import DataError
from tests.nerfdiff.registered import stand_in

OBJECTS = {"masks": "auto", "regions": None, "mixture_steps": 3, "distil_steps": 3}
PHOTOS = np.random.default_rng(0).integers(0, 256, (12, 48, 48, 3), np.uint8)
AUTOENCODER = {"steps": 3, "model_channels": 8, "batch_size": 4, "crop_size": 16, "log_every": 1, "sample_every": 0}
#: by name: the training, its settings, and in how many processes beside one, with what changes of settings
RUNS: dict[str, tuple[str, dict[str, Any], dict[int, dict[str, Any]]]] = {
    "regional": ("segdiff", {}, {2: {}, 4: {}}),
    "thesis": ("segdiff", {"form": "thesis"}, {2: {"micro_batch_size": 3}}),  # of 4: the last piece is smaller
    "dictionary": ("nerfdiff", {"finetune_steps": 2}, {2: {}, 4: {}}),
    "joint": ("nerfdiff", {"search": "joint", "field": "hashgrid", "occupancy": True}, {2: {}}),
    "clipped": (
        "segdiff",
        {"form": "thesis", "checkpoint_branches": True, "gradient_clip": 0.05, "extra_ema_decays": (0.5,), "steps": 2},
        {2: {"shard": True, "micro_batch_size": 3}},
    ),
    "learned": ("nerfdiff", {"poses": "learned", "optimize_camera": ("focal",)}, {2: {"shard": True}}),
    "objects": ("segdiff", OBJECTS, {2: {}}),
    "latents": ("segdiff", OBJECTS | {"data": PHOTOS, "resolution": len(PHOTOS[0]), "preset": "demo"}, {2: {}}),
}


def train(model: str, out: Path, **changes: Any) -> None:
    """A few steps of a tiny model, every one of which is logged."""
    few = {"steps": 3, "precision": "fp32"}
    if model == "nerfdiff":
        few = {"search_steps": 12, "field_steps": 4, "steps": 4}
    tiny_runs.train(model, out, **{"log_every": 1, "sample_every": 0, **few, **changes})


def record_weights(file: Path) -> None:
    """Write a hash of the weights and their average that this process has at the end of each training."""
    run_to_end = Trainer.run

    def run_and_record(trainer):
        model = run_to_end(trainer)
        hashes = [identify_run(None, each.state_dict()) for each in (trainer.task.model, model)]
        with open(file, "a") as lines:
            lines.write(f"{trainer.folder.name}: {hashes}\n")
        return model

    Trainer.run = run_and_record


def lag_behind() -> None:
    """Make this process slower than the first one: what that writes must not change what this one decides."""
    run_on_first = distributed.run_on_first

    def late(work):
        result = run_on_first(work)
        time.sleep(0.1)
        return result

    distributed.run_on_first = late


def start(work: Callable[[], None], rank: int, world: int, port: int) -> int:
    """Do ``work`` in a process of its own, one of ``world``; answers its id."""
    if child := os.fork():
        return child
    faulthandler.dump_traceback_later(120, exit=True)  # processes that wait for each other forever end, and say where
    try:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        torch.set_num_threads(1)
        if rank:
            lag_behind()
        work()
        os._exit(0)
    except SystemExit as end:
        os._exit(end.code)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def signal_in(step: int, number: int) -> None:
    """Send this process a signal in a step of segdiff's training."""
    loss = SegdiffTask.loss

    def watched(task, model, indices, draw, at):
        if at == step:
            os.kill(os.getpid(), number)
        return loss(task, model, indices, draw, at)

    SegdiffTask.loss = watched


def run(world: int, work: Callable[[int], None]) -> list[int]:
    """Exit codes of the processes, each of which does ``work(rank)``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [start(lambda rank=rank: work(rank), rank, world, port) for rank in range(world)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def drawing(out: Path, inspect: Callable[[int], dict[str, Any]], loss: Callable[..., StepLoss], **changes: Any) -> None:
    """Train with these previews, to which the size of the averaged weights is added, and this loss."""
    tiny_runs.disable_previews()

    def weigh(model):
        return float(sum(x.double().abs().sum() for x in model.state_dict().values()))

    SegdiffTask.inspect = lambda task, model, step, folder: inspect(step) | {"weighed": weigh(model)}
    SegdiffTask.loss = loss
    settings = tiny_runs.SEGDIFF | {"steps": 6, "precision": "fp32", "log_every": 1, "sample_every": 2} | changes
    tiny_runs.train_segdiff(tiny_runs.noise_images(), out=out, **settings)


def aside(out: Path, rank: int, world: int) -> None:
    """Two processes train in shards; in the fifth step the loss of an image of the last one's is not finite."""
    passed, cut, shard, loss = out.with_name("passed"), [], sharding.shard, SegdiffTask.loss

    def inspect(step: int) -> dict[str, Any]:
        if step == 2 and world == 2:
            for _ in range(1000):
                if passed.exists():
                    break
                time.sleep(0.05)
            else:
                raise TimeoutError("the other process waits for this preview")
        return {"failures": ["bad"] if step == 4 else [], "error": 0.5 - step / 100 if step < 5 else 0.6}

    def watched(task, model, indices, draw, at):
        if rank == 1 and at == 3:  # the fourth step: two are taken since the preview was started
            passed.touch()
        found = loss(task, model, indices, draw, at)
        last = torch.arange(draw.rows.start, draw.rows.stop) == draw.batch - 1
        return found._replace(objective=found.objective * torch.where(last & (at == 4), torch.nan, 1.0))

    def watched_shard(module, *given, **options):
        cut.append(shard(module, *given, **options))
        return cut[-1]

    sharding.shard = watched_shard
    drawing(out, inspect, watched, keep_checkpoints=1, shard=True)
    assert len(cut) == (2 if world == 2 else 0)  # the model and its average
    for module in cut:
        mine = sum(p.to_local().numel() for p in module.parameters() if sharding.is_sharded(p))
        most = sum(p.numel() for p in module.parameters())
        assert 0.4 * most < mine < 0.6 * most, (mine, most)


def registered(out: Path) -> None:
    for name, value in stand_in("sfm").items():
        setattr(search, name, value)
    unregistered.MAX_ERROR_RATIO, unregistered.REFINE_STEPS = float("inf"), 8
    train("nerfdiff", out, search="sfm")


def spoilt(out: Path) -> None:
    def inspect(step: int) -> dict[str, Any]:
        raise DataError(f"no image at step {step}")

    drawing(out, inspect, SegdiffTask.loss, steps=50)


def stopped(out: Path, rank: int) -> None:
    if rank == 1:
        signal_in(2, signal.SIGTERM)
    train("segdiff", out, steps=50)


def lost(out: Path) -> None:
    """The work of a process of which the second dies in its fourth step, unless torchrun has started it again."""
    torch.set_num_threads(1)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        signal_in(3, signal.SIGKILL)
    train("segdiff", out, steps=5, checkpoint_every=1)


def restarted(out: Path) -> None:
    """What ``torchrun --nproc-per-node 2 --max-restarts 1`` does, but that processes are forked."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="restarted",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=1,
        monitor_interval=0.1,
        start_method="fork",
    )
    elastic_launch(config, lost)(out)


def leave_out_most() -> None:
    """Fit the fields of flip tests for few steps, and draw no curves in reports: most of the time of a tiny run."""
    stage_training.HELD_OUT_STEPS, html.draw_curves = 6, lambda *arguments: []


def main(folder: Path) -> None:
    settle.MANY_PIXELS = len(PHOTOS[0])
    leave_out_most()
    SETTINGS.update(AUTOENCODER)
    for name, (model, settings, several) in RUNS.items():
        for world, changes in {1: {}, **several}.items():
            out, chosen = folder / f"{name}_{world}", settings | changes

            def work(rank: int, name=name, out=out, model=model, chosen=chosen) -> None:
                if name == "latents":
                    record_weights(out.with_name(f"{out.name}_rank_{rank}"))
                train(model, out, **chosen)

            assert (codes := run(world, work)) == [0] * world, (name, world, codes)
    for world in (1, 2):
        assert run(world, lambda rank, world=world: aside(folder / f"aside_{world}", rank, world)) == [0] * world
        assert run(world, lambda rank, world=world: registered(folder / f"registered_{world}")) == [0] * world
    assert run(2, lambda rank: spoilt(folder / "spoilt")) == [1, 1]
    codes = run(2, lambda rank: stopped(folder / "stopped", rank))
    assert codes == [143, 143], codes
    assert run(2, lambda rank: train("segdiff", folder / "unbroken", steps=5, checkpoint_every=1)) == [0, 0]
    assert run(1, lambda rank: restarted(folder / "restarted")) == [0]
    chains = {"grown": [(1, {}), (4, {})], "resharded": [(2, {"shard": True}), (1, {}), (2, {"shard": True})]}
    for name, chain in chains.items():
        for steps, (world, changes) in enumerate(chain, start=4 - len(chain)):
            changes = changes | {"steps": steps}
            codes = run(world, lambda rank, name=name, changes=changes: train("segdiff", folder / name, **changes))
            assert codes == [0] * world, (name, codes)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
