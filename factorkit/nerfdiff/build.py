"""Models from a configuration, and what a run that is still in its stages has so far."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from factorkit.data.views.views import Views, target_size
from factorkit.engine.checkpoint import Checkpoints
from factorkit.engine.run_folder import read_settings
from factorkit.nerfdiff.cameras.candidates import Candidates, build_candidates
from factorkit.nerfdiff.cameras.poses import FreePoses, OrbitPoses, dolly_poses, forward_facing_poses, orbit_poses
from factorkit.nerfdiff.config import NUM_HEADS, NerfdiffConfig
from factorkit.nerfdiff.fields.base import Field
from factorkit.nerfdiff.fields.kinds import restore_field
from factorkit.nerfdiff.network import NerfdiffModel, PoseEncoder
from factorkit.nerfdiff.rays import CameraModel
from factorkit.nerfdiff.training_views import load_views
from factorkit.nn.unet import Encoder, TimeEmbedding
from factorkit.nn.uvit import TokenEncoder
from factorkit.utils.errors import CheckpointError, ConfigError

STAGES = ("search", "refine", "refine again", "fit", "gaussians")  # the stages with all views, in order


def build_model(
    config: NerfdiffConfig, scene: dict[str, Any], camera: CameraModel, field: Field, views: Tensor
) -> NerfdiffModel:
    """Build the model of a configuration, its encoder with fresh weights.

    Args:
        scene: as :func:`factorkit.nerfdiff.training_views.describe_scene` returns it.
        field: fresh, fitted or restored.
        views: poses of the training views, [V, 4, 4].

    Raises:
        ConfigError: the candidates do not fit the scene.
    """
    kind = "single" if scene["layout"] == "forward" else config.candidate_type
    if kind == "single" and scene["layout"] == "object" and config.search != "joint":
        raise ConfigError('candidate_type="single" does not cover an object from all sides; use look_at')
    candidates = build_candidates(
        kind, config.num_candidates, scene["distance"], config.elevation_range, config.pose_parameters
    )
    size = target_size(min(config.encoder_resolution, max(scene["size"])), *scene["size"])
    encoder = build_encoder(config, size, candidates)
    height, width = scene["size"]
    return NerfdiffModel(encoder, candidates, field, views, camera, (height, width), config.samples_per_ray)


def build_encoder(config: NerfdiffConfig, size: tuple[int, int], candidates: Candidates) -> PoseEncoder:
    """Build the encoder for views of ``size``, with fresh weights.

    It reads them at the next size that its patches, or the squares of its stem, divide.
    """
    channels, is_vit = config.model_channels, config.encoder == "vit"
    patch, stem = config.encoder_patch_size, config.encoder_stem_size
    height, width = (-(-side // (patch if is_vit else stem)) * (patch if is_vit else stem) for side in size)
    size = (height, width)
    encoder: Encoder | TokenEncoder
    if is_vit:
        stem, time = 1, TimeEmbedding(channels // 4)
        encoder = TokenEncoder(3, channels, config.encoder_depth, patch, size, channels, num_heads=NUM_HEADS)
        grid, norm = encoder.grid, "pixel"
    else:
        time = TimeEmbedding(channels)
        height, width = height // stem, width // stem
        side, blocks = max(height, width), config.num_res_blocks
        encoder = Encoder(3 * stem**2, channels, config.channel_mult, blocks, (), side, 4 * channels)
        for _ in config.channel_mult[1:]:
            height, width = (height + 1) // 2, (width + 1) // 2
        grid, norm = (height, width), "group"
    shape = (candidates.count, candidates.raw_size)
    return PoseEncoder(time, encoder, size, grid, *shape, norm=norm, pooling=config.encoder_pooling, stem=stem)


class PartialRun(NamedTuple):
    """The newest stage of a run whose training has not finished."""

    stage: str
    step: int
    field: Field
    views: Views  #: with the poses found so far


def find_newest_stage(folder: Path) -> Path | None:
    """Return the latest stage folder of a run that has a checkpoint; None if there is none."""
    stages = [folder / "stages" / name for name in reversed(STAGES)]
    return next((stage for stage in stages if Checkpoints(stage / "checkpoints").paths()), None)


def load_partial_run(folder: Path) -> PartialRun:
    """Load field and poses of the newest stage of a run.

    Raises:
        CheckpointError: no stage has a checkpoint yet, or it cannot be read.
    """
    stage, views = find_newest_stage(folder), load_views(folder)
    if stage is None or views is None:
        raise CheckpointError(f"{folder} has no checkpoint yet: training has just started")
    settings = read_settings(folder)
    latest = Checkpoints(stage / "checkpoints").latest()
    if latest is None:
        raise CheckpointError(f"{stage} has no intact checkpoint")
    tensors, meta = latest
    field = restore_field(_strip_prefix(tensors, "ema.module.field."), settings).requires_grad_(False)
    poses = _stage_poses(_strip_prefix(tensors, "ema.module.poses."), meta["scene"]["distance"], views.layout)
    focal = float(tensors.get("ema.module.log_focal", torch.zeros(())).exp())
    if focal != 1 and views.layout == "object":
        poses = dolly_poses(poses, focal)
    focal *= meta["scene"]["distance"] / settings["scene"]["distance"]  # of earlier stages
    intrinsics = views.intrinsics * torch.tensor([[focal, 1, 1], [1, focal, 1], [1, 1, 1]])
    return PartialRun(stage.name, int(meta["step"]), field, replace(views, poses=poses, intrinsics=intrinsics))


def _strip_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@torch.no_grad()
def _stage_poses(weights: dict[str, Tensor], distance: float, layout: str) -> Tensor:
    """Return the poses [V, 4, 4] behind a stage's stored pose module."""
    if "assigned" in weights:
        places = weights["places"][weights["assigned"]]
        return forward_facing_poses(places) if layout == "forward" else orbit_poses(places, distance)
    module: FreePoses | OrbitPoses
    if "numbers" in weights:
        module = FreePoses(weights["base"])
    else:
        names = [k.removeprefix("freedom.") for k in weights if k.startswith("freedom.")]
        module = OrbitPoses(weights["start"], distance, names)
    module.load_state_dict(weights)
    return module()
