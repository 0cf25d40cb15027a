"""Frequency (or positional) encoding of coordinates, whose gradient is computed from its own output."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from factorkit.ops.dispatch import register, select


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


def _forward(x: Tensor, bands: int, annealing: Tensor | None) -> Tensor:
    waves = x.new_empty(*x.shape, 2, bands)
    angles = x[:, :, None] * _octaves(x, bands)
    torch.sin(angles, out=waves[:, :, 0])
    torch.cos(angles, out=waves[:, :, 1])
    if annealing is not None:
        waves *= annealing
    return waves.flatten(1)


def _fake(x: Tensor, bands: int, annealing: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] * 2 * bands)


def _octaves(x: Tensor, bands: int) -> Tensor:
    return math.pi * 2.0 ** torch.arange(bands, dtype=x.dtype, device=x.device)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, ctx.bands, _ = inputs
    ctx.save_for_backward(x, output)


def _autograd(ctx: Any, grad: Tensor) -> tuple:
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


register("frequency", _forward, _fake, autograd=(_setup_context, _autograd))
