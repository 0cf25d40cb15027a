"""The model of a configuration, for training and for loading."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from factorkit.data.views.views import target_size
from factorkit.nerfdiff.cameras.candidates import build_candidates
from factorkit.nerfdiff.config import NerfdiffConfig
from factorkit.nerfdiff.fields.grid import Field, build_field
from factorkit.nerfdiff.fields.occupancy import occupancy_grid
from factorkit.nerfdiff.network import NerfdiffModel, PoseEncoder
from factorkit.nerfdiff.rays import Optics
from factorkit.utils.errors import ConfigError


def restored_field(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Field:
    """The field of a run or of one of its stages.

    Args:
        weights: of the field, by name.
        settings: of the run, as its checkpoints and its folder have them.

    Raises:
        RuntimeError: weights that are of another field.
        ConfigError: tiny-cuda-nn is needed and cannot be had.
    """
    of_grid = "values" in weights  # as the search's and refinement's are, whatever the run's
    kind, resolution = ("grid", len(weights["values"])) if of_grid else (settings["field"], settings["grid_resolution"])
    codes = weights.get("appearance.codes", torch.empty(0, 0))
    field = build_field(
        kind,
        resolution,
        settings["seed"],
        background=settings.get("background", "given"),
        views=codes.shape[0],
        appearance=codes.shape[1],
    )
    if "occupancy.density" in weights:
        field.occupancy = occupancy_grid(round(weights["occupancy.density"].shape[1] ** (1 / 3)))
    field.load_state_dict(weights)
    return field


def checked_scene(scene: Any) -> dict[str, Any]:
    """What a file says of its scene, as :func:`factorkit.nerfdiff.fingerprint.describe` gives it.

    Raises:
        ValueError: it cannot be of a scene.
    """
    if not isinstance(scene, dict) or scene.get("layout") not in ("object", "forward"):
        raise ValueError(f"scene={scene!r:.80} has no layout")
    distance, size = scene.get("distance"), scene.get("size")
    if not isinstance(distance, (int, float)) or not 0 < distance < math.inf:
        raise ValueError(f"the scene's distance={distance!r:.80} is no positive number")
    sides = isinstance(size, list) and len(size) == 2 and all(type(side) is int and 0 < side < 2**15 for side in size)
    if not sides:
        raise ValueError(f"the scene's size={size!r:.80} is no height and width")
    return scene


def build_model(
    config: NerfdiffConfig, scene: dict[str, Any], optics: Optics, field: Field, views: Tensor
) -> NerfdiffModel:
    """The model of a configuration, its encoder with fresh weights.

    Args:
        scene: as :func:`describe` gives it.
        views: poses of the training views, [V, 4, 4].

    Raises:
        ConfigError: candidates that do not fit the scene.
    """
    kind = "single" if scene["layout"] == "forward" else config.candidate_type
    distance = scene["distance"]
    if kind == "single" and scene["layout"] == "object" and config.search == "dictionary":
        raise ConfigError('candidate_type="single" cannot stand around an object; use look_at')
    candidates = build_candidates(kind, config.num_candidates, distance, config.elevation_range, config.pose_freedom)
    size = target_size(min(config.encoder_resolution, max(scene["size"])), *scene["size"])
    encoder = PoseEncoder(
        size,
        config.model_channels,
        config.channel_mult,
        config.num_res_blocks,
        candidates.count,
        candidates.width,
        pooling=config.encoder_pooling,
    )
    return NerfdiffModel(encoder, candidates, field, views, optics, tuple(scene["size"]), config.samples_per_ray)
