"""Occupancy grids: bitfields of the cells worth sampling, for march_rays, updated from the field as it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from factorkit.ops.dispatch import check_box
from factorkit.ops.march import face_slack


class OccupancyGrid(nn.Module):
    """Cells of a box, and of the box scaled by 2, 4, ... about its centre, marked where the density is not negligible.

    Each cell stores a running maximum of its density: every update multiplies it by ``decay``, then takes the larger of
    it and the new density (Müller et al. 2022, appendix E.2). :attr:`bits` is the input of
    :func:`factorkit.ops.march_rays`. All cells are occupied until the first update. ``state_dict`` holds the whole
    state, so updates after loading continue exactly.

    Args:
        lower: lower corner of the box of level 0, three floats.
        upper: upper corner.
        resolution: cells R along each axis of a level, a power of two from 8 on.
        levels: 1 to 16; level l covers the box scaled by 2^l.
        threshold: optical depth (density times the cell's shortest side) from which a cell is occupied; half the
            level's mean where that is less, so that a faint field at the start of training is kept.
        decay: factor on the stored density per update, in (0, 1].
        warmup: number of first updates that query every cell; later ones query half as many.
        seed: of the query points, together with the number of the update.

    Raises:
        ValueError: an argument out of its range.
    """

    density: Tensor  #: [levels, R^3], the running maxima
    bits: Tensor  #: uint8 [levels, R^3 / 8], bit i of byte j is cell 8 j + i, z fastest
    num_updates: Tensor
    box: Tensor

    def __init__(
        self,
        lower: Sequence[float],
        upper: Sequence[float],
        *,
        resolution: int = 128,
        levels: int = 1,
        threshold: float = 0.01,
        decay: float = 0.95,
        warmup: int = 16,
        seed: int = 0,
    ):
        super().__init__()
        self.lower, self.upper = check_box(lower, upper)
        if resolution < 8 or resolution & (resolution - 1):
            raise ValueError(f"resolution={resolution}; give a power of two from 8 on")
        if not 1 <= levels <= 16:
            raise ValueError(f"levels={levels}; give 1 to 16")
        if not 0 < decay <= 1 or not 0 <= threshold < math.inf:
            raise ValueError(f"need 0 < decay <= 1 and threshold >= 0; got decay={decay}, threshold={threshold}")
        self.resolution, self.levels, self.threshold = resolution, levels, threshold
        self.decay, self.warmup, self.seed = decay, warmup, seed
        num_cells = resolution**3
        self.register_buffer("density", torch.zeros(levels, num_cells))
        self.register_buffer("bits", torch.full((levels, num_cells // 8), 255, dtype=torch.uint8))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("box", torch.tensor([self.lower, self.upper], dtype=torch.float64))

    @property
    def cell_side(self) -> float:
        """The shortest side of level 0's cells."""
        return min(b - a for a, b in zip(self.lower, self.upper, strict=True)) / self.resolution

    @torch.no_grad()
    def update(self, density: Callable[[Tensor], Tensor]) -> None:
        """Update the grid from the field at one random point in each queried cell.

        Every cell is queried during the warm-up; afterwards a quarter of the cells drawn uniformly and a quarter drawn
        among the occupied ones.

        Args:
            density: maps points [N, 3] to densities [N] (or [N, 1]) per unit of length; called once per level.

        Raises:
            ValueError: densities of another shape.
        """
        generator, done = torch.Generator(self.density.device), int(self.num_updates)  # waits for the device
        generator.manual_seed(self.seed * 1_000_003 + done)
        for level in range(self.levels):
            cells = self._sample_cells(level, generator, everywhere=done < self.warmup)
            values = density(self._sample_points(level, cells, generator))
            if values.numel() != cells.numel():
                raise ValueError(
                    f"density returned {tuple(values.shape)}; it must return [{cells.numel()}], one a point"
                )
            decayed = self.density[level].clone()
            decayed[cells] = self.density[level, cells] * self.decay
            values = values.reshape(-1).to(decayed.dtype).nan_to_num(nan=0.0)
            # amax: a cell may be drawn twice, and then its larger density counts, whatever the order.
            self.density[level] = decayed.scatter_reduce(0, cells, values, "amax")
        self.num_updates.fill_(done + 1)
        self._update_bits()

    def occupied(self, points: Tensor) -> Tensor:
        """Return whether points [..., 3] are in an occupied cell of the finest level that contains them: bool [...]."""
        lower, upper = points.new_tensor(self.lower), points.new_tensor(self.upper)
        centre, half = (lower + upper) / 2, (upper - lower) / 2
        centred, slack = (points - centre) / half, face_slack(centre, half) * (self.resolution / 2)
        result = torch.zeros(points.shape[:-1], dtype=torch.bool, device=points.device)
        for level in reversed(range(self.levels)):
            position = (centred / 2**level + 1) * (self.resolution / 2)
            inside = ((position >= -slack) & (position <= self.resolution + slack)).all(-1)
            x, y, z = position.floor().clamp(0, self.resolution - 1).nan_to_num(0).long().unbind(-1)
            cell = (x * self.resolution + y) * self.resolution + z
            result = torch.where(inside, (self.bits[level][cell // 8] >> (cell % 8)) & 1 == 1, result)
        return result

    def share_occupied(self) -> Tensor:
        """Return the share of occupied cells of each level, [levels]."""
        return torch.stack([self._unpack(level).float().mean() for level in range(self.levels)])

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        saved = state.get(f"{prefix}box")
        if saved is not None and not torch.equal(saved.to(self.box), self.box):
            stored, own = (tuple(map(tuple, box.tolist())) for box in (saved, self.box))
            raise ValueError(
                f"the saved grid covers the box {stored}, this one {own}; create it with the saved corners"
            )
        super()._load_from_state_dict(state, prefix, *args)

    def _sample_cells(self, level: int, generator: torch.Generator, everywhere: bool) -> Tensor:
        num_cells, device = self.resolution**3, self.density.device
        if everywhere:
            return torch.arange(num_cells, device=device)
        quarter = num_cells // 4
        uniform = torch.randint(num_cells, (quarter,), generator=generator, device=device)
        # Inverts the running count of occupied cells, which needs no synchronisation with the device.
        counts = self._unpack(level).cumsum(0)
        rank = torch.rand(quarter, generator=generator, device=device, dtype=torch.float64) * counts[-1]
        return torch.cat([uniform, torch.searchsorted(counts, rank.long() + 1).clamp_max(num_cells - 1)])

    def _sample_points(self, level: int, cells: Tensor, generator: torch.Generator) -> Tensor:
        """Return a random point in each cell: [N, 3]."""
        r = self.resolution
        corner = torch.stack([cells // (r * r), cells // r % r, cells % r], dim=1)
        unit = (corner + torch.rand(corner.shape, generator=generator, device=cells.device)) / r
        lower, upper = self.density.new_tensor(self.lower), self.density.new_tensor(self.upper)
        return (lower + upper) / 2 + (unit - 0.5) * (upper - lower) * 2**level

    def _unpack(self, level: int) -> Tensor:
        """Return the bits as numbers 0 and 1, int64 [R^3]."""
        shifts = torch.arange(8, device=self.bits.device, dtype=torch.uint8)
        return ((self.bits[level][:, None] >> shifts) & 1).flatten().long()

    def _update_bits(self) -> None:
        depth = self.density * (self.cell_side * 2.0 ** torch.arange(self.levels, device=self.density.device))[:, None]
        bound = (depth.mean(1, keepdim=True) / 2).clamp_max(self.threshold)
        values = 2 ** torch.arange(8, device=depth.device, dtype=torch.int64)
        occupied = ((depth >= bound) & (depth > 0)).unflatten(1, (-1, 8))
        self.bits.copy_((occupied * values).sum(2).to(torch.uint8))
