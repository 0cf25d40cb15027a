"""Training under SIGKILL: final states after kills are compared bit by bit with those of uninterrupted runs.

    python -m benchmarks.faults --kills 200

Half of the kills come from outside, at a moment drawn uniformly over the rest of the run; a note in shared memory that
the training updates records what they hit. The others come before, during or after a file operation (a write, a sync,
a rename, a removal) drawn by its number. When a run reaches its end it is compared, its folder and prepared images are
deleted, and the next run begins. Each training is a fork of this process, which has imported torch but never used it:
starting Python after every kill would take most of the time and changes nothing about what a kill leaves on disk.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo

from benchmarks import tiny_runs
from benchmarks.recording import commit, machine, write_result
from factorkit.engine import checkpoint
from factorkit.engine.checkpoint import Checkpoints
from factorkit.engine.state import TrainingState
from factorkit.engine.step import TrainingStep
from factorkit.engine.trainer import Trainer
from factorkit.nerfdiff import train as nerfdiff
from factorkit.segdiff import train as segdiff

RESULTS = Path(__file__).with_name("results") / "faults.json"
OPERATIONS = 30  # the last of a process's file operations that a kill may choose
FIRST = 5  # a third of the kills choose among so many, most of them of the preparation
COMMON = {"checkpoint_every": 2, "keep_checkpoints": 2, "sample_every": 3, "log_every": 2}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "segdiff, network": ("segdiff", {"steps": 40}),
    "segdiff, objects": ("segdiff", {"masks": "auto", "mixture_steps": 12, "distil_steps": 12, "steps": 12}),
    "autoencoder": ("autoencoder", {"steps": 20}),
    "nerfdiff, dictionary": ("nerfdiff", {"finetune_steps": 6, "search_steps": 12}),
    "nerfdiff, joint": ("nerfdiff", {"search": "joint", "steps": 24, "field": "hashgrid", "occupancy": True}),
    "nerfdiff, gaussians": (
        "nerfdiff",
        {"field": "gaussians", "gaussian_steps": 12, "finetune_steps": 6, "search_steps": 12},
    ),
}


class Kill(NamedTuple):
    """After so many seconds from outside, or before, after or half-way through the n-th file operation."""

    seconds: float | None = None
    operation: int = 0
    moment: str = "before"


class Notes:
    """What the training is doing and what is being written behind its back: shared with the parent process."""

    SIZE = 64

    def __init__(self):
        self.memory = mmap.mmap(-1, 2 * self.SIZE)

    def doing(self, slot: int, what: str | None = None) -> str:
        place = slice(slot * self.SIZE, (slot + 1) * self.SIZE)
        if what is not None:
            self.memory[place] = what.encode().ljust(self.SIZE, b"\0")
        return self.memory[place].rstrip(b"\0").decode()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def watch(notes: Notes, kill: Kill | None) -> None:
    """Keep the notes of this process, and kill it where a file operation is to be its last."""
    count = itertools.count(1)

    def operation(what: str, work: Callable) -> Callable:
        def done(*arguments, **options):
            fatal = kill is not None and next(count) == kill.operation
            before = notes.doing(1)
            which = f"preparing data, {what}" if notes.doing(0) == "preparing data" else what
            halves = fatal and kill.moment == "half-way" and what == "a write"
            when = "half-way" if halves else "before" if fatal and kill.moment == "before" else "after"
            notes.doing(1, f"{which}, {when}" if fatal else which)
            if fatal and when == "before":
                die()
            answer = work(*arguments, **options)
            if fatal:
                if halves:
                    os.truncate(arguments[1], random.randrange(os.path.getsize(arguments[1])))
                die()
            notes.doing(1, before)
            return answer

        return done

    def noted(what: str, work: Callable) -> Callable:
        def done(*arguments, **options):
            before = notes.doing(0)
            notes.doing(0, what)
            try:
                return work(*arguments, **options)
            finally:
                notes.doing(0, before)

        return done

    checkpoint.save_file = operation("a write", checkpoint.save_file)
    os.fsync, os.replace = operation("a sync", os.fsync), operation("a rename", os.replace)
    Path.rename, Path.unlink = operation("a rename", Path.rename), operation("a removal", Path.unlink)
    TrainingStep.__call__ = noted("a step", TrainingStep.__call__)
    TrainingState.tensors, Trainer.restore = (
        noted("a copy of the state", TrainingState.tensors),
        noted("resuming", Trainer.restore),
    )
    segdiff.load_data = noted("preparing data", segdiff.load_data)
    nerfdiff.store_views = noted("preparing data", nerfdiff.store_views)


def run(name: str, folder: Path, notes: Notes, kill: Kill | None = None) -> bool:
    """Train ``folder/run`` in a process of its own; whether it reached the end.

    Raises:
        RuntimeError: it ended in any other way than by its kill.
    """
    notes.doing(0, "starting"), notes.doing(1, "")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            # nothing is damaged by a kill: going back to an earlier checkpoint would hide it
            warnings.filterwarnings("error", message=".*Using the previous")
            os.environ["FACTORKIT_CACHE"] = str(folder / "cache")
            watch(notes, kill)
            model, changes = RUNS[name]
            data = tiny_runs.make_noise_images(folder.parent / "photos") if model != "nerfdiff" else None
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # until this forked process ends
            tiny_runs.train(model, folder / "run", data, **COMMON | changes)
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            sys.__stderr__.flush()
            os._exit(status)
    if kill is not None and kill.seconds is not None:
        time.sleep(kill.seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL) or (status and kill is None):
        raise RuntimeError(f"{name} in {folder} ended with {status} after {kill}")
    return status == 0


def differing(one: Path, other: Path) -> list[str]:
    """Names of what differs in the newest checkpoints of two runs; nothing where they are the same to the last bit."""
    (a, facts), (b, other_facts) = (Checkpoints(folder / "run/checkpoints").latest() for folder in (one, other))
    same = [name for name in a.keys() & b.keys() if torch.equal(a[name], b[name])]
    names = sorted((a.keys() | b.keys()) - set(same))
    return names + [k for k in facts.keys() | other_facts.keys() if facts.get(k) != other_facts.get(k)]


def endure(name: str, kills: int, folder: Path, chance: random.Random, notes: Notes) -> dict[str, Any]:
    """Kill trainings so many times; how often what was hit, how many runs that were and in how many weights differ."""
    whole, broken = folder / "whole", folder / "broken"
    start = time.perf_counter()
    run(name, whole, notes)
    length, hit, runs, differ, here = time.perf_counter() - start, Counter(), 0, [], 0
    while True:
        left = kills - hit.total()
        kill = None
        if left and chance.random() < 0.5:
            kill = Kill(seconds=chance.uniform(0, length / (1 + here)))
        elif left:
            last = chance.choice((FIRST, OPERATIONS, OPERATIONS))
            kill = Kill(operation=chance.randint(1, last), moment=chance.choice(("before", "half-way", "after")))
        ended = run(name, broken, notes, kill)
        if not ended:
            what = notes.doing(1) or notes.doing(0)
            hit[what if kill.seconds is None else f"{what}, from outside"] += 1
            here += 1
            continue
        if here:
            runs += 1
            differ += [f"run {runs}: {what}" for what in differing(whole, broken)]
            here = 0
        shutil.rmtree(broken)
        if not left:
            break
    return {"kills": hit.total(), "hit": dict(sorted(hit.items())), "runs": runs, "differing": differ}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="of all trainings together")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; without: of this moment")
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results as it is")
    flags = parser.parse_args()
    seed = int(time.time()) if flags.seed is None else flags.seed
    chance, notes, result, processor = random.Random(seed), Notes(), {}, time.process_time()
    measured = commit()  # before it may change
    shares = {name: flags.kills * (i + 1) // len(RUNS) - flags.kills * i // len(RUNS) for i, name in enumerate(RUNS)}
    with tempfile.TemporaryDirectory() as folder:
        for name, kills in shares.items():
            result[name] = endure(name, kills, Path(folder) / name.replace(", ", "_"), chance, notes)
            print(f"{name}: {kills} kills in {result[name]['runs']} runs, {len(result[name]['differing'])} differ")
            for what, count in result[name]["hit"].items():
                print(f"  {count:4} {what}")
    times = os.times()
    record = {
        "runs": result,
        "kills": sum(f["kills"] for f in result.values()),
        "seed": seed,
        "commit": measured,
        "machine": machine(1),
        "torch": torch.__version__,
        "processor_seconds": round(time.process_time() - processor + times.children_user + times.children_system),
    }
    broken = [what for f in result.values() for what in f["differing"]]
    print(f"{record['kills']} kills survived, {len(broken)} differences, {record['processor_seconds']} s of processor")
    print(json.dumps(record | {"runs": None}), file=sys.stderr)
    if not flags.no_record:
        write_result(RESULTS, "kills", record)
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
