"""Occupancy grids of fields: sampling that skips empty space."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from factorkit.nerfdiff.fields.base import Field as TrainedField
from factorkit.rendering.occupancy import OccupancyGrid
from factorkit.rendering.render import Field
from factorkit.rendering.sampling import OccupancySampling

CELLS = 64  # along each side of the grid of a field that is not trained any more
UPDATES = 4  # evaluations of each of its cells
MAX_POSITIONS = 1 << 18  # evaluated at once
UPDATE_EVERY = 10  # training steps
DECAY = 0.7  # of the stored density at each update: a few hundred steps must empty most of the box


def build_occupancy_grid(cells: int) -> OccupancyGrid:
    """Build a grid with ``cells`` along each side of the box; all cells start occupied."""
    return OccupancyGrid((-1.0,) * 3, (1.0,) * 3, resolution=cells, decay=DECAY)


def occupancy_cells(samples_per_ray: int) -> int:
    """Return the number of cells along each side that suits a number of samples per ray."""
    return 64 if samples_per_ray >= 64 else 32


def update_occupancy(field: TrainedField, step: int) -> None:
    """Update the occupancy grid of a field in training, if it has one and the step is due.

    A blurred field is skipped: what it shows may move while it sharpens.
    """
    if field.occupancy is not None and step and step % UPDATE_EVERY == 0 and not field.coarseness:
        field.occupancy.update(lambda positions: density(field, positions))


@torch.no_grad()
def occupied_sampling(field: Field, lower: Sequence[float], upper: Sequence[float]) -> OccupancySampling:
    """Build sampling of the occupied cells between two corners of the field's box.

    Uses the field's own grid for the whole box, else a new grid of 64^3 cells.
    """
    grid = getattr(field, "occupancy", None)
    if grid is not None and (*lower, *upper) == (-1.0,) * 3 + (1.0,) * 3:
        return OccupancySampling(grid, step=1 / CELLS)
    grid = OccupancyGrid(lower, upper, resolution=CELLS).to(field_device(field))
    for _ in range(UPDATES):
        grid.update(lambda positions: density(field, positions))
    return OccupancySampling(grid, step=grid.cell_side / 2)


def density(field: Field, positions: Tensor) -> Tensor:
    """Return the field's density [M] at positions [M, 3], evaluated in parts."""
    parts = positions.split(MAX_POSITIONS)
    return torch.cat([field(part, torch.zeros_like(part))[0].reshape(-1) for part in parts])


def field_device(field: Field) -> torch.device:
    """Return the device of a field's parameters; the CPU for a plain function."""
    parameters: Iterable[Tensor] = getattr(field, "parameters", tuple)()
    return next((parameter.device for parameter in parameters), torch.device("cpu"))
