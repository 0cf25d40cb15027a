"""A run in the midst of its stages: the newest field and where the views stand in it, before there is a whole model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from factorkit.data.views.views import Views
from factorkit.engine.checkpoint import Checkpoints
from factorkit.engine.run_folder import read_settings
from factorkit.nerfdiff.build import restored_field
from factorkit.nerfdiff.cameras.poses import FreePoses, OrbitPoses, forward_poses, orbit_poses
from factorkit.nerfdiff.fields.grid import Field
from factorkit.nerfdiff.training_views import kept_views
from factorkit.utils.errors import CheckpointError

STAGES = ("search", "refine", "refine again", "fit")  # that hold all views, in their order


class Snapshot(NamedTuple):
    """What a stage has come to."""

    stage: str
    step: int
    field: Field
    views: Views  #: at the poses found so far


def newest_stage(folder: Path) -> Path | None:
    """The latest stage of a run folder that has a checkpoint; None where none has."""
    found = [folder / "stages" / name for name in STAGES]
    return next((path for path in reversed(found) if Checkpoints(path / "checkpoints").paths()), None)


def snapshot(folder: Path) -> Snapshot:
    """The newest stage of a run folder.

    Raises:
        CheckpointError: no stage has a checkpoint yet, or it cannot be read.
    """
    stage, views = newest_stage(folder), kept_views(folder)
    if stage is None or views is None:
        raise CheckpointError(f"{folder} has no checkpoint yet; the training has just begun")
    settings = read_settings(folder)
    tensors, meta = Checkpoints(stage / "checkpoints").latest()
    prefix = "ema.module."
    weights = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    field = {k.removeprefix("field."): v for k, v in weights.items() if k.startswith("field.")}
    where = {k.removeprefix("poses."): v for k, v in weights.items() if k.startswith("poses.")}
    model = restored_field(field, settings)
    poses = _poses(where, settings["scene"]["distance"], views.layout)
    return Snapshot(stage.name, int(meta["step"]), model.requires_grad_(False), replace(views, poses=poses))


@torch.no_grad()
def _poses(where: dict[str, Tensor], distance: float, layout: str) -> Tensor:
    """Poses [V, 4, 4] of whatever module a stage keeps them in."""
    if "assigned" in where:
        places = where["places"][where["assigned"]]
        return forward_poses(places) if layout == "forward" else orbit_poses(places, distance)
    if "numbers" in where:
        free = FreePoses(where["base"])
    else:
        names = [k.removeprefix("freedom.") for k in where if k.startswith("freedom.")]
        free = OrbitPoses(where["start"], distance, names)
    free.load_state_dict(where)
    return free()
