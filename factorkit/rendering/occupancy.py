"""Which cells of space are worth a sample: bitfields that march_rays reads, learned from the field as it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from factorkit.ops.checks import check_box


class OccupancyGrid(nn.Module):
    """Cells of a box, and of the box scaled by 2, 4, ... about its centre, marked where there is density to look at.

    The grid remembers each cell's largest density seen lately: with every look the memory fades by ``decay`` and the
    new density takes its place where it is larger (Müller et al. 2022, appendix E.2). :attr:`bits` is what
    :func:`factorkit.ops.march_rays` takes. All cells are occupied until the first update.

    ``state_dict`` holds everything, as tensors: saving and loading is that of any module, and updates after loading go
    on as if never interrupted.
    """

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
        """
        Args:
            lower, upper: corners of the box of level 0, three floats each.
            resolution: cells R along each axis of a level, a power of two from 8 on.
            levels: 1 to 16; level l covers the box scaled by 2^l.
            threshold: the optical depth, density times the cell's shortest side, from which a cell is occupied; half
                the level's mean where that is less, so that a field of faint beginnings is not cut away.
            decay: factor on the memory at each look, in (0, 1].
            warmup: updates that look at every cell; later ones look at half of them.
            seed: of the places looked at, with the number of the update.

        Raises:
            ValueError: settings other than these.
        """
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
        cells = resolution**3
        self.register_buffer("density", torch.zeros(levels, cells))  #: [levels, R^3], the memory
        self.register_buffer("bits", torch.full((levels, cells // 8), 255, dtype=torch.uint8))
        self.register_buffer("looks", torch.zeros((), dtype=torch.int64))
        self.register_buffer("box", torch.tensor([self.lower, self.upper], dtype=torch.float64))

    @property
    def updates(self) -> int:
        """How often the grid has looked; asking waits for the device."""
        return int(self.looks)

    @updates.setter
    def updates(self, count: int) -> None:
        self.looks.fill_(count)

    @property
    def cell_side(self) -> float:
        """The shortest side of level 0's cells."""
        return min(b - a for a, b in zip(self.lower, self.upper, strict=True)) / self.resolution

    @torch.no_grad()
    def update(self, density: Callable[[Tensor], Tensor]) -> None:
        """Look at the field once: at every cell while warming up, then at a quarter of the cells drawn evenly and a
        quarter drawn among the occupied ones, each at a random place inside.

        Args:
            density: of points [N, 3], answers [N] (or [N, 1]) densities per unit of length; called level by level.

        Raises:
            ValueError: the answer has another shape.
        """
        generator, done = torch.Generator(self.density.device), self.updates
        generator.manual_seed(self.seed * 1_000_003 + done)
        for level in range(self.levels):
            cells = self._cells(level, generator, everywhere=done < self.warmup)
            found = density(self._places(level, cells, generator))
            if found.numel() != cells.numel():
                wanted = f"[{cells.numel()}] for as many points"
                raise ValueError(f"density answered {tuple(found.shape)}; it must answer {wanted}")
            # A cell may be drawn twice: then its largest density counts, whatever the order.
            faded = self.density[level].clone()
            faded[cells] = self.density[level, cells] * self.decay
            found = found.reshape(-1).to(faded.dtype).nan_to_num(nan=0.0)
            self.density[level] = faded.scatter_reduce(0, cells, found, "amax")
        self.updates = done + 1
        self._mark()

    def occupied(self, points: Tensor) -> Tensor:
        """Whether points [..., 3] lie in an occupied cell of the finest level that holds them: bool [...]."""
        lower, upper = points.new_tensor(self.lower), points.new_tensor(self.upper)
        centred = (points - (lower + upper) / 2) / ((upper - lower) / 2)
        answer = torch.zeros(points.shape[:-1], dtype=torch.bool, device=points.device)
        for level in reversed(range(self.levels)):
            place = (centred / 2**level + 1) * (self.resolution / 2)
            inside = ((place >= 0) & (place < self.resolution)).all(-1)
            x, y, z = place.floor().clamp(0, self.resolution - 1).nan_to_num(0).long().unbind(-1)
            cell = (x * self.resolution + y) * self.resolution + z
            answer = torch.where(inside, (self.bits[level][cell // 8] >> (cell % 8)) & 1 == 1, answer)
        return answer

    def share_occupied(self) -> Tensor:
        """The share of occupied cells of each level, [levels]."""
        counts = (self.bits[:, :, None] >> torch.arange(8, device=self.bits.device, dtype=torch.uint8)) & 1
        return counts.float().mean((1, 2))

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest) -> None:
        saved = state.get(f"{prefix}box")
        if saved is not None and not torch.equal(saved.to(self.box), self.box):
            saved, here = (tuple(map(tuple, box.tolist())) for box in (saved, self.box))
            raise ValueError(f"the saved grid covers the box {saved}, this one {here}; make it with the saved corners")
        super()._load_from_state_dict(state, prefix, *rest)

    def _cells(self, level: int, generator: torch.Generator, everywhere: bool) -> Tensor:
        """The cells to look at."""
        cells, device = self.resolution**3, self.density.device
        if everywhere:
            return torch.arange(cells, device=device)
        quarter = cells // 4
        anywhere = torch.randint(cells, (quarter,), generator=generator, device=device)
        # Drawn by inverting the running count of occupied cells: how many there are is not asked of the device.
        counted = self._unpacked(level).cumsum(0)
        rank = torch.rand(quarter, generator=generator, device=device, dtype=torch.float64) * counted[-1]
        return torch.cat([anywhere, torch.searchsorted(counted, rank.long() + 1).clamp_max(cells - 1)])

    def _places(self, level: int, cells: Tensor, generator: torch.Generator) -> Tensor:
        """A random point in each cell: [N, 3]."""
        r = self.resolution
        corner = torch.stack([cells // (r * r), cells // r % r, cells % r], dim=1)
        unit = (corner + torch.rand(corner.shape, generator=generator, device=cells.device)) / r
        lower, upper = self.density.new_tensor(self.lower), self.density.new_tensor(self.upper)
        return (lower + upper) / 2 + (unit - 0.5) * (upper - lower) * 2**level

    def _unpacked(self, level: int) -> Tensor:
        """The bits as numbers 0 and 1, [R^3] int64."""
        places = torch.arange(8, device=self.bits.device, dtype=torch.uint8)
        return ((self.bits[level][:, None] >> places) & 1).flatten().long()

    def _mark(self) -> None:
        depth = self.density * (self.cell_side * 2.0 ** torch.arange(self.levels, device=self.density.device))[:, None]
        bound = (depth.mean(1, keepdim=True) / 2).clamp_max(self.threshold)
        places = 2 ** torch.arange(8, device=depth.device, dtype=torch.int64)
        marked = ((depth >= bound) & (depth > 0)).unflatten(1, (-1, 8))
        self.bits.copy_((marked * places).sum(2).to(torch.uint8))
