"""The model of a configuration, for training and for loading."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from factorkit.data.views import target_size
from factorkit.errors import ConfigError
from factorkit.nerfdiff.candidates import build_candidates
from factorkit.nerfdiff.config import NerfdiffConfig
from factorkit.nerfdiff.encoder import PoseEncoder
from factorkit.nerfdiff.fields import Field
from factorkit.nerfdiff.model import NerfdiffModel
from factorkit.nerfdiff.rays import Optics


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
    kind = "single" if scene["layout"] == "forward" else config.candidates
    distance = scene["distance"]
    if kind == "single" and scene["layout"] == "object" and config.search == "dictionary":
        raise ConfigError('candidates="single" cannot stand around an object; use look_at')
    candidates = build_candidates(kind, config.cameras, distance, config.elevations, config.pose_freedom)
    size = target_size(min(config.encoder_resolution, max(scene["size"])), *scene["size"])
    encoder = PoseEncoder(
        size, config.width, config.multipliers, config.blocks, candidates.count, candidates.width,
        pooling=config.pooling,
    )  # fmt: skip
    return NerfdiffModel(encoder, candidates, field, views, optics, tuple(scene["size"]), config.samples)


