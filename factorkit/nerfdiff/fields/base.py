"""What all radiance fields share: their interface, backgrounds, appearance of each view, and occupancy grids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit import ops
from factorkit.rendering.cameras import contract
from factorkit.rendering.occupancy import OccupancyGrid
from factorkit.rendering.render import Field as RenderedField
from factorkit.rendering.render import Rendered
from factorkit.rendering.sampling import OccupancySampling, Sampling, UnboundedSampling
from factorkit.utils.errors import ConfigError

BACKGROUNDS = ("given", "learned", "field")


class ConstantBackground(nn.Module):
    """One colour, initially mid-grey."""

    LEARNING_RATE = 0.03  # independent of the field's

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(3))

    def forward(self, directions: Tensor) -> Tensor:
        """Return colours [..., 3] in [0, 1] for unit viewing directions [..., 3]."""
        return self.raw.sigmoid().expand_as(directions)


class DirectionalBackground(nn.Module):
    """A small network from the encoded viewing direction to a colour, initially mid-grey."""

    LEARNING_RATE = 5e-3  # independent of the field's
    BANDS = 3

    def __init__(self, seed: int = 0, hidden: int = 64):
        super().__init__()
        sizes = [3 + 6 * self.BANDS, hidden, hidden]
        generator = torch.Generator().manual_seed(seed)
        layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        for layer in layers:
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)
        self.hidden = nn.ModuleList(layers)
        self.last = nn.Linear(hidden, 3)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, directions: Tensor) -> Tensor:
        """Return colours [..., 3] in [0, 1] for unit viewing directions [..., 3]."""
        flat = directions.reshape(-1, 3)
        h = torch.cat([flat, ops.frequency(flat, self.BANDS)], dim=1)
        for layer in self.hidden:
            h = layer(h).relu()
        return self.last(h).sigmoid().reshape(directions.shape)


Background = ConstantBackground | DirectionalBackground


def build_background(kind: str, seed: int) -> Background | None:
    """Build a background of a kind in :data:`BACKGROUNDS`; None for "given", the colour stored with the views.

    Raises:
        ConfigError: unknown kind.
    """
    if kind not in BACKGROUNDS:
        raise ConfigError(f"background={kind!r} is unknown; choose one of {', '.join(BACKGROUNDS)}")
    if kind == "given":
        return None
    return ConstantBackground() if kind == "learned" else DirectionalBackground(seed)


class Appearance(nn.Module):
    """A learned code for each training view, mapped to an affine colour transform.

    Codes follow Martin-Brualla et al. 2021 (section 4.1), affine maps Rematas et al. 2022 (section 4.2). Codes are
    centred, so the mean code is the identity; novel views use it. The transform is linear in the colour, so it can be
    applied to the rendered colour, and the density does not depend on it.

    Args:
        dim: size of each code, at least 1.
        seed: of the map from codes to affine transforms.
    """

    LEARNING_RATE = 0.01  # independent of the field's

    def __init__(self, views: int, dim: int, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.codes = nn.Parameter(torch.zeros(views, dim))
        self.map = nn.Parameter(torch.randn(dim, 12, generator=generator) / dim**0.5)

    def forward(self, views: Tensor, color: Tensor, opacity: Tensor | float) -> Tensor:
        """Return colours [B, ..., 3] with the appearance of training views [B].

        Args:
            views: indices of training views, [B].
            color: [B, ..., 3].
            opacity: [B, ...] or one number; scales the shift of the transform.
        """
        transform = ((self.codes - self.codes.mean(0))[views] @ self.map).unflatten(1, (4, 3))
        matrix, shift = transform[:, :3], transform[:, 3].reshape(-1, *[1] * (color.dim() - 2), 3)
        change = (color.flatten(1, -2) @ matrix).reshape(color.shape)
        return color + change + shift * (opacity[..., None] if isinstance(opacity, Tensor) else opacity)


DENSITY_SCALE = 13.0  # density at a raw value of about 1: opaque within a sixth of the box's half side
DENSITY_BIAS = -2.0  # added to the raw density: every ray starts with a thin fog, so that every sample has a gradient


class Field(nn.Module):
    """A radiance field over the box [-1, 1]^3, or all of space, as :func:`factorkit.render` takes it.

    Subclasses implement :meth:`raw`; this class maps raw values to density and colour.

    Attributes:
        is_blurred: whether it runs other kernels because of its coarseness.
        background: maps directions [..., 3] to colours, or None to use the background of the views.
        appearance: per-view colour transforms, or None if all training views look alike.
        occupancy: grid of non-empty space, or None to sample everywhere.
        unbounded: whether positions anywhere are contracted to the box; see :func:`factorkit.rendering.contract`.
    """

    RECORDABLE = True  # by a CUDA graph, without an occupancy grid
    is_blurred: bool = False
    unbounded: bool = False
    background: Background | None
    appearance: Appearance | None
    occupancy: OccupancyGrid | None

    def __init__(self) -> None:
        super().__init__()
        for name in ("background", "appearance", "occupancy"):
            self.register_module(name, None)
        self._coarseness = 0.0

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can record the rendering: the host must know the number of samples in occupied cells."""
        return self.RECORDABLE and self.occupancy is None

    @property
    def coarseness(self) -> float:
        """In [0, 1]; 1 blurs the field to its large shapes, for coarse-to-fine training."""
        return self._coarseness

    @coarseness.setter
    def coarseness(self, value: float) -> None:
        self._coarseness = value
        self.update_blur()

    def update_blur(self) -> None:
        """Compute, into tensors that stay in place, what :meth:`raw` reads because of the coarseness."""

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
        """Return density [M] per unit of length, 0 outside the box unless unbounded, and colour [M, 3] in [0, 1]."""
        if self.unbounded:
            density, color = self._evaluate(contract(positions), directions)
            # Cells grow by the squared distance along the rays, and should not become opaque by that alone.
            return density / positions.abs().amax(-1).clamp_min(1).square(), color
        return self._evaluate(positions, directions)

    def _evaluate(self, positions: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        raw = self.raw(positions, directions)
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        inside = (positions.detach().abs().amax(-1) <= 1).to(raw.dtype)
        return DENSITY_SCALE * inside * F.softplus(raw[:, 0] + DENSITY_BIAS), raw[:, 1:].sigmoid()


class ImageField(Field):
    """A field that draws whole images of pinhole cameras instead of answering for points along rays.

    Attributes:
        side: longer side in pixels of the images that it was fitted to, whose blur it has learned; 0: none yet.
    """

    side: int = 0
    RECORDABLE = False  # the host reads how many tiles the Gaussians cover

    def rasterize(self, pose: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> Rendered:
        """Draw one image without background: colour [H, W, 3], depth and opacity [H, W].

        The depth is along the rays, in a forward-facing scene along the viewing axis.

        Args:
            pose: camera-to-world, [4, 4]; gets gradients, as do the intrinsics.
            intrinsics: [3, 3], in pixels.
            size: height and width.
        """
        raise NotImplementedError

    def update(self, step: int, steps: int, rate: float, seed: int) -> None:
        """Change the field before a training step, the same way on all processes."""


def keep_address(old: Tensor, new: Tensor) -> Tensor:
    """Copy ``new`` into ``old`` and return that, where a CUDA graph reads it; return ``new`` where it does not fit.

    These tensors are no buffers: those of the averaged model are copied from the model in training.
    """
    if (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
        return new
    return old.copy_(new)


def linear_layers(sizes: list[int], generator: torch.Generator, activation_after_last: bool = False) -> nn.Sequential:
    """Build linear layers with ReLUs between them, initialised from ``generator``."""
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layer = nn.Linear(inputs, outputs)
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(layer.bias)
        modules += [layer, nn.ReLU()]
    return nn.Sequential(*(modules if activation_after_last else modules[:-1]))


OCCUPANCY_CELLS = 64  # along each side of the grid of a field that is not trained any more
VIEWER_SAMPLES = 128  # along a ray of an unbounded scene
OCCUPANCY_UPDATES = 4  # evaluations of each of its cells
MAX_POSITIONS = 1 << 18  # evaluated at once
OCCUPANCY_UPDATE_EVERY = 10  # training steps
OCCUPANCY_DECAY = 0.7  # of the stored density at each update: a few hundred steps must empty most of the box


def build_occupancy_grid(cells: int) -> OccupancyGrid:
    """Build a grid with ``cells`` along each side of the box; all cells start occupied."""
    return OccupancyGrid((-1.0,) * 3, (1.0,) * 3, resolution=cells, decay=OCCUPANCY_DECAY)


def occupancy_cells(samples_per_ray: int) -> int:
    """Return the number of cells along each side that suits a number of samples per ray."""
    return 64 if samples_per_ray >= 64 else 32


def update_occupancy(field: Field, step: int) -> None:
    """Update the occupancy grid of a field in training, if it has one and the step is due.

    A blurred field is skipped: what it shows may move while it sharpens.
    """
    if field.occupancy is not None and step and step % OCCUPANCY_UPDATE_EVERY == 0 and not field.coarseness:
        field.occupancy.update(lambda positions: density(field, positions))


@torch.no_grad()
def occupied_sampling(field: RenderedField, lower: Sequence[float], upper: Sequence[float]) -> OccupancySampling:
    """Build sampling of the occupied cells between two corners of the field's box.

    Uses the field's own grid for the whole box, else a new grid of 64^3 cells.
    """
    grid = getattr(field, "occupancy", None)
    if grid is not None and (*lower, *upper) == (-1.0,) * 3 + (1.0,) * 3:
        return OccupancySampling(grid, step=1 / OCCUPANCY_CELLS)
    grid = OccupancyGrid(lower, upper, resolution=OCCUPANCY_CELLS).to(field_device(field))
    for _ in range(OCCUPANCY_UPDATES):
        grid.update(lambda positions: density(field, positions))
    return OccupancySampling(grid, step=grid.cell_side / 2)


def viewer_sampling(field: RenderedField, lower: Sequence[float], upper: Sequence[float]) -> Sampling:
    """Build sampling of the occupied cells between two corners, or of the whole scene if the field is unbounded."""
    if getattr(field, "unbounded", False):
        return UnboundedSampling(VIEWER_SAMPLES)
    return occupied_sampling(field, lower, upper)


def density(field: RenderedField, positions: Tensor) -> Tensor:
    """Return the field's density [M] at positions [M, 3], evaluated in parts."""
    parts = positions.split(MAX_POSITIONS)
    return torch.cat([field(part, torch.zeros_like(part))[0].reshape(-1) for part in parts])


def field_device(field: RenderedField) -> torch.device:
    """Return the device of a field's parameters; the CPU for a plain function."""
    parameters: Iterable[Tensor] = getattr(field, "parameters", tuple)()
    return next((parameter.device for parameter in parameters), torch.device("cpu"))
