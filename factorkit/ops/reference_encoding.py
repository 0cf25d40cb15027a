"""What the encodings mean, in plain differentiable PyTorch, written for reading and for checking kernels against."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

#: Multipliers of the vertex hash (Müller et al. 2022, eq. 4); csrc/hash_grid.h holds the same.
HASH_PRIMES = (1, 2_654_435_761, 805_459_861, 3_674_653_429)


def hash_grid(x: Tensor, table: Tensor, weights: Tensor, resolutions: list[int], quintic: bool) -> Tensor:
    """[N, L*F]: at each level the features of the 2^D vertices around x, weighted by how near they are, times the
    level's weight (Müller et al. 2022, section 3). x [N, D], table [L, T, F], weights [L]."""
    features = []
    for level, resolution in enumerate(resolutions):
        position = x.clamp(0, 1) * resolution
        cell = position.detach().nan_to_num(0).floor().clamp(max=resolution - 1)
        share = position - cell
        if quintic:
            share = share**3 * (share * (share * 6 - 15) + 10)
        total = 0
        for corner in product((0, 1), repeat=x.shape[1]):
            at = torch.tensor(corner, device=x.device)
            weight = torch.where(at > 0, share, 1 - share).prod(1)
            total = total + weight[:, None] * table[level, vertex_rows(cell.long() + at, resolution, table.shape[1])]
        features.append(weights[level] * total)
    return torch.cat(features, dim=1)


def vertex_rows(vertex: Tensor, resolution: int, rows: int) -> Tensor:
    """Rows of a level's table, [N], of vertices [N, D] with coordinates 0..resolution: one for each vertex where all
    fit, x fastest; their hash elsewhere."""
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
