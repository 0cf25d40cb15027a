"""Train the tiny nerfdiff twice, ``whole`` in one go and ``killed`` by SIGKILL in every stage. For test_kill.py.

python killed_run.py FOLDER writes to kills.json there in which stages kills fell. The runs are forks of this process,
which has imported torch but never used it: starting afresh after each kill would take most of the time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch._dynamo

from factorkit.data.views.views import Views
from factorkit.nerfdiff import held_out, search, search_record, unregistered
from factorkit.nerfdiff.fields import gaussians
from factorkit.nerfdiff.search_record import REJECTED_FOLDER, Trial
from factorkit.nerfdiff.stages import dictionary, distil, joint, localise, pipeline, pose_search, stage_training
from factorkit.nerfdiff.stages import refine as fit
from factorkit.nerfdiff.train import train_nerfdiff
from factorkit.rendering import orbit
from tests.nerfdiff.registered import stand_in

SFM_STAGES = ["sfma", "refine", "distil", "cross 6a", "cross 6b", "shared 6a", "shared 6b"]  # "sfma": its first check
#: by run: its settings, and the stages it is killed in, in their order
RUNS = {
    "dictionary": ({"finetune_steps": 6}, ["search", "refine", "flip 0a", "flip 0b", "refine again", "distil", "tune"]),
    "ordered": ({"ordered": "yes"}, ["start right 25 half b", "start search", "start uneven 1", "refine"]),
    "own field": ({"field": "mlp", "flip_rounds": 0}, ["fit"]),
    "joint": ({"search": "joint"}, ["joint"]),
    "supervised": ({"poses": "learned"}, ["fit"]),
    "room": ({"poses": "known", "unbounded": "yes"}, ["fit"]),
    # killed while it is drawn at a quarter, and at half of its pixels
    "gaussians": (
        {"poses": "learned", "field": "gaussians", "num_gaussians": 30, "gaussian_steps": 16},
        ["gaussians", "gaussians"],
    ),
    # both searches are rejected; the first one is taken up again
    "registered": ({"unbounded": "no"}, [*SFM_STAGES, "localise", "set aside", "search", "take up"]),
}
TINY = {
    "preset": "demo",
    "resolution": 8,
    "num_candidates": 3,
    "num_azimuths": 6,
    "num_elevations": 2,
    "search_grid_resolution": 6,
    "grid_resolution": 8,
    "samples_per_ray": 4,
    "views_per_step": 3,
    "rays_per_view": 8,
    "search_steps": 12,
    "field_steps": 6,
    "steps": 6,
    "batch_size": 4,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "encoder_resolution": 8,
    "num_rendered_views": 4,
    "flip_rounds": 1,
    "checkpoint_every": 2,
    "log_every": 2,
    "device": "cpu",
    "progress": False,
}
FATAL = 5  # the step of a stage, of at least six, that the kill falls into or after: the first save is over by then


def views(poses: bool) -> Views:
    """Ten images of noise; where their cameras are found does not matter, that it is the same place does."""
    images = torch.from_numpy(np.random.default_rng(0).random((10, 3, 8, 8), np.float32))
    intrinsics = torch.tensor([[12.0, 0, 4], [0, 12, 4], [0, 0, 1]]).expand(10, 3, 3)
    return Views(images, [str(i) for i in range(10)], intrinsics, poses=orbit(10, 3.0, 20.0) if poses else None)


def counted(loss):
    """Let a random moment of the fatal step of a loss, or of the save after it, be the end."""
    started = [0, 0.0]

    def watched(*arguments):
        started[0] += 1
        if started[0] == 1:
            started[1] = time.perf_counter()
        if started[0] == FATAL:
            step = (time.perf_counter() - started[1]) / (FATAL - 1)
            threading.Timer(random.uniform(0, step), os.kill, (os.getpid(), signal.SIGKILL)).start()
        return loss(*arguments)

    return watched


def die_moving(is_taken_up: bool) -> None:
    """When a random part of a training is set aside, or taken up again."""
    plain = search_record.list_training

    def listed(folder):
        paths = list(plain(folder))
        if is_taken_up == (folder.parent.name == REJECTED_FOLDER):
            yield from paths[: random.randint(0, len(paths))]
            os.kill(os.getpid(), signal.SIGKILL)
        yield from paths

    search_record.list_training = listed


def die_in(stage: str) -> None:
    """At a random moment of a step of that stage, or of the save after it."""
    if stage in ("set aside", "take up"):
        die_moving(stage == "take up")
        return
    if stage == "localise":
        minimise = localise.minimise
        localise.minimise = lambda loss, *rest: minimise(counted(loss), *rest)
        return
    plain = pipeline.Training.train_stage

    def trainer(self, name, task, *rest, **changes):
        if name != stage:
            return plain(self, name, task, *rest, **changes)

        def watched(config):
            made = task(config)
            made.loss = counted(made.loss)
            return made

        return plain(self, name, watched, *rest, **changes)

    pipeline.Training.train_stage = trainer


def prepare_search() -> None:
    """Let structure from motion and the dictionary be rejected, in this order; every check and pose is measured."""
    for name, value in stand_in("sfm").items():
        setattr(search, name, value)
    crosses = {"sfm": 0.3, "dictionary": 0.5}
    search.judge_run = lambda folder, name: Trial(name, crosses[name], "rejected")
    pipeline.MIN_FIT_STEPS, held_out.MAX_CROSS["object"] = 6, np.inf
    unregistered.MAX_ERROR_RATIO, unregistered.REFINE_STEPS = np.inf, 8


def run(out: Path, changes: dict, stage: str | None) -> int:
    """Train in a process of its own; answers its exit status."""
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    try:
        warnings.filterwarnings("error", message=".*Using the previous")  # no kill may damage anything
        torch.set_num_threads(1)
        pipeline.write_report = stage_training.write_report = lambda folder: None
        stage_training.HELD_OUT_STEPS = 6
        pose_search.RING_ELEVATIONS, pose_search.START_FIT["steps"], pose_search.MIN_UNEVENNESS = (25.0,), 6, -1.0
        fit.MIN_COARSE_SIDE, gaussians.RELOCATE_EVERY = 8, 3
        if out.parent.name == "registered":
            prepare_search()
        for module in (distil, fit, joint, dictionary):
            for image_grid in {"save_cameras", "save_model_previews"} & vars(module).keys():
                setattr(module, image_grid, lambda *arguments, **options: None)
        if stage:
            die_in(stage)
        train_nerfdiff(views(changes.get("poses") == "known"), out=out, **TINY | changes)
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def main(folder: Path) -> None:
    kills = []
    for name, (changes, stages) in RUNS.items():
        assert run(folder / name / "whole", changes, None) == 0
        for stage in stages:
            status = run(folder / name / "killed", changes, stage)
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (name, stage, status)
            kills.append(f"{name}: {stage}")
        assert run(folder / name / "killed", changes, None) == 0
    (folder / "kills.json").write_text(json.dumps(kills))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
