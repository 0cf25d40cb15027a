"""Where a field has anything: steps that leave its empty space out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from factorkit.rendering.occupancy import OccupancyGrid
from factorkit.rendering.render import Field
from factorkit.rendering.sampling import OccupancySampling

CELLS, LOOKS = 64, 4  # of the grid along each axis; at every cell of it
PLACES = 1 << 18  # asked at once
EVERY = 10  # steps of training between looks
FADING = 0.7  # of a trained grid's memory with each look: a few hundred steps have to empty most of the box


def occupancy_grid(cells: int) -> OccupancyGrid:
    """A grid of so many cells along each side of a field's box, to be trained with the field; all are occupied yet."""
    return OccupancyGrid((-1.0,) * 3, (1.0,) * 3, resolution=cells, decay=FADING)


def cells_for(samples: int) -> int:
    """Cells along each side of the box for a field that is asked so many times along a ray."""
    return 64 if samples >= 64 else 32


def look_again(field: Field, step: int) -> None:
    """What a training does before every step: now and then it looks where there is anything, if the field has a grid.

    Not before the field is sharp: what is blurred now may yet stand somewhere else.
    """
    if field.occupancy is not None and step and step % EVERY == 0 and not field.coarseness:
        field.occupancy.update(lambda places: density(field, places))


@torch.no_grad()
def occupied_sampling(field: Field, lower: Sequence[float], upper: Sequence[float]) -> OccupancySampling:
    """Steps of 1/128 of the box through the occupied cells of the field's own grid, else, and in a part of the field's
    box, of one of 64^3 made now for a field that stays as it is."""
    grid = getattr(field, "occupancy", None)
    if grid is not None and (*lower, *upper) == (-1.0,) * 3 + (1.0,) * 3:
        return OccupancySampling(grid, step=1 / CELLS)
    grid = OccupancyGrid(lower, upper, resolution=CELLS).to(device_of(field))
    for _ in range(LOOKS):
        grid.update(lambda places: density(field, places))
    return OccupancySampling(grid, step=grid.cell_side / 2)


def density(field: Field, places: Tensor) -> Tensor:
    """The field's density [M] at places [M, 3], asked in parts."""
    return torch.cat([field(part, torch.zeros_like(part))[0].reshape(-1) for part in places.split(PLACES)])


def device_of(field: Field) -> torch.device:
    """Where a field's parameters lie; a formula is asked on the CPU."""
    parameters: Iterable[Tensor] = getattr(field, "parameters", tuple)()
    return next((parameter.device for parameter in parameters), torch.device("cpu"))
