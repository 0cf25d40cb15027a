"""Fields by name: fresh, or restored from stored weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from factorkit.nerfdiff.fields.appearance import Appearance
from factorkit.nerfdiff.fields.background import build_background
from factorkit.nerfdiff.fields.base import Field
from factorkit.nerfdiff.fields.grid import GridField
from factorkit.nerfdiff.fields.hashgrid import HashField
from factorkit.nerfdiff.fields.mlp import FrequencyField
from factorkit.nerfdiff.fields.occupancy import build_occupancy_grid
from factorkit.nerfdiff.fields.siren import SirenField
from factorkit.nerfdiff.fields.tcnn import TcnnField
from factorkit.utils.errors import ConfigError

FIELDS = ("grid", "hashgrid", "mlp", "siren", "tcnn")


def build_field(
    kind: str, resolution: int, seed: int, *, background: str = "given", views: int = 0, appearance_dim: int = 0
) -> Field:
    """Build a fresh field.

    Args:
        kind: one of :data:`FIELDS`.
        resolution: vertices of the grid, or cells of the finest hash grid level, along each side; unused by networks.
        seed: of the initial values.
        background: one of :data:`factorkit.nerfdiff.fields.background.BACKGROUNDS`.
        views: number of training views with an appearance code.
        appearance_dim: size of each code; 0 for none.

    Raises:
        ConfigError: unknown kind, or tiny-cuda-nn cannot be imported.
    """
    field: Field
    if kind in ("mlp", "siren"):
        field = FrequencyField(seed) if kind == "mlp" else SirenField(seed)
    elif kind in FIELDS:
        field = {"grid": GridField, "hashgrid": HashField, "tcnn": TcnnField}[kind](resolution, seed)
    else:
        raise ConfigError(f"field={kind!r} is unknown; choose one of {', '.join(FIELDS)}")
    field.background = build_background(background, seed)
    if appearance_dim:
        field.appearance = Appearance(views, appearance_dim, seed)
    return field


def restore_field(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Field:
    """Restore the field of a run or of one of its stages.

    Args:
        weights: of the field, by name.
        settings: of the run, as stored with its checkpoints.

    Raises:
        RuntimeError: the weights belong to another field.
        ConfigError: tiny-cuda-nn cannot be imported.
    """
    is_grid = "values" in weights  # search and refinement use a grid whatever the run's field is
    kind, resolution = ("grid", len(weights["values"])) if is_grid else (settings["field"], settings["grid_resolution"])
    codes = weights.get("appearance.codes", torch.empty(0, 0))
    field = build_field(
        kind,
        resolution,
        settings["seed"],
        background=settings.get("background", "given"),
        views=codes.shape[0],
        appearance_dim=codes.shape[1],
    )
    if "occupancy.density" in weights:
        field.occupancy = build_occupancy_grid(round(weights["occupancy.density"].shape[1] ** (1 / 3)))
    field.load_state_dict(weights)
    return field
