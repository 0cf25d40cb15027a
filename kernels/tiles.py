"""What all kernels share: index arithmetic and activations on the device, shapes and launches on the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from factorkit.kernels import tuning
from torch import Tensor

# Numbers of blocks and the like: a kernel made anew for 1 or for a multiple of 16 would gain nothing.
COUNTS = [
    "blocks_c",
    "blocks_g",
    "blocks_k",
    "blocks_p",
    "blocks_u",
    "chunk",
    "chunks",
    "chunks_mass",
    "chunks_s",
    "chunks_u",
    "groups",
    "parts",
    "regions",
    "rows",
    "share_u",
    "size",
    "terms",
    "tiles_x",
    "tiles_y",
]

REGISTERS = 65536  # of a multiprocessor, from sm_70 on

#: decorates what is launched; ``triton.jit`` alone what those call
kernel = triton.jit(do_not_specialize=COUNTS)


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
    """Numbers as fp32, zero outside. Cast at once: the interpreter computes wrongly on bf16."""
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def span(start, size: tl.constexpr):
    """start ... start+size-1 as 64-bit numbers, so that no product of it with a stride overflows."""
    return start + tl.arange(0, size).to(tl.int64)


def last(x: Tensor) -> Tensor:
    """The same tensor with its channels last in memory."""
    return x.contiguous(memory_format=torch.channels_last)


def pixel_strides(x: Tensor) -> tuple[Tensor, int, int, int]:
    """The tensor [N, C, H, W] and its strides from row to row, pixel to pixel and channel to channel.

    Gradients come expanded, permuted or as a slice of a concatenation, and are read where they lie. Only where a single
    stride cannot reach the next line of pixels they are copied.
    """
    _, _, height, width = x.shape
    along, down = x.stride(3), x.stride(2)
    if width == 1:
        along = down
    elif height > 1 and down != width * along:
        return pixel_strides(last(x))
    return x, x.stride(0), along, x.stride(1)


def empty(rows: int, channels: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Features [rows, channels, H, W] of the size of ``like``, channels last."""
    shape = (rows, channels, *like.shape[2:])
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def buffer(*shape: int, like: Tensor) -> Tensor:
    """fp32 scratch."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def start(function, grid: tuple[int, ...], arguments: tuple, constants: dict, options: dict) -> None:
    function[grid](*arguments, **constants, **options)


def launch(function, programs: int, *arguments, warps: int, **constants) -> None:
    """Run ``programs`` programs of a kernel on the device of its tensors, which must be the current one."""
    if programs == 0:
        return

    def run(warps: int) -> None:
        start(function, (programs,), arguments, constants, options(warps))

    if tuning.wanted():
        warps = tuning.best_warps(tuning.describe(function.__name__, arguments, constants), warps, run)
    run(warps)


def options(warps: int) -> dict:
    """For Triton's compiler. The assembler, not told how many registers a thread may use, spills one or two to fit
    one more program; fused multiply-add is asked for by name because Triton changes its default."""
    registers = min(255, REGISTERS // (32 * warps))
    return {"num_warps": warps, "maxnreg": registers, "enable_fp_fusion": True}
