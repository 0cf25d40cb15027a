"""Block sizes and warps, as plain functions of the shapes: no tuning at run time, nothing to wait for.

A thread's unit is one 128-bit load; a warp should fetch whole 128-byte lines, so a block of channels is one line wide.
"""

from __future__ import annotations

LINE = 128  # bytes of a cache line
PROGRAMS = 2048  # enough to fill a large GPU (132 multiprocessors) several times over


def power_of_two(n: int) -> int:
    """The least power of two not under n."""
    return 1 << max(0, n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def tile(pixels: int, channels: int, itemsize: int, elements: int = 2048) -> tuple[int, int]:
    """Pixels and channels of an elementwise tile; 2048 numbers are 16 for each thread of 4 warps."""
    block_c = min(power_of_two(channels), LINE // itemsize)
    return min(power_of_two(pixels), elements // block_c), block_c


def chunk_of(pixels: int, block: int, others: int) -> int:
    """How many pixels a program sums: all of them, unless ``others`` (programs beside it) leave the GPU empty."""
    wanted = ceil_div(PROGRAMS, max(1, others))
    return block * max(ceil_div(pixels, block * wanted), min(4, ceil_div(pixels, block)))


def branch_block(regions: int, most: int = 4) -> int:
    """Branches whose sums one program keeps in registers: equal shares of at most ``most``."""
    return ceil_div(regions, ceil_div(regions, most))


def whole_pixel(
    pixels: int, channels_u: int, channels_skip: int, elements: int, least_warps: int = 4
) -> tuple[int, int, int, int]:
    """Block of pixels, padded channels of both halves and warps, for kernels that hold all channels of a pixel.

    ``elements`` is how many numbers of the features a warp holds: 256 are 8 for each thread, one load.
    """
    block_u = power_of_two(channels_u)
    block_s = power_of_two(channels_skip) if channels_skip else 1
    width = block_u + (block_s if channels_skip else 0)
    warps = least_warps
    while warps < 16 and elements * warps < width:
        warps *= 2
    block_p = max(1, min(power_of_two(pixels), elements * warps // width))
    return 1 << (block_p.bit_length() - 1), block_u, block_s, warps


def group_tile(groups: int, size: int) -> tuple[int, int]:
    """Groups and padded channels a group of a finalising tile."""
    block_d = power_of_two(size)
    return min(power_of_two(groups), max(1, 256 // block_d)), block_d
