"""Shared by all kernels: index arithmetic and activations on the device; layouts, block sizes, launches on the host.

Block sizes and warps are plain functions of the shapes, so nothing is tuned at run time unless FACTORKIT_TUNE=1 asks
for it (:mod:`factorkit.kernels.tuning`). A thread's unit is one 128-bit load; a warp should fetch whole cache lines, so
a block of channels is one line wide.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from factorkit.kernels import tuning
from torch import Tensor

CACHE_LINE_BYTES = 128
TARGET_PROGRAMS = 2048  # fills a large GPU (132 multiprocessors) several times
REGISTERS = 65536  # of a multiprocessor, from sm_70 on

# Counts of blocks and the like. Compiling a kernel again for the value 1 or for multiples of 16 would gain nothing.
NOT_SPECIALIZED = [
    *("blocks_c", "blocks_g", "blocks_k", "blocks_p", "blocks_u", "chunk", "chunks", "chunks_mass", "chunks_s"),
    *("chunks_u", "groups", "parts", "regions", "rows", "share_u", "size", "terms", "tiles_x", "tiles_y"),
]

#: Decorator of kernels that are launched; functions that kernels call use plain ``triton.jit``.
kernel = triton.jit(do_not_specialize=NOT_SPECIALIZED)


# --- on the device ---


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu_slope(x):
    """Derivative of x * sigmoid(x)."""
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def load(pointer, inside):
    """Load as fp32, zero outside. The cast comes first because the interpreter computes wrongly on bf16."""
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_biased(x, bias, c, width, inside):
    """Load a tile of channels c < width plus their bias, if any; zero outside."""
    value = load(x, inside)
    if bias is not None:
        value = tl.where(inside, value + load(bias + c, c < width)[None, :], 0.0)
    return value


@triton.jit
def span(start, size: tl.constexpr):
    """Return start ... start+size-1 as 64-bit numbers, so that no product with a stride overflows."""
    return start + tl.arange(0, size).to(tl.int64)


# --- layouts ---


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def pixel_strides(x: Tensor) -> tuple[Tensor, int, int, int]:
    """Return the tensor [N, C, H, W] and its strides from row to row, pixel to pixel and channel to channel.

    Gradients arrive expanded, permuted or as slices of a concatenation, and are read in place. They are copied only
    where a single stride does not reach the next line of pixels.
    """
    _, _, height, width = x.shape
    stride_x, stride_y = x.stride(3), x.stride(2)
    if width == 1:
        stride_x = stride_y
    elif height > 1 and stride_y != width * stride_x:
        return pixel_strides(channels_last(x))
    return x, x.stride(0), stride_x, x.stride(1)


def empty_features(rows: int, channels: int, like: Tensor) -> Tensor:
    """Allocate [rows, channels, H, W], channels last, with the H, W and dtype of ``like``."""
    shape = (rows, channels, *like.shape[2:])
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def scratch(*shape: int, like: Tensor) -> Tensor:
    """Allocate fp32 scratch memory."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


# --- block sizes ---


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def pixel_channel_tile(pixels: int, channels: int, itemsize: int, elements: int = 2048) -> tuple[int, int]:
    """Return pixels and channels of an elementwise tile; 2048 elements are 16 for each thread of 4 warps."""
    block_c = min(power_of_two(channels), CACHE_LINE_BYTES // itemsize)
    return min(power_of_two(pixels), elements // block_c), block_c


def pixels_per_program(pixels: int, block: int, other_programs: int) -> int:
    """Return how many pixels a program sums: all of them, unless the ``other_programs`` leave the GPU empty."""
    wanted = ceil_div(TARGET_PROGRAMS, max(1, other_programs))
    return block * max(ceil_div(pixels, block * wanted), min(4, ceil_div(pixels, block)))


def branches_per_program(regions: int, limit: int = 4) -> int:
    """Return how many branches' sums one program keeps in registers: equal shares of at most ``limit``."""
    return ceil_div(regions, ceil_div(regions, limit))


def whole_pixel_tile(
    pixels: int, channels_u: int, channels_skip: int, elements: int, min_warps: int = 4
) -> tuple[int, int, int, int]:
    """Return pixels, padded channels of both halves and warps, for kernels that hold all channels of a pixel.

    ``elements`` is how many features a warp holds: 256 are 8 for each thread, one load.
    """
    block_u = power_of_two(channels_u)
    block_s = power_of_two(channels_skip) if channels_skip else 1
    width = block_u + (block_s if channels_skip else 0)
    warps = min_warps
    while warps < 16 and elements * warps < width:
        warps *= 2
    block_p = max(1, min(power_of_two(pixels), elements * warps // width))
    return 1 << (block_p.bit_length() - 1), block_u, block_s, warps


def group_tile(groups: int, size: int) -> tuple[int, int]:
    """Return groups, and padded channels of a group, of a tile that finalises statistics."""
    block_d = power_of_two(size)
    return min(power_of_two(groups), max(1, 256 // block_d)), block_d


# --- launches ---


def start(function, grid: tuple[int, ...], arguments: tuple, constants: dict, options: dict) -> None:
    """Launch a kernel. Tests and benchmarks replace this function to record launches."""
    function[grid](*arguments, **constants, **options)


def launch(function, programs: int, *arguments, warps: int, **constants) -> None:
    """Run ``programs`` programs of a kernel on the device of its tensors, on the current stream there."""
    if programs == 0:
        return
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        _launch_on_current_device(function, programs, arguments, constants, warps)


def _launch_on_current_device(function, programs: int, arguments: tuple, constants: dict, warps: int) -> None:
    """Run a kernel on the current device, to which Triton sends every launch, whatever its tensors' device is."""

    def run(warps: int) -> None:
        start(function, (programs,), arguments, constants, compiler_options(warps))

    if tuning.is_enabled():
        warps = tuning.best_warps(tuning.describe_launch(function.__name__, arguments, constants), warps, run)
    run(warps)


def compiler_options(warps: int) -> dict:
    """Return Triton's compiler options.

    Without a register limit the assembler spills one or two registers to fit one more program. Fused multiply-add is
    named because Triton changes its default.
    """
    registers = min(255, REGISTERS // (32 * warps))
    return {"num_warps": warps, "maxnreg": registers, "enable_fp_fusion": True}
