"""A scene of 3D Gaussians, drawn as whole images (Kerbl et al. 2023), with a fixed budget (Kheradmand et al. 2024)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit import ops
from factorkit.nerfdiff.fields.base import Field, ImageField
from factorkit.ops.encodings import C0, MAX_DEGREE
from factorkit.ops.project_gaussians import LOW_PASS
from factorkit.rendering import Rendered, contract, from_ndc, image_rays
from factorkit.utils.rng import derived_seed

MIN_OPACITY = 0.005  # below it a Gaussian is moved to where an opaque one is (Kheradmand et al. 2024)
INITIAL_OPACITY = 0.3
MAX_COPIES = 16  # of a Gaussian in one relocation
RELOCATE_EVERY = 50  # steps
RELOCATION_SHARE = 0.8  # of the steps, after which Gaussians stay where they are
START_RATE = 0.03  # the configured learning rate at which NOISE was chosen
NOISE = 30.0  # standard deviations per step of nearly transparent Gaussians, in units of their covariance
DEGREE_SHARE = 0.1  # of the steps, after which the next degree of the harmonics is used
RATES = {"means": 0.03, "log_scales": 0.3, "quaternions": 0.1, "opacities": 1.0, "colors": 0.3, "directional": 0.03}
TRAINING_BYTES = 59 * 4 * 7  # of a Gaussian: numbers, gradients, Adam's moments, average, harmonics and their gradients
DENSITY_CELLS = 64  # along each side of the grid that approximates the Gaussians' density
SAMPLES_PER_GAUSSIAN = 32  # that spread a Gaussian over the cells
POINT_SHARE = 0.5  # of the Gaussians, at most, that start at sparse points: smooth surfaces have none
INITIAL_CELLS = 64  # along each side of the box, from which the first positions are drawn
NEIGHBOURS = 3  # whose mean distance is the first scale of a Gaussian of all space (Kerbl et al. 2023, section 5.1)


class GaussianField(ImageField):
    """Gaussians with opacity and a colour that depends on the direction by spherical harmonics of degree 3.

    :meth:`rasterize` draws whole images of pinhole cameras. For positions in the box it returns a grid of its density,
    which suffices for points, meshes and checks. The Gaussians are in world coordinates, also in forward-facing and in
    unbounded scenes.

    Args:
        count: number of Gaussians; training moves them, but neither adds nor removes any.
        seed: of the initial positions.

    Attributes:
        box_scale: [2], coordinates in the box of a forward-facing scene at a slope of 1 to the viewing axis; None: the
            box is in world coordinates.
        antialiased: whether the Gaussians were trained with the compensation of the low-pass term: some .spz files.
    """

    box_scale: Tensor | None
    antialiased: bool = False

    def __init__(self, count: int, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.means = nn.Parameter(2 * torch.rand(count, 3, generator=generator) - 1)
        self.quaternions = nn.Parameter(torch.randn(count, 4, generator=generator))
        self.log_scales = nn.Parameter(torch.full((count, 3), math.log(0.7 * count ** (-1 / 3))))
        self.opacities = nn.Parameter(torch.full((count,), math.log(INITIAL_OPACITY / (1 - INITIAL_OPACITY))))
        self.colors = nn.Parameter(torch.zeros(count, 1, 3))
        self.directional = nn.Parameter(torch.zeros(count, (MAX_DEGREE + 1) ** 2 - 1, 3))
        self.register_buffer("box_scale", None)
        self.degree = MAX_DEGREE
        self._density: tuple[Any, Tensor] | None = None

    @torch.no_grad()
    def start_from(self, field: Field, seed: int, points: Tensor | None = None, surface: Tensor | None = None) -> None:
        """Move the Gaussians to where another field is dense, with its colours, background and appearance.

        Args:
            field: in the same box [-1, 1]^3, or of all space.
            seed: of the positions.
            points: sparse points [P, 3] of an object scene; up to half of the Gaussians start there.
            surface: positions [N, 3] of what the views show of a field of all space, most of whose cells they do not.
        """
        generator, device = torch.Generator().manual_seed(seed), self.means.device
        if surface is not None:
            self.means.copy_(surface)
            self._start_at(points, generator)
            self.log_scales.copy_(neighbour_distances(self.means).clamp_min(1e-3).log()[:, None])
            self._take_appearance(field)
            return
        line = (torch.arange(INITIAL_CELLS) + 0.5) * 2 / INITIAL_CELLS - 1
        cells = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3).to(device)
        cell = 2 / INITIAL_CELLS
        share = torch.cat([1 - (-cell * field(part, part)[0].float()).exp() for part in cells.split(1 << 16)])
        share = torch.where(share > 0.1 * share.max(), share, 0.0)  # fog is not the scene
        rows = torch.multinomial(share.cpu() + 1e-12, len(self.means), replacement=True, generator=generator).to(device)
        jitter = (torch.rand(len(rows), 3, generator=generator).to(device) - 0.5) * cell
        self.means.copy_(cells[rows] + jitter)
        self._start_at(None if points is None else points[(points.abs() <= 1).all(1)], generator)
        volume = float((share > 0).float().mean()) * 8
        if self.box_scale is not None:  # the far wall of the box is at infinity
            self.means[:, 2].clamp_max_(1 - cell / 2)
        self._take_appearance(field)
        self.means.copy_(self.from_box(self.means))
        self.log_scales.fill_(math.log(max(0.7 * (volume / len(rows)) ** (1 / 3), 1e-3)))
        self.log_scales.add_(self.units().log())

    def _start_at(self, points: Tensor | None, generator: torch.Generator) -> None:
        """Move up to half of the Gaussians to sparse points [P, 3]."""
        if points is not None:
            order = torch.randperm(len(points), generator=generator)[: int(POINT_SHARE * len(self.means))]
            self.means[: len(order)] = points.to(self.means)[order.to(self.means.device)]

    def _take_appearance(self, field: Field) -> None:
        """Copy colours, background and appearance of another field; the means are in its coordinates."""
        color = field(self.means, F.normalize(self.from_box(self.means), dim=1))[1].float()
        self.colors.copy_(((color - 0.5) / C0)[:, None])
        for name in ("background", "appearance"):
            own, other = getattr(self, name), getattr(field, name)
            if own is not None:
                own.load_state_dict(other.state_dict())

    def units(self) -> Tensor:
        """Return the length [N, 1] in the world of a unit of the box, across the viewing axis, at each Gaussian."""
        if self.unbounded:  # grows with the distance, as a pixel does
            return self.means.detach().abs().amax(1, keepdim=True).clamp_min(1)
        if self.box_scale is None:
            return self.means.new_ones(1)
        return -self.means.detach()[:, 2:].clamp_max(-1.0) / self.box_scale.mean()

    def from_box(self, points: Tensor) -> Tensor:
        """Return world coordinates [..., 3] of points in the box, as the camera model of the scene does."""
        if self.box_scale is None:
            return points
        return from_ndc(points, F.pad(self.box_scale / 2, (0, 1)).diag(), 1, 1)

    def to_box(self, points: Tensor) -> Tensor:
        """Return coordinates [..., 3] in the box of points in the world."""
        if self.unbounded:
            return contract(points)
        if self.box_scale is None:
            return points
        depth = -points[..., 2:].clamp_max(-1e-3)
        return torch.cat([points[..., :2] * self.box_scale / depth, 1 - 2 / depth], dim=-1)

    @torch.no_grad()
    def as_covariances(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return centres [N, 3], covariances [N, 3, 3], colours [N, 3] and opacities [N, 1], as viewers take them."""
        spread = rotations(self.quaternions) * self.log_scales.exp()[:, None]
        color = (self.colors[:, 0] * C0 + 0.5).clamp(0, 1)
        parts = (self.means, spread @ spread.mT, color, self.opacities.sigmoid()[:, None])
        centres, covariances, colors, opacities = (x.float().cpu().numpy() for x in parts)
        return centres, covariances, colors, opacities

    def parameter_rates(self, rate: float) -> list[tuple[list[nn.Parameter], float]]:
        """Return each kind of parameter with its learning rate, in units of ``rate``."""
        own = {id(getattr(self, name)) for name in RATES}
        others = [(p, r) for p, r in super().parameter_rates(rate)]
        others = [([x for x in parameters if id(x) not in own], speed) for parameters, speed in others]
        groups = [([getattr(self, name)], factor * rate) for name, factor in RATES.items()]
        groups[0] = groups[0][0], groups[0][1] * float(self.units().median())
        return [group for group in groups if group[0][0].requires_grad] + [group for group in others if group[0]]

    def total_variation(self) -> Tensor:
        """Return the mean opacity plus the mean scale, which the budget's relocation needs to be small."""
        return self.opacities.sigmoid().mean() + (self.log_scales.exp() / self.units()).mean()

    def rasterize(self, pose: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> Rendered:
        """Draw one image [H, W] without background; see :class:`ImageField`."""
        rotation = pose[:3, :3] * pose.new_tensor([1.0, -1.0, -1.0])  # OpenGL's axes to OpenCV's
        upper = torch.cat([rotation.T, -(rotation.T @ pose[:3, 3:])], dim=1)
        view = torch.cat([upper, pose.new_tensor([[0.0, 0.0, 0.0, 1.0]])])
        # Larger images than those of the fit are as blurred as these were: thinner Gaussians would leave gaps.
        low_pass = LOW_PASS * max(1.0, max(size) / self.side) ** 2 if self.side else LOW_PASS
        projected = ops.project_gaussians(
            self.means, self.quaternions, self.log_scales.exp(), view, intrinsics.to(view), size, low_pass=low_pass
        )
        harmonics = torch.cat([self.colors, self.directional], dim=1)
        colors = ops.spherical_harmonics(self.means - pose[:3, 3], harmonics, self.degree) + 0.5
        opacities = self.opacities.sigmoid()
        if self.antialiased:
            opacities = opacities * projected.compensations
        drawn = ops.rasterize_gaussians(projected, colors.clamp_min(0), opacities, size)
        depth = drawn.depth
        if self.box_scale is None:
            depth = depth / -(image_rays(pose, intrinsics, *size).directions * pose[:3, 2]).sum(-1)
        steps = torch.tensor(len(self.means), device=pose.device)
        return Rendered(drawn.color, depth, drawn.opacity, None, None, steps)

    @torch.no_grad()
    def update(self, step: int, steps: int, rate: float, seed: int) -> None:
        """Set the degree of the harmonics, move transparent Gaussians, and relocate invisible and broken ones."""
        self.degree = min(MAX_DEGREE, int(step / max(1.0, DEGREE_SHARE * steps)))
        generator = torch.Generator().manual_seed(derived_seed("gaussians", seed, step))
        opacity, scale = self.opacities.sigmoid(), self.log_scales.exp()
        values = [scale, *(getattr(self, name) for name in RATES)]
        dead = ~torch.stack([x.reshape(len(x), -1).sum(1).isfinite() for x in values]).all(0)
        if 0 < step < RELOCATION_SHARE * steps:
            noise = torch.randn(self.means.shape, generator=generator).to(self.means)
            noise *= (1 / (1 + (100 * (opacity - MIN_OPACITY)).clamp(-40, 40).exp()))[:, None]
            rotation = rotations(self.quaternions)
            moved = (rotation @ (scale.square() * (rotation.mT @ noise[..., None])[..., 0])[..., None])[..., 0]
            self.means.data += NOISE * rate / START_RATE * (1 - step / steps) * moved / self.units()
            if step % RELOCATE_EVERY == 0:
                dead |= ~(opacity > MIN_OPACITY)
        self._relocate(dead, opacity, scale, generator)

    def _relocate(self, dead: Tensor, opacity: Tensor, scale: Tensor, generator: torch.Generator) -> None:
        """Move some Gaussians [N] onto the others, so that copies together look like the one before (eq. 9)."""
        count = int(dead.sum())
        if not count or count == len(dead):
            return
        weights = torch.where(dead, 0.0, opacity.clamp_min(1e-12)).cpu()
        rows = torch.multinomial(weights, count, replacement=True, generator=generator).to(dead.device)
        copies = torch.bincount(rows, minlength=len(dead)) + 1
        copies = copies.clamp_max(MAX_COPIES)
        new = 1 - (1 - opacity) ** (1 / copies)
        total = torch.zeros_like(opacity)
        for i in range(1, int(copies.max()) + 1):
            terms = sum(math.comb(i - 1, k) * (-1) ** k / math.sqrt(k + 1) * new ** (k + 1) for k in range(i))
            total += torch.where(i <= copies, terms, 0.0)
        changed = copies > 1
        self.opacities[changed] = torch.logit(new[changed].clamp(MIN_OPACITY, 0.999))
        self.log_scales[changed] = (scale * (opacity / total)[:, None])[changed].log()
        for name in RATES:
            values = getattr(self, name)
            values[dead] = values[rows]

    def forward(self, positions: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Return density [M] and colour [M, 3] of the grid that approximates the Gaussians; without gradient."""
        grid = self._density_grid()
        positions = contract(positions) if self.unbounded else positions
        values = F.grid_sample(grid, positions.flip(-1)[None, :, None, None].to(grid), align_corners=False)
        values = values[0, :, :, 0, 0].T
        inside = (positions.abs().amax(-1) <= 1).to(values.dtype)
        density = values[:, 0] * inside
        return density, (values[:, 1:] / values[:, :1].clamp_min(1e-6)).clamp(0, 1)

    @torch.no_grad()
    def _density_grid(self) -> Tensor:
        """Return density, and colour times density, [1, 4, R, R, R]: a Gaussian's samples in the cells they are in."""
        state = tuple((p.data_ptr(), p._version) for p in (self.means, self.log_scales, self.opacities, self.colors))
        if self._density is not None and self._density[0] == state:
            return self._density[1]
        generator = torch.Generator().manual_seed(0)
        scale, rotation = self.log_scales.exp(), rotations(self.quaternions)
        noise = torch.randn(SAMPLES_PER_GAUSSIAN, len(scale), 3, generator=generator).to(scale) * scale
        points = self.means + (rotation @ noise[..., None])[..., 0]
        depth = -torch.log1p(-self.opacities.sigmoid().clamp_max(0.999))  # optical, through the centre
        mean_scale = scale.prod(1) ** (1 / 3)
        mass = depth * 2 * math.pi * mean_scale.square() / SAMPLES_PER_GAUSSIAN / (2 / DENSITY_CELLS) ** 3
        if self.unbounded:  # volume of a cell in the world: contraction shrinks it along the ray and across
            size = self.units()[:, 0]
            mass = mass / (2 * size.square()) / (2 * size.square() / (2 * size - 1)).square()
        if self.box_scale is not None:  # the optical depth along the viewing axis is the same in the box
            mass = mass * self.box_scale.prod() / self.means[:, 2].clamp_max(-1.0).square()
        cells = ((self.to_box(points) + 1) / 2 * DENSITY_CELLS).floor().long()
        inside = ((cells >= 0) & (cells < DENSITY_CELLS)).all(-1)
        index = ((cells[..., 0] * DENSITY_CELLS + cells[..., 1]) * DENSITY_CELLS + cells[..., 2])[inside]
        color = (self.colors[:, 0] * C0 + 0.5).clamp(0, 1)
        values = torch.cat([mass[:, None], mass[:, None] * color], dim=1).expand(*inside.shape, 4)[inside]
        grid = scale.new_zeros(DENSITY_CELLS**3, 4).index_add_(0, index, values)
        grid = grid.T.reshape(1, 4, *[DENSITY_CELLS] * 3)
        self._density = (state, grid)
        return grid


def neighbour_distances(points: Tensor) -> Tensor:
    """Return the mean distance [N] of points [N, 3] to their nearest neighbours."""
    count = min(NEIGHBOURS, len(points) - 1) + 1  # the first is the point itself
    nearest = [torch.cdist(part, points).topk(count, largest=False).values for part in points.split(1 << 10)]
    return torch.cat(nearest).sum(1) / max(1, count - 1)


def rotations(quaternions: Tensor) -> Tensor:
    """Return rotation matrices [N, 3, 3] of quaternions [N, 4] as (w, x, y, z), of any length but 0."""
    w, x, y, z = F.normalize(quaternions, dim=1).unbind(1)
    rows = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)]
    rows += [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)]
    rows += [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]
    return torch.stack(rows, dim=1).unflatten(1, (3, 3))
