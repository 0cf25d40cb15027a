"""Where a field has anything: steps that leave its empty space out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from factorkit.rendering.occupancy import OccupancyGrid
from factorkit.rendering.render import Field
from factorkit.rendering.sampling import OccupiedSampling

CELLS, LOOKS = 64, 4  # of the grid along each axis; at every cell of it
PLACES = 1 << 18  # asked at once


@torch.no_grad()
def occupied_sampling(field: Field, lower: Sequence[float], upper: Sequence[float]) -> OccupiedSampling:
    """Steps of half a cell through the occupied cells of a grid of 64^3 over the box, for a field that stays as it
    is."""
    grid = OccupancyGrid(lower, upper, resolution=CELLS).to(device_of(field))
    for _ in range(LOOKS):
        grid.update(lambda places: torch.cat([field(part, torch.zeros_like(part))[0].reshape(-1)
                                              for part in places.split(PLACES)]))  # fmt: skip
    return OccupiedSampling(grid, step=grid.cell_side / 2)


def device_of(field: Field) -> torch.device:
    """Where a field's parameters lie; a formula is asked on the CPU."""
    parameters = getattr(field, "parameters", tuple)()
    return next((parameter.device for parameter in parameters), torch.device("cpu"))
