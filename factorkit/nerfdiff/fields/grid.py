"""Radiance fields over the box [-1, 1]^3: positions and directions to density and colour."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit import ops
from factorkit.nerfdiff.fields.appearance import Appearance
from factorkit.nerfdiff.fields.background import build_background
from factorkit.utils.errors import ConfigError

DENSITY = 13.0  # density where a field's raw answer is about 1: opaque within a sixth of the box's half side
BIAS = -2.0  # of the raw density at the beginning: a thin fog, which every ray sees and every gradient can thicken


class Field(nn.Module):
    """What :func:`factorkit.render` takes. A subclass answers raw numbers; here they become density and colour.

    ``coarseness`` in [0, 1] blurs the field for training from coarse to fine: 1 shows only its large shapes.

    Attributes:
        background: directions [..., 3] to what lies behind, or None where the views' own background does.
        appearance: the tones of the training views, or None where all are alike.
        occupancy: where there is anything, or None where everywhere is to be looked.
    """

    coarseness: float = 0.0

    def __init__(self):
        super().__init__()
        for name in ("background", "appearance", "occupancy"):
            self.register_module(name, None)

    def raw(self, positions: Tensor, directions: Tensor) -> Tensor:
        """[M, 4]: density's and colour's raw numbers at positions [M, 3] in [-1, 1]."""
        raise NotImplementedError

    def rates(self, rate: float) -> list[tuple[list[nn.Parameter], float]]:
        """What is free to move, and how fast: the scene at ``rate``, background and tones at their own."""
        apart = [part for part in (self.background, self.appearance) if part is not None]
        others = {id(p) for part in apart for p in part.parameters()}
        found = [([p for p in self.parameters() if id(p) not in others], rate)]
        found += [(list(part.parameters()), part.RATE) for part in apart]  # type: ignore[misc]
        found = [([p for p in part if p.requires_grad], speed) for part, speed in found]
        return [(part, speed) for part, speed in found if part]

    def roughness(self) -> Tensor:
        """A penalty on detail that no view asks for."""
        return torch.zeros((), device=next(self.parameters()).device)

    def forward(self, positions: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Density [M] per unit of length, none outside the box, and colour [M, 3] in [0, 1].

        Fog outside the box would be seen by every camera that passes it, and by no other: it must be nothing.
        """
        raw = self.raw(positions, directions)
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        inside = (positions.detach().abs().amax(-1) <= 1).to(raw.dtype)
        return DENSITY * inside * F.softplus(raw[:, 0] + BIAS), raw[:, 1:].sigmoid()


class GridField(Field):
    """Numbers at the vertices of a lattice, interpolated linearly; blurred at first.

    Args:
        resolution: vertices along each side.
        seed: of the faint noise it begins with.
        blur: standard deviation at full coarseness, in units of the box's half side.
    """

    SCALE = 3.0  # from the stored numbers to the raw ones: they move faster so

    def __init__(self, resolution: int, seed: int = 0, blur: float = 0.27):
        super().__init__()
        self.resolution, self.blur = resolution, blur
        generator = torch.Generator().manual_seed(seed)
        shape = (resolution, resolution, resolution, 4)
        self.values = nn.Parameter(0.1 * torch.randn(shape, generator=generator))

    def raw(self, positions: Tensor, directions: Tensor) -> Tensor:
        table = self.blurred().flatten(0, 2)
        rows = 1 << (len(table) - 1).bit_length()
        table = F.pad(table, (0, 0, 0, rows - len(table)))
        return self.SCALE * ops.hash_grid((positions + 1) / 2, table[None], [self.resolution - 1])

    def blurred(self) -> Tensor:
        """The numbers [R, R, R, 4] after blurring along each axis."""
        sigma = self.coarseness * self.blur * (self.resolution - 1) / 2
        if sigma < 0.3:
            return self.values
        place = torch.arange(self.resolution, device=self.values.device)
        weights = torch.exp(-((place[:, None] - place) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
        values = self.values
        for _ in range(3):  # each turn blurs the first axis and moves it behind the other two
            values = torch.tensordot(values, weights, dims=([0], [1])).permute(0, 1, 3, 2)
        return values

    def roughness(self) -> Tensor:
        """Mean squared difference of neighbours, summed over the axes."""
        v = self.values
        steps = (v[1:] - v[:-1], v[:, 1:] - v[:, :-1], v[:, :, 1:] - v[:, :, :-1])
        return torch.stack([step.square().mean() for step in steps]).sum()

    def refined(self, resolution: int) -> GridField:
        """The same field on a lattice of another resolution."""
        finer = GridField(resolution, blur=self.blur)
        values = self.values.detach().permute(3, 0, 1, 2)[None]
        values = F.interpolate(values, size=(resolution,) * 3, mode="trilinear", align_corners=True)
        finer.values.data = values[0].permute(1, 2, 3, 0).contiguous()
        finer.background, finer.appearance = copy.deepcopy(self.background), copy.deepcopy(self.appearance)
        return finer


class HashField(Field):
    """A hash grid of many resolutions and a small network (Müller et al. 2022); finer levels come in later.

    Args:
        resolution: cells of the finest level along each side.
        levels, rows, features: of the table; rows is a power of two.
    """

    def __init__(
        self,
        resolution: int,
        seed: int = 0,
        *,
        levels: int = 8,
        rows: int = 1 << 15,
        features: int = 2,
        hidden: int = 64,
    ):
        super().__init__()
        self.resolutions = ops.growing_resolutions(min(8, resolution), resolution, levels)
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(1e-2 * torch.randn(levels, rows, features, generator=generator))
        self.network = _layers([levels * features, hidden, hidden, 4], generator, nn.ReLU)

    def raw(self, positions: Tensor, directions: Tensor) -> Tensor:
        weights = ops.annealing_weights(len(self.resolutions), max(0.2, 1 - self.coarseness)).to(positions)
        return self.network(ops.hash_grid((positions + 1) / 2, self.table, self.resolutions, weights))


class FrequencyField(Field):
    """NeRF's network (Mildenhall et al. 2020, fig. 7): positions in 10 octaves through 8 layers of 256, again at the
    fifth; then the direction in 4 octaves, for the colour alone."""

    BANDS, DIRECTION_BANDS = 10, 4

    def __init__(self, seed: int = 0, *, width: int = 256, depth: int = 8, again: int = 4):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        place, way = 3 + 6 * self.BANDS, 3 + 6 * self.DIRECTION_BANDS
        self.first = _layers([place, *[width] * again], generator, nn.ReLU, last=True)
        self.second = _layers([width + place, *[width] * (depth - again)], generator, nn.ReLU, last=True)
        self.density = _layers([width, 1], generator, nn.ReLU)
        self.feature = _layers([width, width], generator, nn.ReLU)
        self.color = _layers([width + way, width // 2, 3], generator, nn.ReLU)

    def raw(self, positions: Tensor, directions: Tensor) -> Tensor:
        weights = ops.annealing_weights(self.BANDS, max(0.2, 1 - self.coarseness)).to(positions)
        place = torch.cat([positions, ops.frequency(positions, self.BANDS, weights)], dim=1)
        h = self.second(torch.cat([self.first(place), place], dim=1))
        way = torch.cat([directions, ops.frequency(directions, self.DIRECTION_BANDS)], dim=1)
        return torch.cat([self.density(h), self.color(torch.cat([self.feature(h), way], dim=1))], dim=1)


class SirenField(Field):
    """Layers of sines (Sitzmann et al. 2020)."""

    FIRST, OTHER = 30.0, 30.0

    def __init__(self, seed: int = 0, *, width: int = 256, depth: int = 4):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = [3, *[width] * depth]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        for i, layer in enumerate(self.layers):
            bound = 1 / 3 if i == 0 else math.sqrt(6 / width) / self.OTHER
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
        self.last = _layers([width, 4], generator, nn.ReLU)

    def raw(self, positions: Tensor, directions: Tensor) -> Tensor:
        h = positions
        for i, layer in enumerate(self.layers):
            h = torch.sin((self.FIRST if i == 0 else self.OTHER) * layer(h))
        return self.last(h)


def _layers(sizes: list[int], generator: torch.Generator, activation: type[nn.Module], last: bool = False):
    """Linear layers with an activation between them, and after the last where wanted; seeded by the generator."""
    parts: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layer = nn.Linear(a, b)
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(layer.bias)
        parts += [layer, activation()]
    return nn.Sequential(*(parts if last else parts[:-1]))


FIELDS = ("grid", "hashgrid", "mlp", "siren", "tcnn")


def build_field(
    kind: str, resolution: int, seed: int, *, background: str = "given", views: int = 0, appearance: int = 0
) -> Field:
    """A fresh field of a kind, one of :data:`FIELDS`.

    Args:
        resolution: vertices of the grid along each side, or cells of the hash grid's finest level; the networks have
            none.
        background: one of :data:`factorkit.nerfdiff.fields.background.BACKGROUNDS`.
        views, appearance: numbers of the code of each of so many views; 0: all views are of one tone.

    Raises:
        ConfigError: a kind there is not, or tiny-cuda-nn asked for where it cannot be had.
    """
    field = _bare(kind, resolution, seed)
    field.background = build_background(background, seed)
    if appearance:
        field.appearance = Appearance(views, appearance, seed)
    return field


def _bare(kind: str, resolution: int, seed: int) -> Field:
    if kind == "grid":
        return GridField(resolution, seed)
    if kind == "hashgrid":
        return HashField(resolution, seed)
    if kind == "mlp":
        return FrequencyField(seed)
    if kind == "siren":
        return SirenField(seed)
    if kind == "tcnn":
        from factorkit.nerfdiff.fields.tcnn import TcnnField

        return TcnnField(resolution, seed)
    raise ConfigError(f"field={kind!r} is unknown; choose one of {', '.join(FIELDS)}")
