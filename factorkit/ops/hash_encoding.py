"""The multiresolution hash encoding (csrc/hash_grid.h), with gradients for table, coordinates and level weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from factorkit.ops import reference_encoding as reference
from factorkit.ops.launch import call, plain

INTERPOLATIONS = ("linear", "quintic")
DIMS, FEATURES, MAX_LEVELS = (2, 3, 4), (1, 2, 4, 8), 32  # as in csrc/hash_grid.h and its CUDA kernels


def hash_grid(
    x: Tensor,
    table: Tensor,
    resolutions: Sequence[int],
    level_weights: Tensor | None = None,
    *,
    interpolation: str = "linear",
) -> Tensor:
    """Features of points, interpolated in L lattices over the unit cube and joined: [N, L*F] (Müller et al. 2022).

    A level with (R+1)^D <= T has a row for every vertex; the vertices of a finer one share rows through a hash.
    Outside [0, 1] the nearest face answers, with no gradient for that coordinate.

    Gradients reach x, table and level_weights, of second order too (an eikonal loss, a loss on normals): those
    are computed by the PyTorch reference, slower. On CUDA the table's gradient is summed with atomics, so its last
    digits vary, unless ``torch.use_deterministic_algorithms`` asks for the reference.

    Args:
        x: [N, D], fp32 or fp64, D in 2, 3, 4; the scene is [0, 1]^D. A NaN gives NaN features.
        table: [L, T, F], dtype and device of x; T a power of two, F in 1, 2, 4, 8, L at most 32.
        resolutions: L numbers of cells along an axis, each at least 1 (see :func:`growing_resolutions`).
        level_weights: [L], multiplied onto the levels' features (see :func:`annealing_weights`); a level of weight zero
            costs nothing. None: ones.
        interpolation: "linear", or "quintic" (6t^5 - 15t^4 + 10t^3), whose gradient by x is smooth across cells.

    Raises:
        ValueError: shapes, dtypes, devices, resolutions or an interpolation other than these.
    """
    resolutions = [int(r) for r in resolutions]
    _check(x, table, resolutions, level_weights, interpolation)
    weights = torch.ones(len(resolutions), dtype=x.dtype, device=x.device) if level_weights is None else level_weights
    by_torch = plain(x) or (x.is_cuda and torch.are_deterministic_algorithms_enabled())
    run = reference.hash_grid if by_torch else torch.ops.factorkit.hash_grid
    return run(x, table, weights, resolutions, interpolation == "quintic")


def growing_resolutions(coarsest: int, finest: int, levels: int) -> list[int]:
    """``levels`` resolutions in geometric progression, ``coarsest`` to ``finest`` (Müller et al. 2022, eq. 2, 3)."""
    growth = 0.0 if levels == 1 else math.log(finest / coarsest) / (levels - 1)
    return [round(coarsest * math.exp(growth * level)) for level in range(levels)]


def annealing_weights(levels: int, progress: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights [levels] that let the levels in from coarse to fine while ``progress`` goes from 0 to 1.

    w_k = (1 - cos(pi clamp(progress * levels - k, 0, 1))) / 2 (Park et al. 2021, eq. 8): all 0 at 0, all 1 at 1. For
    the levels of :func:`hash_grid` and the bands of :func:`factorkit.ops.frequency`.
    """
    open_ = (progress * levels - torch.arange(levels, dtype=torch.float64)).clamp(0, 1)
    return ((1 - torch.cos(math.pi * open_)) / 2).to(dtype)


def _check(x: Tensor, table: Tensor, resolutions: list[int], weights: Tensor | None, interpolation: str) -> None:
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation={interpolation!r} is unknown; choose one of {', '.join(INTERPOLATIONS)}")
    if x.dim() != 2 or x.shape[1] not in DIMS:
        raise ValueError(f"x has shape {tuple(x.shape)}; hash_grid takes points [N, D] with D = 2, 3 or 4")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x is {x.dtype}; hash_grid computes in float32 or float64: x.float() makes it one")
    levels = len(resolutions)
    if not 1 <= levels <= MAX_LEVELS or min(resolutions) < 1 or max(resolutions) >= 2**24:
        raise ValueError(f"resolutions={resolutions}; give 1 to {MAX_LEVELS} numbers of cells, each 1 to 2^24 - 1")
    if table.dim() != 3 or table.shape[0] != levels or table.shape[2] not in FEATURES:
        wanted = f"[{levels}, T, F] with F in {FEATURES}"
        raise ValueError(f"table has shape {tuple(table.shape)}; {levels} resolutions ask for {wanted}")
    rows = table.shape[1]
    if rows < 1 or rows & (rows - 1) or rows * table.shape[2] >= 2**31:
        raise ValueError(f"table has {rows} rows a level; give a power of two, rows * features below 2^31")
    if weights is not None and weights.shape != (levels,):
        raise ValueError(f"level_weights has shape {tuple(weights.shape)}; {levels} resolutions ask for [{levels}]")
    for name, other in (("table", table), ("level_weights", weights)):
        if other is not None and (other.dtype, other.device) != (x.dtype, x.device):
            raise ValueError(f"{name} is {other.dtype} on {other.device}, but x is {x.dtype} on {x.device}")


# --- registration --------------------------------------------------------------------------------------


@torch.library.custom_op("factorkit::hash_grid", mutates_args=(), device_types=("cpu", "cuda"))
def _hash_grid(x: Tensor, table: Tensor, weights: Tensor, resolutions: list[int], quintic: bool) -> Tensor:
    tensors = (_laid_out(x), _laid_out(table), _laid_out(weights))
    out = x.new_empty(x.shape[0], table.shape[0] * table.shape[2])
    call("hash_grid_forward", x, tensors, _sizes(x, table), resolutions, quintic, out)
    return out


def _laid_out(x: Tensor) -> Tensor:
    """Contiguous from an address on that CUDA can load 16 bytes from, as a view into other memory may not be."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _sizes(x: Tensor, table: Tensor) -> tuple[int, ...]:
    return x.shape[0], table.shape[1], x.shape[1], table.shape[2]


@_hash_grid.register_fake
def _(x, table, weights, resolutions, quintic):
    return x.new_empty(x.shape[0], table.shape[0] * table.shape[2])


@torch.library.custom_op("factorkit::hash_grid_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _hash_grid_backward(
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    weights: Tensor,
    resolutions: list[int],
    quintic: bool,
    need_x: bool,
    need_table: bool,
) -> tuple[Tensor, Tensor]:
    tensors = (_laid_out(x), _laid_out(table), _laid_out(weights))
    d_x, d_table = _gradients_like(x, table, need_x, need_table)
    if x.is_cuda:
        d_table.zero_()  # the CUDA kernel adds, the CPU's writes
    wanted = (_laid_out(grad), d_x if need_x else None, d_table if need_table else None)
    call("hash_grid_backward", x, tensors, _sizes(x, table), resolutions, quintic, wanted)
    return d_x, d_table


def _gradients_like(x: Tensor, table: Tensor, need_x: bool, need_table: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else 0), table.new_empty(table.shape if need_table else 0)


@_hash_grid_backward.register_fake
def _(grad, x, table, weights, resolutions, quintic, need_x, need_table):
    return _gradients_like(x, table, need_x, need_table)


def _setup(ctx, inputs, output):
    *tensors, ctx.resolutions, ctx.quintic = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, grad):
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


_hash_grid.register_autograd(_autograd, setup_context=_setup)


def _setup_second(ctx, inputs, output):
    *tensors, ctx.resolutions, ctx.quintic, _, _ = inputs
    ctx.save_for_backward(*tensors)


def _second_order(ctx, on_d_x, on_d_table):
    """Gradients of the gradients: the reference's are formed again, to be differentiated."""
    with torch.enable_grad():
        grad, *inputs = leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        out = reference.hash_grid(*inputs, ctx.resolutions, ctx.quintic)  # type: ignore[call-arg]
        formed = torch.autograd.grad(out, inputs[:2], grad, create_graph=True)
    pairs = [(d, g) for d, g in zip(formed, (on_d_x, on_d_table), strict=True) if g is not None and g.shape == d.shape]
    outputs, upstream = [d for d, _ in pairs], [g for _, g in pairs]
    return *torch.autograd.grad(outputs, leaves, upstream, allow_unused=True), None, None, None, None


_hash_grid_backward.register_autograd(_second_order, setup_context=_setup_second)
