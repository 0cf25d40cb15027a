"""What the encodings mean, in plain differentiable PyTorch (part of :mod:`factorkit.ops.reference`)."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

#: Multipliers of the vertex hash (Müller et al. 2022, eq. 4); csrc/hash_grid.h holds the same.
HASH_PRIMES = (1, 2_654_435_761, 805_459_861, 3_674_653_429)


def hash_grid(x: Tensor, table: Tensor, weights: Tensor, resolutions: list[int], quintic: bool) -> Tensor:
    """[N, L*F]: at each level the features of the 2^D vertices around x, weighted by how near they are, times the level's
    weight (Müller et al. 2022, section 3). x [N, D], table [L, T, F], weights [L]."""
    features = []
    for level, resolution in enumerate(resolutions):
        cell, place = _cell(x, resolution)
        share = place**3 * (place * (place * 6 - 15) + 10) if quintic else place
        total = 0
        for corner in product((0, 1), repeat=x.shape[1]):
            near, at = _nearness(share, corner), table[level, _rows(cell, corner, resolution, table)]
            total = total + near.prod(1, keepdim=True) * at
        features.append(weights[level] * total)
    return torch.cat(features, dim=1)


def hash_grid_vjp(
    grad: Tensor, x: Tensor, table: Tensor, weights: Tensor, resolutions: list[int], quintic: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`hash_grid` for x and table, themselves differentiable; written out, because no autograd records
    inside an op."""
    d_x, d_tables = torch.zeros_like(x), []
    inside = (x >= 0) & (x <= 1)
    for level, (resolution, upstream) in enumerate(zip(resolutions, grad.chunk(len(resolutions), 1), strict=True)):
        cell, place = _cell(x, resolution)
        share = place**3 * (place * (place * 6 - 15) + 10) if quintic else place
        slope = (30 * (place * (place - 1)).square() if quintic else torch.ones_like(place)) * inside * resolution
        upstream = upstream * weights[level]
        d_table = torch.zeros_like(table[level])
        for corner in product((0, 1), repeat=x.shape[1]):
            near, rows = _nearness(share, corner), _rows(cell, corner, resolution, table)
            d_table = d_table.index_add(0, rows, near.prod(1, keepdim=True) * upstream)
            along = (upstream * table[level, rows]).sum(1)
            steps = [
                (slope[:, d] if up else -slope[:, d]) * along * near[:, :d].prod(1) * near[:, d + 1 :].prod(1)
                for d, up in enumerate(corner)
            ]
            d_x = d_x + torch.stack(steps, dim=1)
        d_tables.append(d_table)
    return d_x, torch.stack(d_tables)


def _cell(x: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """The cell of each point, whole numbers [N, D], and the place in it, 0 to 1."""
    position = x.clamp(0, 1) * resolution
    cell = position.detach().nan_to_num(0).floor().clamp(max=resolution - 1)
    return cell.long(), position - cell


def _nearness(share: Tensor, corner: tuple[int, ...]) -> Tensor:
    """Along each axis the share of the upper vertex, or of the lower one, as the corner has it: [N, D]."""
    return torch.stack([share[:, d] if up else 1 - share[:, d] for d, up in enumerate(corner)], dim=1)


def _rows(cell: Tensor, corner: tuple[int, ...], resolution: int, table: Tensor) -> Tensor:
    return vertex_rows(cell + torch.tensor(corner, device=cell.device), resolution, table.shape[1])


def vertex_rows(vertex: Tensor, resolution: int, rows: int) -> Tensor:
    """Rows of a level's table, [N], of vertices [N, D] with coordinates 0..resolution: one for each vertex where all fit,
    x fastest; their hash elsewhere."""
    dims = vertex.shape[1]
    if (resolution + 1) ** dims <= rows:
        return sum(vertex[:, d] * (resolution + 1) ** d for d in range(dims))
    mixed = vertex[:, 0] * HASH_PRIMES[0]
    for d in range(1, dims):
        mixed = mixed ^ (vertex[:, d] * HASH_PRIMES[d])
    return mixed & (rows - 1)


def frequency(x: Tensor, bands: int, annealing: Tensor | None) -> Tensor:
    """[N, D*2*K]: for each coordinate a_k sin(2^k pi x), then a_k cos(2^k pi x), k = 0..K-1 (Mildenhall et al. 2020,
    eq. 4). x [N, D], annealing [K] or None."""
    angles = x[:, :, None] * (math.pi * 2.0 ** torch.arange(bands, dtype=x.dtype, device=x.device))
    waves = torch.stack([angles.sin(), angles.cos()], dim=2)
    if annealing is not None:
        waves = waves * annealing
    return waves.flatten(1)
