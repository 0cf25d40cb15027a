"""The interface of all radiance fields, and the layers that several of them share."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit.nerfdiff.fields.appearance import Appearance
from factorkit.nerfdiff.fields.background import Background
from factorkit.rendering.occupancy import OccupancyGrid

DENSITY_SCALE = 13.0  # density at a raw value of about 1: opaque within a sixth of the box's half side
DENSITY_BIAS = -2.0  # added to the raw density: every ray starts with a thin fog, so that every sample has a gradient


class Field(nn.Module):
    """A radiance field over the box [-1, 1]^3, as :func:`factorkit.render` takes it.

    Subclasses implement :meth:`raw`; this class maps raw values to density and colour.

    Attributes:
        coarseness: in [0, 1]; 1 blurs the field to its large shapes, for coarse-to-fine training.
        background: maps directions [..., 3] to colours, or None to use the background of the views.
        appearance: per-view colour transforms, or None if all training views look alike.
        occupancy: grid of non-empty space, or None to sample everywhere.
    """

    coarseness: float = 0.0
    background: Background | None
    appearance: Appearance | None
    occupancy: OccupancyGrid | None

    def __init__(self) -> None:
        super().__init__()
        for name in ("background", "appearance", "occupancy"):
            self.register_module(name, None)

    def raw(self, positions: Tensor, directions: Tensor) -> Tensor:
        """Return raw density and colour [M, 4] at positions [M, 3] in [-1, 1]."""
        raise NotImplementedError

    def parameter_rates(self, rate: float) -> list[tuple[list[nn.Parameter], float]]:
        """Return the trainable parameters, each group with its learning rate; the field has ``rate``."""
        parts = [part for part in (self.background, self.appearance) if part is not None]
        separate = {id(p) for part in parts for p in part.parameters()}
        groups = [([p for p in self.parameters() if id(p) not in separate], rate)]
        groups += [(list(part.parameters()), part.LEARNING_RATE) for part in parts]
        groups = [([p for p in parameters if p.requires_grad], speed) for parameters, speed in groups]
        return [group for group in groups if group[0]]

    def total_variation(self) -> Tensor:
        """Return a penalty on fine detail; 0 for fields without a grid."""
        return torch.zeros((), device=next(self.parameters()).device)

    def forward(self, positions: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Return density [M] per unit of length, 0 outside the box, and colour [M, 3] in [0, 1]."""
        raw = self.raw(positions, directions)
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        inside = (positions.detach().abs().amax(-1) <= 1).to(raw.dtype)
        return DENSITY_SCALE * inside * F.softplus(raw[:, 0] + DENSITY_BIAS), raw[:, 1:].sigmoid()


def linear_layers(sizes: list[int], generator: torch.Generator, activation_after_last: bool = False) -> nn.Sequential:
    """Build linear layers with ReLUs between them, initialised from ``generator``."""
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layer = nn.Linear(inputs, outputs)
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(layer.bias)
        modules += [layer, nn.ReLU()]
    return nn.Sequential(*(modules if activation_after_last else modules[:-1]))
