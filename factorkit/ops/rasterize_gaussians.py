"""Rasterisation of projected Gaussians, front to back, with gradients to everything (Kerbl et al. 2023).

At a pixel with offset (dx, dy) from the mean of Gaussian i, alpha_i = min(0.999, opacity_i exp(-(a dx^2 + c dy^2) / 2 -
b dx dy)), and 0 below 1/255. With w_i = alpha_i prod_{j<i} (1 - alpha_j) in the order of depth: colour sum_i w_i
color_i, depth sum_i w_i depth_i, opacity 1 - prod_i (1 - alpha_i). A pixel ends before the Gaussian that would take its
transmittance to 1e-4. csrc/gaussians.h has the gradients.
"""

from __future__ import annotations

import importlib
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from factorkit.ops.composite import MAX_CHANNELS
from factorkit.ops.dispatch import call_extension, check_matches, reference_gradients, register, select
from factorkit.ops.project_gaussians import ProjectedGaussians
from factorkit.utils.memory import require_memory

TILE = 16  # pixels along each side of a tile; as the constants below in csrc/gaussians.h
MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE = 0.999, 1 / 255, 1e-4
MAX_PAIRS = 2**31 - 1  # of Gaussians and tiles
PAIR_GRADIENTS = 7  # numbers beside the colour: kGeometry in csrc/gaussians_cpu.cpp
FEWER_PAIRS = "use fewer or smaller Gaussians, or smaller images"


class Splatting(NamedTuple):
    """The image of Gaussians, before a background: add (1 - opacity) times it to the colour."""

    color: Tensor  #: [H, W, C]
    depth: Tensor  #: [H, W], the expected depth sum w_i depth_i, not divided by the opacity
    opacity: Tensor  #: [H, W], 0 to below 1


def rasterize_by_tiles(
    means: Tensor,
    conics: Tensor,
    depths: Tensor,
    colors: Tensor,
    opacities: Tensor,
    offsets: Tensor,
    ids: Tensor,
    width: int,
    height: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute color [H, W, C], depth and opacity [H, W], tile by tile, in plain PyTorch: the reference."""
    columns, rows = -(-width // TILE), -(-height // TILE)
    padded = means.new_zeros(columns * rows, TILE * TILE, colors.shape[1] + 2)
    tiles = list(padded.unbind(0))
    inside = torch.arange(TILE * TILE, device=means.device)
    corner = torch.stack([inside % TILE, inside // TILE], dim=1).to(means) + 0.5
    bounds = offsets.tolist()
    for tile, (begin, end) in enumerate(pairwise(bounds)):
        if begin == end:
            continue
        own = ids[begin:end].long()
        pixels = corner + corner.new_tensor([tile % columns * TILE, tile // columns * TILE])
        dx, dy = (means[own] - pixels[:, None]).unbind(-1)
        a, b, c = conics[own].unbind(1)
        raw = opacities[own] * (-(0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy)).exp()
        alpha = torch.where(raw > MAX_ALPHA, MAX_ALPHA, raw)
        alpha = torch.where(alpha >= MIN_ALPHA, alpha, 0.0)
        alpha = torch.where((1 - alpha).cumprod(1) > MIN_TRANSMITTANCE, alpha, 0.0)
        passed = (1 - alpha).cumprod(1)
        before = torch.cat([torch.ones_like(passed[:, :1]), passed[:, :-1]], dim=1)
        weights, values = alpha * before, torch.cat([colors[own], depths[own, None]], dim=1)
        tiles[tile] = torch.cat([weights @ values, 1 - passed[:, -1:]], dim=1)
    image = torch.stack(tiles).reshape(rows, columns, TILE, TILE, -1).transpose(1, 2)
    image = image.reshape(rows * TILE, columns * TILE, -1)[:height, :width]
    return image[..., :-2], image[..., -2], image[..., -1]


def sort_into_tiles(
    means: Tensor,
    conics: Tensor,
    depths: Tensor,
    colors: Tensor,
    opacities: Tensor,
    radii: Tensor,
    *,
    width: int,
    height: int,
) -> tuple[Tensor, Tensor]:
    """Return offsets [tiles + 1] and the Gaussians of each tile, front to back, in plain PyTorch."""
    columns, rows = -(-width // TILE), -(-height // TILE)
    a, b, c = conics.unbind(1)
    det = a * c - b * b
    visible = (radii > 0).all(1) & (a > 0) & (c > 0) & (det > 0) & det.isfinite() & (opacities >= MIN_ALPHA)
    visible &= means.isfinite().all(1) & depths.isfinite() & opacities.isfinite()
    visible &= colors.isfinite().all(1)
    reach = 2 * (opacities * 255).log()
    half = torch.stack([reach * c / det, reach * a / det], dim=1).sqrt() + 0.5
    low, high = means - half, means + half
    size = means.new_tensor([width, height])
    visible &= (high > 0).all(1) & (low < size).all(1)
    first = (low.nan_to_num().clamp(size * 0, size).long() // TILE)[visible]
    last = high.nan_to_num().clamp(size * 0, size).long()
    last = ((torch.where(high < size, last + 1, size.long()) + TILE - 1) // TILE)[visible]
    ids = visible.nonzero()[:, 0]
    order = depths[ids].sort(stable=True).indices
    ids, first, sides = ids[order], first[order], (last - first)[order]
    counts = sides.prod(1)
    pairs = _check_pairs(int(counts.sum()), colors)
    row = torch.arange(len(ids), device=ids.device).repeat_interleave(counts, output_size=pairs)
    number = torch.arange(pairs, device=ids.device) - (counts.cumsum(0) - counts)[row]
    tile = (first[row, 1] + number // sides[row, 0]) * columns + first[row, 0] + number % sides[row, 0]
    tile, order = tile.sort(stable=True)
    bounds = torch.arange(columns * rows + 1, device=ids.device)
    return torch.searchsorted(tile, bounds), ids[row[order]].to(torch.int32)


def rasterize_gaussians(
    projected: ProjectedGaussians,
    colors: Tensor,
    opacities: Tensor,
    size: tuple[int, int],
    *,
    backend: str = "factorkit",
) -> Splatting:
    """Rasterise Gaussians by the equations of :mod:`factorkit.ops.rasterize_gaussians`.

    Gradients reach the means, conics and depths of ``projected``, colors and opacities, of second order too: those are
    computed by the slower PyTorch reference. Gaussians of one depth keep their order. On the CPU the result is the same
    to the bit for any number of threads; on CUDA the gradients are summed in no fixed order. Gaussians that are not
    visible, with a number that is not finite, an opacity below 1/255 or a conic that is not positive definite are not
    drawn and have gradients of 0; an image of none is 0.

    Args:
        projected: of N Gaussians, as :func:`project_gaussians` returns them.
        colors: [N, C], 1 to 32 channels of anything.
        opacities: [N]; multiply them by the compensations first if those are wanted.
        size: height and width of the image.
        backend: "factorkit", or "gsplat": the package of that name, on CUDA, in fp32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, channels outside 1..32, an unknown backend, or too many
            pairs of Gaussians and tiles.
        OutOfMemoryError: the pairs need more memory than is free.
        ImportError: backend="gsplat" without the package.
    """
    means, count = projected.means, len(projected.means)
    if colors.dim() != 2 or not 1 <= colors.shape[1] <= MAX_CHANNELS:
        raise ValueError(f"colors must be [{count}, 1 to {MAX_CHANNELS}]; got {tuple(colors.shape)}")
    shapes = {"conics": (count, 3), "depths": (count,), "colors": (count, colors.shape[1]), "opacities": (count,)}
    inputs = (projected.conics, projected.depths, colors, opacities)
    for (name, shape), x in zip(shapes.items(), inputs, strict=True):
        check_matches(name, x, "means", means, torch.Size(shape))
    if projected.radii.dtype != torch.int32 or projected.radii.shape != (count, 2):
        raise ValueError(f"radii must be int32 {(count, 2)}; got {projected.radii.dtype} {projected.radii.shape}")
    if min(size) < 1:
        raise ValueError(f"size={size}; give height and width, at least 1 each")
    if backend == "gsplat":
        if not means.is_cuda or means.dtype != torch.float32:
            raise ValueError(f'backend="gsplat" needs float32 on CUDA; got {means.dtype} on {means.device}')
        return _rasterize_with_gsplat(projected, colors, opacities, size)
    if backend != "factorkit":
        raise ValueError(f"backend={backend!r} is unknown; choose factorkit or gsplat")
    height, width = size
    offsets, ids = _sort(projected, colors, opacities, width, height)
    run = select("rasterize_gaussians", rasterize_by_tiles, means)
    return Splatting(*run(means, *inputs, offsets, ids, width, height)[:3])


def _sort(
    projected: ProjectedGaussians, colors: Tensor, opacities: Tensor, width: int, height: int
) -> tuple[Tensor, Tensor]:
    """Return offsets and Gaussians of the tiles: by a counting sort on the CPU, by torch's sort elsewhere."""
    means, conics, depths, radii, _ = projected
    inputs = [x.detach() for x in (means, conics, depths, colors, opacities, radii)]
    if means.is_cuda or select("count_tiles", sort_into_tiles, means) is sort_into_tiles:
        return sort_into_tiles(*inputs, width=width, height=height)
    order, offsets = torch.ops.factorkit.count_tiles(*inputs, width, height)
    pairs = _check_pairs(int(offsets[-1].item()), colors)
    return offsets, torch.ops.factorkit.fill_tiles(*inputs, order, offsets, pairs, width, height)


def _check_pairs(pairs: int, colors: Tensor) -> int:
    """Return the number of pairs if it fits the index and, with the pairs' gradients, the memory."""
    if pairs > MAX_PAIRS:
        raise ValueError(f"{pairs} pairs of Gaussians and tiles, more than {MAX_PAIRS}: {FEWER_PAIRS}")
    size = 4 + (PAIR_GRADIENTS + colors.shape[1]) * colors.element_size()
    require_memory(pairs * size, colors.device, f"{pairs} pairs of Gaussians and tiles", FEWER_PAIRS)
    return pairs


def _rasterize_with_gsplat(
    projected: ProjectedGaussians, colors: Tensor, opacities: Tensor, size: tuple[int, int]
) -> Splatting:
    gsplat = importlib.import_module("gsplat")
    height, width = size
    columns, rows = -(-width // TILE), -(-height // TILE)
    # gsplat checks no numbers
    finite = colors.isfinite().all(1) & opacities.isfinite() & projected.conics.isfinite().all(1)
    colors, opacities = torch.where(finite[:, None], colors, 0.0), torch.where(finite, opacities, 0.0)
    projected = projected._replace(radii=projected.radii * finite[:, None])
    means, conics, depths, radii, _ = (x[None] for x in projected)
    _, pairs, ids = gsplat.isect_tiles(means, radii, depths, TILE, columns, rows)
    offsets = gsplat.isect_offset_encode(pairs, 1, columns, rows)
    values = torch.cat([colors[None], depths[..., None]], dim=-1)
    image, opacity = gsplat.rasterize_to_pixels(
        means, conics, values, opacities[None], width, height, TILE, offsets, ids
    )
    return Splatting(image[0, ..., :-1], image[0, ..., -1], opacity[0, ..., 0])


# --- implementations ---

SPLATS = "Tensor means, Tensor conics, Tensor depths, Tensor colors, Tensor opacities, Tensor offsets, Tensor ids"


def _sizes(tensors: Any, width: int, height: int) -> list[int]:
    return [len(tensors[0]), tensors[3].shape[1], width, height]


def _contiguous(tensors: Any) -> list[Tensor | None]:
    return [x if x is None else x.contiguous() for x in tensors]


def _tile_problem(tensors: Any, offsets: Tensor | None, width: int, height: int) -> tuple:
    return [*_contiguous(tensors), offsets, None], _sizes(tensors, width, height)


def _count_tiles(*arguments: Any) -> tuple[Tensor, Tensor]:
    *tensors, radii, width, height = arguments
    order, offsets = _count_tiles_fake(*arguments)
    outputs = [radii.contiguous(), order, offsets]
    call_extension("count_tiles", tensors[0], *_tile_problem(tensors, None, width, height), outputs)
    return order, offsets


def _count_tiles_fake(means: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    tiles = -(-rest[-2] // TILE) * -(-rest[-1] // TILE)
    return means.new_empty(len(means), dtype=torch.int32), means.new_empty(tiles + 1, dtype=torch.int64)


def _fill_tiles(*arguments: Any) -> Tensor:
    *tensors, radii, order, offsets, _, width, height = arguments
    ids = _fill_tiles_fake(*arguments)
    outputs = [radii.contiguous(), order.contiguous(), ids]
    call_extension("fill_tiles", tensors[0], *_tile_problem(tensors, offsets.contiguous(), width, height), outputs)
    return ids


def _fill_tiles_fake(means: Tensor, *rest: Any) -> Tensor:
    return means.new_empty(rest[-3], dtype=torch.int32)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, width, height = arguments
    outputs = _fake(*arguments)
    call_extension("rasterize_gaussians", tensors[0], _contiguous(tensors), _sizes(tensors, width, height), outputs)
    return outputs


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    """Allocate color, depth, opacity, transmittance and how many Gaussians each pixel used."""
    means, colors, width, height = arguments[0], arguments[3], *arguments[-2:]
    new = means.new_empty
    image, channels = (height, width), colors.shape[1]
    return new(*image, channels), new(image), new(image), new(image), new(image, dtype=torch.int32)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    upstream, tensors, (width, height) = arguments[:5], arguments[5:12], arguments[12:]
    found = tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in tensors[:5])
    sizes = _sizes(tensors, width, height)
    addresses = [*_contiguous(upstream), *found]
    call_extension("rasterize_gaussians_backward", tensors[0], _contiguous(tensors), sizes, addresses)
    return found


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in arguments[5:10])


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[3], output[4])
    ctx.save_for_backward(*output[3:], *inputs[:7])
    ctx.size = inputs[7:]


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple:
    transmittance, used, *tensors = ctx.saved_tensors
    if all(g is None for g in grads[:3]):
        return (None,) * 9
    if torch.is_grad_enabled():
        return reference_gradients(rasterize_by_tiles, (*tensors, *ctx.size), grads[:3])
    found = torch.ops.factorkit.rasterize_gaussians_backward(*grads[:3], transmittance, used, *tensors, *ctx.size)
    needs = ctx.needs_input_grad[:5]
    return *(g if need else None for g, need in zip(found, needs, strict=True)), *[None] * 4


TILE_INPUTS = SPLATS.split(", Tensor offsets")[0] + ", Tensor radii"
register(
    "count_tiles",
    _count_tiles,
    _count_tiles_fake,
    schema=f"({TILE_INPUTS}, int width, int height) -> (Tensor, Tensor)",
    needs_extension=True,
)
register(
    "fill_tiles",
    _fill_tiles,
    _fill_tiles_fake,
    schema=f"({TILE_INPUTS}, Tensor order, Tensor offsets, int pairs, int width, int height) -> Tensor",
    needs_extension=True,
)
register(
    "rasterize_gaussians",
    _forward,
    _fake,
    schema=f"({SPLATS}, int width, int height) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    autograd=(_setup_context, _autograd),
    needs_extension=True,
)
register(
    "rasterize_gaussians_backward",
    _backward,
    _backward_fake,
    schema="(Tensor? d_color, Tensor? d_depth, Tensor? d_opacity, Tensor transmittance, Tensor used, "
    f"{SPLATS}, int width, int height) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    needs_extension=True,
)
