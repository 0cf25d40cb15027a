"""Encodings of positions and directions: sines in octaves, hashed grids of several resolutions, spherical harmonics.

The gradient of the sines is computed from their output. The hashed grids (csrc/hash_grid.h) have gradients for table,
coordinates and level weights. The harmonics are real, of degrees 0 to 3, in the order and with the signs of 3DGS (Sloan
2013), all in plain PyTorch: with 16 numbers a direction they are bound by memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from factorkit.ops.dispatch import call_extension, register, select

INTERPOLATIONS = ("linear", "quintic")
DIMS, FEATURES, MAX_LEVELS = (2, 3, 4), (1, 2, 4, 8), 32  # as in csrc/hash_grid.h and its CUDA kernels
#: Multipliers of the vertex hash (Müller et al. 2022, eq. 4); csrc/hash_grid.h holds the same.
HASH_PRIMES = (1, 2_654_435_761, 805_459_861, 3_674_653_429)
MAX_DEGREE = 3
C0 = 0.5 / math.sqrt(math.pi)  # the value of the harmonic of degree 0


def encode_waves(x: Tensor, bands: int, annealing: Tensor | None) -> Tensor:
    """Compute :func:`frequency` in plain differentiable PyTorch: the reference."""
    angles = x[:, :, None] * _octaves(x, bands)
    waves = torch.stack([angles.sin(), angles.cos()], dim=2)
    if annealing is not None:
        waves = waves * annealing
    return waves.flatten(1)


def frequency(x: Tensor, bands: int, annealing: Tensor | None = None) -> Tensor:
    """Encode each coordinate by sines and cosines in octaves: [N, D*2*K] (Mildenhall et al. 2020, eq. 4).

    For each coordinate first a_k sin(2^k pi x), k = 0..K-1, then a_k cos(2^k pi x). Gradients of any order reach x and
    ``annealing``.

    Args:
        x: [N, D], any D, fp32 or fp64; usually within [-1, 1].
        bands: K, at least 1.
        annealing: [K] factors a_k in the dtype and on the device of x (see :func:`factorkit.ops.annealing_weights`).
            None: ones.

    Raises:
        ValueError: other shapes or dtypes, bands < 1.
    """
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; frequency takes points [N, D], float32 or float64")
    if bands < 1:
        raise ValueError(f"bands={bands}; give at least 1")
    if annealing is not None:
        if annealing.shape != (bands,):
            raise ValueError(f"annealing has shape {tuple(annealing.shape)}; {bands} bands need [{bands}]")
        if (annealing.dtype, annealing.device) != (x.dtype, x.device):
            raise ValueError(f"annealing is {annealing.dtype} on {annealing.device}, but x is {x.dtype} on {x.device}")
    return select("frequency", encode_waves, x)(x, bands, annealing)


def _frequency_forward(x: Tensor, bands: int, annealing: Tensor | None) -> Tensor:
    waves = x.new_empty(*x.shape, 2, bands)
    angles = x[:, :, None] * _octaves(x, bands)
    torch.sin(angles, out=waves[:, :, 0])
    torch.cos(angles, out=waves[:, :, 1])
    if annealing is not None:
        waves *= annealing
    return waves.flatten(1)


def _frequency_fake(x: Tensor, bands: int, annealing: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] * 2 * bands)


def _octaves(x: Tensor, bands: int) -> Tensor:
    return math.pi * 2.0 ** torch.arange(bands, dtype=x.dtype, device=x.device)


def _frequency_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, ctx.bands, _ = inputs
    ctx.save_for_backward(x, output)


def _frequency_autograd(ctx: Any, grad: Tensor) -> tuple:
    x, out = ctx.saved_tensors
    need_x, _, need_annealing = ctx.needs_input_grad
    d_x = d_annealing = None
    grad = grad.unflatten(1, (x.shape[1], 2, ctx.bands))
    if need_x:
        # d sin = cos and d cos = -sin; the output holds both, times a_k.
        sines, cosines = out.unflatten(1, (x.shape[1], 2, ctx.bands)).unbind(2)
        d_x = ((grad[:, :, 0] * cosines - grad[:, :, 1] * sines) * _octaves(x, ctx.bands)).sum(2)
    if need_annealing:
        plain = torch.ops.factorkit.frequency(x, ctx.bands, None).unflatten(1, (x.shape[1], 2, ctx.bands))
        d_annealing = (grad * plain).sum((0, 1, 2))
    return d_x, None, d_annealing


register("frequency", _frequency_forward, _frequency_fake, autograd=(_frequency_setup_context, _frequency_autograd))


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


def annealing_weights(levels: int, progress: float, *, device: torch.device | None = None) -> Tensor:
    """Return weights [levels] that fade the levels in from coarse to fine while ``progress`` goes from 0 to 1.

    w_k = (1 - cos(pi clamp(progress * levels - k, 0, 1))) / 2 (Park et al. 2021, eq. 8): all 0 at 0, all 1 at 1. For
    the levels of :func:`hash_grid` and the bands of :func:`factorkit.ops.frequency`.
    """
    opening = (progress * levels - torch.arange(levels, dtype=torch.float64, device=device)).clamp(0, 1)
    return ((1 - torch.cos(math.pi * opening)) / 2).float()


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


def harmonic_basis(directions: Tensor, degree: int) -> Tensor:
    """Return the harmonics [..., (degree + 1)^2] at unit directions [..., 3]."""
    x, y, z = directions.unbind(-1)
    basis = [torch.full_like(x, C0)]
    if degree >= 1:
        c1 = math.sqrt(3 / (4 * math.pi))
        basis += [-c1 * y, c1 * z, -c1 * x]
    if degree >= 2:
        c2, c20, c22 = (math.sqrt(k / math.pi) / 4 for k in (60, 5, 15))
        xx, yy, zz = x * x, y * y, z * z
        basis += [c2 * x * y, -c2 * y * z, c20 * (2 * zz - xx - yy), -c2 * x * z, c22 * (xx - yy)]
    if degree >= 3:
        c30, c31, c32, c33 = (math.sqrt(k / math.pi) / 4 for k in (7, 10.5, 105, 17.5))
        basis += [
            -c33 * y * (3 * xx - yy),
            2 * c32 * x * y * z,
            -c31 * y * (4 * zz - xx - yy),
            c30 * z * (2 * zz - 3 * xx - 3 * yy),
            -c31 * x * (4 * zz - xx - yy),
            c32 * z * (xx - yy),
            -c33 * x * (xx - 3 * yy),
        ]
    return torch.stack(basis, dim=-1)


def spherical_harmonics(directions: Tensor, coefficients: Tensor, degree: int | None = None) -> Tensor:
    """Evaluate functions on the sphere; differentiable in directions and coefficients, of every order.

    Args:
        directions: [N, 3], of any length; of length 0: no direction, only the harmonics' value at the zero vector.
        coefficients: [N, K, C], K = 1, 4, 9 or 16.
        degree: highest degree that is used, 0 to 3; None: that of K.

    Returns:
        The functions' values [N, C].

    Raises:
        ValueError: shapes that do not fit, or a degree outside 0..3 or above that of the coefficients.
    """
    count = coefficients.shape[1] if coefficients.dim() == 3 else 0
    highest = math.isqrt(count) - 1
    if count not in (1, 4, 9, 16) or directions.shape != (len(coefficients), 3):
        shapes = f"{tuple(directions.shape)} and {tuple(coefficients.shape)}"
        raise ValueError(f"directions must be [N, 3] and coefficients [N, 1, 4, 9 or 16, C]; got {shapes}")
    degree = highest if degree is None else degree
    if not 0 <= degree <= highest:
        raise ValueError(f"degree={degree}; it must be from 0 to {highest}, that of the coefficients")
    basis = harmonic_basis(F.normalize(directions, dim=1), degree)
    return (basis[..., None] * coefficients[:, : basis.shape[1]]).sum(1)
