"""What a run is of: which views, by which cameras; a folder is taken up again for the same ones alone."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from factorkit.data.views.views import Views
from factorkit.nerfdiff.scene import Scene, shared_optics
from factorkit.nerfdiff.training_views import kept_views
from factorkit.utils.errors import CheckpointError

DIGITS = 5  # of intrinsics, relative to the picture's sides, and of colours


def describe(scene: Scene, views: Views, known: bool) -> dict[str, Any]:
    """What identifies the views, and the model's shape.

    Args:
        views: those that the scene was opened from, at its size.
        known: whether their poses are trained with; true poses that only score the result may change.
    """
    return {
        "views": len(scene.images),
        "size": list(scene.size),
        "layout": scene.layout,
        "distance": scene.distance,
        "sha256": digest(scene.images),
        **cameras_of(views, known),
    }


def cameras_of(views: Views, known: bool) -> dict[str, Any]:
    """Intrinsics fx, fy, cx, cy in units of width and height, the colour behind everything, and perhaps the poses."""
    optics = shared_optics(views)
    fx, fy, cx, cy = (round(float(optics.intrinsics[at]), DIGITS) for at in ((0, 0), (1, 1), (0, 2), (1, 2)))
    found = {"intrinsics": [fx, fy, cx, cy], "background": [round(x, DIGITS) for x in optics.background.tolist()]}
    return found | ({"poses": digest(views.poses.float())} if known and views.poses is not None else {})


def completed(settings: dict[str, Any], folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run, whose scene lacks the cameras where an older version made it: as its kept views tell them,
    and as ``asked`` where those are gone."""
    scene, now = settings.get("scene"), asked["scene"]
    if not isinstance(scene, dict) or "intrinsics" in scene:
        return settings
    known, kept = asked["poses"] == "known", None
    with suppress(CheckpointError):
        kept = kept_views(folder)
    told = {k: now[k] for k in ("intrinsics", "background", "poses") if k in now}
    return {**settings, "scene": {**scene, **(told if kept is None else cameras_of(kept, known))}}


def digest(values: Tensor) -> str:
    """The beginning of a hash over the bytes of a tensor."""
    return hashlib.sha256(values.contiguous().cpu().numpy().tobytes()).hexdigest()[:16]
