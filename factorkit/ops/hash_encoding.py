"""Multiresolution hash encoding (csrc/hash_grid.h), with gradients for table, coordinates and level weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from factorkit.ops.dispatch import call_extension, register, select

INTERPOLATIONS = ("linear", "quintic")
DIMS, FEATURES, MAX_LEVELS = (2, 3, 4), (1, 2, 4, 8), 32  # as in csrc/hash_grid.h and its CUDA kernels
#: Multipliers of the vertex hash (Müller et al. 2022, eq. 4); csrc/hash_grid.h holds the same.
HASH_PRIMES = (1, 2_654_435_761, 805_459_861, 3_674_653_429)


def interpolate_vertices(x: Tensor, table: Tensor, weights: Tensor, resolutions: list[int], quintic: bool) -> Tensor:
    """Compute :func:`hash_grid` in plain differentiable PyTorch: the reference.

    At each level, the features of the 2^D vertices around x are weighted by proximity and by the level's weight.
    """
    features = []
    for level, resolution in enumerate(resolutions):
        position = x.clamp(0, 1) * resolution
        cell = position.detach().nan_to_num(0).floor().clamp(max=resolution - 1)
        share = position - cell
        if quintic:
            share = share**3 * (share * (share * 6 - 15) + 10)
        total: Tensor | float = 0
        for corner in product((0, 1), repeat=x.shape[1]):
            at = torch.tensor(corner, device=x.device)
            weight = torch.where(at > 0, share, 1 - share).prod(1)
            total = total + weight[:, None] * table[level, vertex_rows(cell.long() + at, resolution, table.shape[1])]
        features.append(weights[level] * total)
    return torch.cat(features, dim=1)


def vertex_rows(vertex: Tensor, resolution: int, rows: int) -> Tensor:
    """Return the rows [N] in a level's table of vertices [N, D] with coordinates 0..resolution.

    Each vertex has its own row where all fit, x fastest; otherwise the row is a hash.
    """
    dims = vertex.shape[1]
    if (resolution + 1) ** dims <= rows:
        return torch.stack([vertex[:, d] * (resolution + 1) ** d for d in range(dims)]).sum(0)
    mixed = vertex[:, 0] * HASH_PRIMES[0]
    for d in range(1, dims):
        mixed = mixed ^ (vertex[:, d] * HASH_PRIMES[d])
    return mixed & (rows - 1)


def hash_grid(
    x: Tensor,
    table: Tensor,
    resolutions: Sequence[int],
    level_weights: Tensor | None = None,
    *,
    interpolation: str = "linear",
) -> Tensor:
    """Interpolate features of points in L lattices over the unit cube and join them: [N, L*F] (Müller et al. 2022).

    A level with (R+1)^D <= T has a row for every vertex; the vertices of a finer one share rows through a hash.
    Outside [0, 1] a point takes the value of the nearest face, with no gradient for that coordinate.

    Gradients reach x, table and level_weights, of second order too (an eikonal loss, a loss on normals): those are
    computed by the slower PyTorch reference. On CUDA the table's gradient is summed with atomics, so its last digits
    vary, unless ``torch.use_deterministic_algorithms`` selects the reference.

    Args:
        x: [N, D], fp32 or fp64, D in 2, 3, 4; the scene is [0, 1]^D. A NaN gives NaN features.
        table: [L, T, F], dtype and device of x; T a power of two, F in 1, 2, 4, 8, L at most 32.
        resolutions: L numbers of cells along an axis, each at least 1 (see :func:`growing_resolutions`).
        level_weights: [L], factors of the levels' features (see :func:`annealing_weights`); a level of weight zero
            costs nothing. None: ones.
        interpolation: "linear", or "quintic" (6t^5 - 15t^4 + 10t^3), whose gradient by x is smooth across cells.

    Raises:
        ValueError: shapes, dtypes, devices, resolutions or an interpolation other than these.
    """
    resolutions = [int(r) for r in resolutions]
    _check(x, table, resolutions, level_weights, interpolation)
    weights = torch.ones(len(resolutions), dtype=x.dtype, device=x.device) if level_weights is None else level_weights
    run = select("hash_grid", interpolate_vertices, x)
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        run = interpolate_vertices
    return run(x, table, weights, resolutions, interpolation == "quintic")


def growing_resolutions(coarsest: int, finest: int, levels: int) -> list[int]:
    """Return ``levels`` resolutions in geometric progression (Müller et al. 2022, eq. 2, 3)."""
    growth = 0.0 if levels == 1 else math.log(finest / coarsest) / (levels - 1)
    return [round(coarsest * math.exp(growth * level)) for level in range(levels)]


def annealing_weights(levels: int, progress: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return weights [levels] that fade the levels in from coarse to fine while ``progress`` goes from 0 to 1.

    w_k = (1 - cos(pi clamp(progress * levels - k, 0, 1))) / 2 (Park et al. 2021, eq. 8): all 0 at 0, all 1 at 1. For
    the levels of :func:`hash_grid` and the bands of :func:`factorkit.ops.frequency`.
    """
    opening = (progress * levels - torch.arange(levels, dtype=torch.float64)).clamp(0, 1)
    return ((1 - torch.cos(math.pi * opening)) / 2).to(dtype)


def _check(x: Tensor, table: Tensor, resolutions: list[int], weights: Tensor | None, interpolation: str) -> None:
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation={interpolation!r} is unknown; choose one of {', '.join(INTERPOLATIONS)}")
    if x.dim() != 2 or x.shape[1] not in DIMS:
        raise ValueError(f"x has shape {tuple(x.shape)}; hash_grid takes points [N, D] with D = 2, 3 or 4")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x is {x.dtype}; hash_grid computes in float32 or float64: convert it with x.float()")
    levels = len(resolutions)
    if not 1 <= levels <= MAX_LEVELS or min(resolutions) < 1 or max(resolutions) >= 2**24:
        raise ValueError(f"resolutions={resolutions}; give 1 to {MAX_LEVELS} numbers of cells, each 1 to 2^24 - 1")
    if table.dim() != 3 or table.shape[0] != levels or table.shape[2] not in FEATURES:
        wanted = f"[{levels}, T, F] with F in {FEATURES}"
        raise ValueError(f"table has shape {tuple(table.shape)}; {levels} resolutions need {wanted}")
    rows = table.shape[1]
    if rows < 1 or rows & (rows - 1) or rows * table.shape[2] >= 2**31:
        raise ValueError(f"table has {rows} rows a level; give a power of two, rows * features below 2^31")
    if weights is not None and weights.shape != (levels,):
        raise ValueError(f"level_weights has shape {tuple(weights.shape)}; {levels} resolutions need [{levels}]")
    for name, other in (("table", table), ("level_weights", weights)):
        if other is not None and (other.dtype, other.device) != (x.dtype, x.device):
            raise ValueError(f"{name} is {other.dtype} on {other.device}, but x is {x.dtype} on {x.device}")


# --- implementations ---


def _align(x: Tensor) -> Tensor:
    """Return x contiguous, at an address from which CUDA can load 16 bytes; a view into other memory is copied."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _sizes(x: Tensor, table: Tensor) -> tuple[int, ...]:
    return x.shape[0], table.shape[1], x.shape[1], table.shape[2]


def _forward(x: Tensor, table: Tensor, weights: Tensor, resolutions: list[int], quintic: bool) -> Tensor:
    tensors, out = (_align(x), _align(table), _align(weights)), _fake(x, table)
    call_extension("hash_grid_forward", x, tensors, _sizes(x, table), resolutions, quintic, out)
    return out


def _fake(x: Tensor, table: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], table.shape[0] * table.shape[2])


def _backward(
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    weights: Tensor,
    resolutions: list[int],
    quintic: bool,
    need_x: bool,
    need_table: bool,
) -> tuple[Tensor, Tensor]:
    tensors = (_align(x), _align(table), _align(weights))
    d_x, d_table = _backward_fake(grad, x, table, need_x, need_table)
    if x.is_cuda:
        d_table.zero_()  # the CUDA kernel adds, the CPU's writes
    gradients = (_align(grad), d_x if need_x else None, d_table if need_table else None)
    call_extension("hash_grid_backward", x, tensors, _sizes(x, table), resolutions, quintic, gradients)
    return d_x, d_table


def _backward_fake(grad: Tensor, x: Tensor, table: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    need_x, need_table = rest[-2:]
    return x.new_empty(x.shape if need_x else 0), table.new_empty(table.shape if need_table else 0)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.resolutions, ctx.quintic = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad: Tensor) -> tuple:
    x, table, weights = ctx.saved_tensors
    need_x, need_table, need_weights = ctx.needs_input_grad[:3]
    d_x = d_table = d_weights = None
    if need_x or need_table:
        d_x, d_table = torch.ops.factorkit.hash_grid_backward(
            grad, x, table, weights, ctx.resolutions, ctx.quintic, need_x, need_table
        )
    if need_weights:
        raw = torch.ops.factorkit.hash_grid(x, table, torch.ones_like(weights), ctx.resolutions, ctx.quintic)
        d_weights = (grad * raw).unflatten(1, (len(ctx.resolutions), -1)).sum((0, 2))
    return d_x if need_x else None, d_table if need_table else None, d_weights, None, None


def _setup_second_order(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.resolutions, ctx.quintic, _, _ = inputs
    ctx.save_for_backward(*tensors)


def _second_order(ctx: Any, on_d_x: Tensor | None, on_d_table: Tensor | None) -> tuple:
    """Differentiate the gradients, which the reference computes again as a graph."""
    further = torch.is_grad_enabled()  # a third order follows
    with torch.enable_grad():
        grad, *inputs = leaves = [
            x.view_as(x) if further and x.requires_grad else x.detach().requires_grad_() for x in ctx.saved_tensors
        ]
        x, table, weights = inputs
        out = interpolate_vertices(x, table, weights, ctx.resolutions, ctx.quintic)
        first = torch.autograd.grad(out, inputs[:2], grad, create_graph=True)
    pairs = [(d, g) for d, g in zip(first, (on_d_x, on_d_table), strict=True) if g is not None and g.shape == d.shape]
    outputs, upstream = [d for d, _ in pairs], [g for _, g in pairs]
    found = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True, create_graph=further)
    return *found, None, None, None, None


register("hash_grid", _forward, _fake, autograd=(_setup_context, _autograd), needs_extension=True)
register(
    "hash_grid_backward", _backward, _backward_fake, autograd=(_setup_second_order, _second_order), needs_extension=True
)
