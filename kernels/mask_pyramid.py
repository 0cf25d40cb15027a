"""Area averages of the masks at all levels in one read of them, and the gradient of all levels in one write."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from factorkit.kernels import tiles
from factorkit.kernels.tiles import kernel, launch, load, span
from torch import Tensor

MAX_LEVELS = 5  # per launch: a program averages tiles of 2^MAX_LEVELS pixels a side


@triton.jit
def halve(x, H: tl.constexpr, W: tl.constexpr):
    """Average 2x2 blocks of a tile [H, W]."""
    return tl.sum(tl.sum(tl.reshape(x, [H // 2, 2, W // 2, 2]), 3), 1) * 0.25


@triton.jit
def store_level(out, x, plane, y0, x0, height, width, LEVEL: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    y = span(y0 // (1 << LEVEL), H)
    c = span(x0 // (1 << LEVEL), W)
    rows, columns = height // (1 << LEVEL), width // (1 << LEVEL)
    inside = (y < rows)[:, None] & (c < columns)[None, :]
    tl.store(out + (plane * rows + y)[:, None] * columns + c[None, :], x, mask=inside)


@kernel
def pyramid_kernel(
    masks,
    out1,
    out2,
    out3,
    out4,
    out5,
    height,
    width,
    tiles_y,
    tiles_x,
    LEVELS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
):
    pid = tl.program_id(0)
    x0 = pid % tiles_x * TILE_W
    y0 = (pid // tiles_x) % tiles_y * TILE_H
    plane = (pid // tiles_x // tiles_y).to(tl.int64)
    y, c = span(y0, TILE_H), span(x0, TILE_W)
    x = load(masks + (plane * height + y)[:, None] * width + c[None, :], (y < height)[:, None] & (c < width)[None, :])
    x = halve(x, TILE_H, TILE_W)
    store_level(out1, x, plane, y0, x0, height, width, 1, TILE_H // 2, TILE_W // 2)
    if LEVELS >= 2:
        x = halve(x, TILE_H // 2, TILE_W // 2)
        store_level(out2, x, plane, y0, x0, height, width, 2, TILE_H // 4, TILE_W // 4)
    if LEVELS >= 3:
        x = halve(x, TILE_H // 4, TILE_W // 4)
        store_level(out3, x, plane, y0, x0, height, width, 3, TILE_H // 8, TILE_W // 8)
    if LEVELS >= 4:
        x = halve(x, TILE_H // 8, TILE_W // 8)
        store_level(out4, x, plane, y0, x0, height, width, 4, TILE_H // 16, TILE_W // 16)
    if LEVELS >= 5:
        x = halve(x, TILE_H // 16, TILE_W // 16)
        store_level(out5, x, plane, y0, x0, height, width, 5, TILE_H // 32, TILE_W // 32)


@triton.jit
def level_gradient(grad, plane, y, c, height, width, inside, LEVEL: tl.constexpr):
    rows, columns = height // (1 << LEVEL), width // (1 << LEVEL)
    at = (plane * rows + y // (1 << LEVEL))[:, None] * columns + (c // (1 << LEVEL))[None, :]
    return load(grad + at, inside) * (1.0 / (1 << (2 * LEVEL)))


@kernel
def pyramid_backward_kernel(
    g1,
    g2,
    g3,
    g4,
    g5,
    out,
    height,
    width,
    tiles_y,
    tiles_x,
    LEVELS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
):
    pid = tl.program_id(0)
    c = span(pid % tiles_x * TILE_W, TILE_W)
    y = span((pid // tiles_x) % tiles_y * TILE_H, TILE_H)
    plane = (pid // tiles_x // tiles_y).to(tl.int64)
    inside = (y < height)[:, None] & (c < width)[None, :]
    total = level_gradient(g1, plane, y, c, height, width, inside, 1)
    if LEVELS >= 2:
        total += level_gradient(g2, plane, y, c, height, width, inside, 2)
    if LEVELS >= 3:
        total += level_gradient(g3, plane, y, c, height, width, inside, 3)
    if LEVELS >= 4:
        total += level_gradient(g4, plane, y, c, height, width, inside, 4)
    if LEVELS >= 5:
        total += level_gradient(g5, plane, y, c, height, width, inside, 5)
    tl.store(out + (plane * height + y)[:, None] * width + c[None, :], total, mask=inside)


def _tiles(height: int, width: int, levels: int) -> tuple[int, int, int, int]:
    """Return tile height and width, and how many tiles cover the image in each direction."""
    tile_h = 1 << levels
    tile_w = max(tile_h, min(tiles.power_of_two(width), 1024 // tile_h))
    return tile_h, tile_w, tiles.ceil_div(height, tile_h), tiles.ceil_div(width, tile_w)


def _launch_tiles(function, tensors: tuple[Tensor | None, ...], planes: int, height: int, width: int, levels: int):
    tile_h, tile_w, tiles_y, tiles_x = _tiles(height, width, levels)
    constants = {"LEVELS": levels, "TILE_H": tile_h, "TILE_W": tile_w}
    launch(function, planes * tiles_y * tiles_x, *tensors, height, width, tiles_y, tiles_x, **constants, warps=4)


def pyramid(masks: Tensor, levels: int) -> list[Tensor]:
    """Average masks [B, K, H, W] at 1/2 ... 1/2^levels of the resolution; H and W are divisible by 2^levels.

    There are at most MAX_LEVELS.
    """
    masks = masks.contiguous()
    batch, regions, height, width = masks.shape
    outputs = [masks.new_empty(batch, regions, height >> i, width >> i) for i in range(1, levels + 1)]
    tensors = (masks, *outputs, *(None,) * (MAX_LEVELS - levels))
    _launch_tiles(pyramid_kernel, tensors, batch * regions, height, width, levels)
    return outputs


def pyramid_backward(grads: Sequence[Tensor]) -> Tensor:
    """Compute the gradient of the masks from those of every level, finest first."""
    grads = [g.contiguous() for g in grads]
    batch, regions, half_h, half_w = grads[0].shape
    out = grads[0].new_empty(batch, regions, 2 * half_h, 2 * half_w)
    tensors = (*grads, *(None,) * (MAX_LEVELS - len(grads)), out)
    _launch_tiles(pyramid_backward_kernel, tensors, batch * regions, 2 * half_h, 2 * half_w, len(grads))
    return out
