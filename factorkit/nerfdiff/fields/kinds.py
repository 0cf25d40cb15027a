"""Fields by name: dense grid, hash grid, NeRF's network, SIREN, tiny-cuda-nn, Gaussians; fresh, or from weights.

tiny-cuda-nn is on no index: https://github.com/NVlabs/tiny-cuda-nn explains how to build it. Importing it needs a CUDA
device.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit import ops
from factorkit.nerfdiff.fields.base import (
    Appearance,
    Field,
    ImageField,
    build_background,
    build_occupancy_grid,
    keep_address,
    linear_layers,
)
from factorkit.nerfdiff.fields.gaussians import GaussianField
from factorkit.utils.errors import ConfigError

FIELDS = ("grid", "hashgrid", "mlp", "siren", "tcnn", "gaussians")

UNBOUNDED_VARIATION, UNBOUNDED_VERTICES = 6.0, 32  # factor on the total variation, of a grid of so many vertices
MIN_BLUR_CELLS = 0.3  # a Gaussian narrower than this many cells changes nothing visible


class GridField(Field):
    """Raw values at the vertices of a dense grid, interpolated trilinearly.

    Args:
        resolution: vertices along each side.
        blur: standard deviation of the blur at full coarseness, in units of the box's half side.
    """

    RAW_SCALE = 3.0  # from stored to raw values; it multiplies the effective learning rate

    def __init__(self, resolution: int, seed: int = 0, blur: float = 0.27):
        super().__init__()
        self.resolution, self.blur = resolution, blur
        generator = torch.Generator().manual_seed(seed)
        shape = (resolution, resolution, resolution, 4)
        self.values = nn.Parameter(0.1 * torch.randn(shape, generator=generator))
        self._blur = torch.empty(0)  # weights [R, R] along an axis

    def update_blur(self) -> None:
        """Compute the weights of the blur; see :class:`Field`."""
        sigma = self.coarseness * self.blur * (self.resolution - 1) / 2
        self.is_blurred = sigma >= MIN_BLUR_CELLS
        if self.is_blurred:
            index = torch.arange(self.resolution, device=self.values.device)
            weights = torch.exp(-((index[:, None] - index) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
            self._blur = keep_address(self._blur, weights)

    def raw(self, positions: Tensor, directions: Tensor) -> Tensor:
        """Return interpolated raw values [M, 4]; see :class:`Field`."""
        table = self.blurred_values().flatten(0, 2)
        rows = 1 << (len(table) - 1).bit_length()
        table = F.pad(table, (0, 0, 0, rows - len(table)))
        return self.RAW_SCALE * ops.hash_grid((positions + 1) / 2, table[None], [self.resolution - 1])

    def blurred_values(self) -> Tensor:
        """Return the values [R, R, R, 4] after a Gaussian blur along each axis."""
        if not self.is_blurred:
            return self.values
        values: Tensor = self.values
        weights = self._blur.to(values.device)
        for _ in range(3):  # each pass blurs the first axis and moves it behind the other two
            values = torch.tensordot(values, weights, dims=([0], [1])).permute(0, 1, 3, 2)
        return values

    def total_variation(self) -> Tensor:
        """Return the mean squared difference of neighbouring values, summed over the axes.

        Few views show each cell of a room: an unbounded field has 6 times as much, and grids above 32 vertices as much
        as a grid of 32 with the same slopes.
        """
        v = self.values
        differences = (v[1:] - v[:-1], v[:, 1:] - v[:, :-1], v[:, :, 1:] - v[:, :, :-1])
        total = torch.stack([difference.square().mean() for difference in differences]).sum()
        if not self.unbounded:
            return total
        return UNBOUNDED_VARIATION * max(1.0, self.resolution / UNBOUNDED_VERTICES) ** 2 * total

    def resampled(self, resolution: int) -> GridField:
        """Return the same field on a grid of another resolution."""
        field = GridField(resolution, blur=self.blur)
        field.unbounded = self.unbounded
        values = self.values.detach().permute(3, 0, 1, 2)[None]
        values = F.interpolate(values, size=(resolution,) * 3, mode="trilinear", align_corners=True)
        field.values.data = values[0].permute(1, 2, 3, 0).contiguous()
        field.background, field.appearance = copy.deepcopy(self.background), copy.deepcopy(self.appearance)
        return field


MIN_LEVEL_SHARE = 0.2  # share of the levels that even the coarsest field shows


class HashField(Field):
    """A multiresolution hash grid and a small network; finer levels fade in as coarseness falls.

    Args:
        resolution: cells of the finest level along each side.
        seed: of table and network.
        levels: number of resolutions.
        rows: entries of each level's table, a power of two.
        features: numbers in each entry.
        hidden: units in each hidden layer.
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
        self.network = linear_layers([levels * features, hidden, hidden, 4], generator)
        self._weights = torch.empty(0)
        self.update_blur()

    def update_blur(self) -> None:
        """Compute the weights of the levels; see :class:`Field`."""
        shown, device = max(MIN_LEVEL_SHARE, 1 - self.coarseness), self.table.device
        self._weights = keep_address(self._weights, ops.annealing_weights(len(self.resolutions), shown, device=device))

    def raw(self, positions: Tensor, directions: Tensor) -> Tensor:
        """Return raw values [M, 4] of the network on hash grid features; see :class:`Field`."""
        features = ops.hash_grid((positions + 1) / 2, self.table, self.resolutions, self._weights.to(positions))
        raw: Tensor = self.network(features)
        return raw


MIN_BAND_SHARE = 0.2  # share of the frequency bands that even the coarsest field uses


class FrequencyField(Field):
    """NeRF's network (Mildenhall et al. 2020, fig. 7).

    Encoded positions pass through 8 layers of 256 units with a skip connection; the encoded direction only affects the
    colour.

    Args:
        width: units in each layer.
        skip_at: number of layers before the encoded position is concatenated again.
    """

    BANDS, DIRECTION_BANDS = 10, 4

    def __init__(self, seed: int = 0, *, width: int = 256, depth: int = 8, skip_at: int = 4):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        position_size, direction_size = 3 + 6 * self.BANDS, 3 + 6 * self.DIRECTION_BANDS
        self.first = linear_layers([position_size, *[width] * skip_at], generator, True)
        self.second = linear_layers([width + position_size, *[width] * (depth - skip_at)], generator, True)
        self.density = linear_layers([width, 1], generator)
        self.feature = linear_layers([width, width], generator)
        self.color = linear_layers([width + direction_size, width // 2, 3], generator)
        self._weights = torch.empty(0)
        self.update_blur()

    def update_blur(self) -> None:
        """Compute the weights of the bands; see :class:`Field`."""
        shown, device = max(MIN_BAND_SHARE, 1 - self.coarseness), next(self.parameters()).device
        self._weights = keep_address(self._weights, ops.annealing_weights(self.BANDS, shown, device=device))

    def raw(self, positions: Tensor, directions: Tensor) -> Tensor:
        """Return raw values [M, 4] of the network on encoded positions; see :class:`Field`."""
        waves = ops.frequency(positions, self.BANDS, self._weights.to(positions))
        encoded = torch.cat([positions, waves], dim=1)
        h = self.second(torch.cat([self.first(encoded), encoded], dim=1))
        direction = torch.cat([directions, ops.frequency(directions, self.DIRECTION_BANDS)], dim=1)
        return torch.cat([self.density(h), self.color(torch.cat([self.feature(h), direction], dim=1))], dim=1)


class SirenField(Field):
    """A network with sine activations, initialised as in Sitzmann et al. 2020, section 3.2."""

    OMEGA = 30.0  # factor inside every sine, the paper's value

    def __init__(self, seed: int = 0, *, width: int = 256, depth: int = 4):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = [3, *[width] * depth]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        for i, layer in enumerate(self.layers):
            bound = 1 / 3 if i == 0 else math.sqrt(6 / width) / self.OMEGA
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
        self.last = linear_layers([width, 4], generator)

    def raw(self, positions: Tensor, directions: Tensor) -> Tensor:
        """Return raw values [M, 4] of the network; see :class:`Field`."""
        h = positions
        for layer in self.layers:
            h = torch.sin(self.OMEGA * layer(h))
        raw: Tensor = self.last(h)
        return raw


COARSEST_RESOLUTION, LEVELS, LOG2_ROWS, FEATURES = 8, 8, 15, 2  # of the hash grid, as in HashField
GEOMETRY_OUTPUTS = 16  # outputs of the first network: density, and the features that the second network reads
MAX_SEED = 1 << 31


class TcnnField(Field):
    """Instant NGP's two networks: position to density and features, features and direction to colour.

    ``coarseness`` has no effect. tiny-cuda-nn takes positions in [0, 1] and computes in half precision where the GPU
    supports it. Its gradients are summed in no fixed order, so a resumed run is not bit-identical.

    Args:
        resolution: cells of the finest level along each side.

    Raises:
        ConfigError: tiny-cuda-nn cannot be imported.
    """

    RECORDABLE = False  # not known: it allocates memory of its own

    def __init__(self, resolution: int, seed: int = 0):
        super().__init__()
        tcnn = _import_tinycudann()
        coarsest = min(COARSEST_RESOLUTION, resolution)
        grid = {
            "otype": "HashGrid",
            "n_levels": LEVELS,
            "n_features_per_level": FEATURES,
            "log2_hashmap_size": LOG2_ROWS,
            "base_resolution": coarsest,
            "per_level_scale": (resolution / coarsest) ** (1 / (LEVELS - 1)),
        }
        harmonics = {"n_dims_to_encode": 3, "otype": "SphericalHarmonics", "degree": 4}
        both = {"otype": "Composite", "nested": [harmonics, {"otype": "Identity"}]}
        network, inputs = tcnn.NetworkWithInputEncoding, 3 + GEOMETRY_OUTPUTS - 1
        self.geometry = network(3, GEOMETRY_OUTPUTS, grid, _network_config(1), seed=seed % MAX_SEED)
        self.color = network(inputs, 3, both, _network_config(2), seed=(seed + 1) % MAX_SEED)

    def raw(self, positions: Tensor, directions: Tensor) -> Tensor:
        """Return raw values [M, 4] in fp32; see :class:`Field`."""
        if not len(positions):  # tiny-cuda-nn rejects empty batches
            return positions.new_zeros(0, 4)
        geometry = self.geometry((positions + 1) / 2).float()
        direction = F.normalize(directions, dim=1)
        color = self.color(torch.cat([(direction + 1) / 2, geometry[:, 1:]], dim=1)).float()
        return torch.cat([geometry[:, :1], color], dim=1)


def _network_config(hidden_layers: int) -> dict[str, Any]:
    return {
        "otype": "FullyFusedMLP",
        "activation": "ReLU",
        "output_activation": "None",
        "n_neurons": 64,
        "n_hidden_layers": hidden_layers,
    }


def _import_tinycudann() -> Any:
    try:
        import tinycudann
    except (ImportError, OSError) as error:  # OSError: there is no CUDA device
        raise ConfigError(
            f'field="tcnn" needs tiny-cuda-nn and a CUDA device ({error}). Build it as '
            'https://github.com/NVlabs/tiny-cuda-nn explains, or use field="hashgrid"'
        ) from error
    return tinycudann


def build_field(
    kind: str,
    resolution: int,
    seed: int,
    *,
    background: str = "given",
    views: int = 0,
    appearance_dim: int = 0,
    unbounded: bool = False,
) -> Field:
    """Build a fresh field.

    Args:
        kind: one of :data:`FIELDS`.
        resolution: vertices of the grid, or cells of the finest hash grid level, along each side; the number of
            Gaussians; unused by networks.
        background: one of :data:`factorkit.nerfdiff.fields.base.BACKGROUNDS`.
        views: number of training views with an appearance code.
        appearance_dim: size of each code; 0 for none.
        unbounded: whether the field covers all of space.

    Raises:
        ConfigError: unknown kind, or tiny-cuda-nn cannot be imported.
    """
    field: Field
    if kind in ("mlp", "siren"):
        field = FrequencyField(seed) if kind == "mlp" else SirenField(seed)
    elif kind in FIELDS:
        classes = {"grid": GridField, "hashgrid": HashField, "tcnn": TcnnField, "gaussians": GaussianField}
        field = classes[kind](resolution, seed)
    else:
        raise ConfigError(f"field={kind!r} is unknown; choose one of {', '.join(FIELDS)}")
    field.unbounded = unbounded
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
    if "log_scales" in weights:
        resolution = len(weights["log_scales"])
    codes = weights.get("appearance.codes", torch.empty(0, 0))
    field = build_field(
        kind,
        resolution,
        settings["seed"],
        background=settings.get("background", "given"),
        views=codes.shape[0],
        appearance_dim=codes.shape[1],
        unbounded=settings.get("unbounded") == "yes",
    )
    if "occupancy.density" in weights:
        field.occupancy = build_occupancy_grid(round(weights["occupancy.density"].shape[1] ** (1 / 3)))
    if "box_scale" in weights:
        field.box_scale = weights["box_scale"].clone()
    field.load_state_dict(weights)
    if isinstance(field, ImageField):
        field.side = max(settings["scene"]["size"])
    return field
