"""The norm of :mod:`factorkit.ops.norm` and its gradients in C++ (csrc/norm_cpu.cpp): channels last, fp32 or bf16.

Both functions return None for tensors that the C++ does not take.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from factorkit.ops.dispatch import CPP_DTYPES, EXTENSION, addresses, dense_format, has_extension
from factorkit.ops.norm_pytorch import EPS, MASK_FLOOR, NORMS, shape_of_moments


class _Problem:
    """The tensors of one call, as csrc/norm.h takes them, and their addresses and sizes."""

    def __init__(self, u: Tensor, skip: Tensor | None, masks: Tensor | None, *rest: Any):
        weight, bias, scale, shift, _, groups, norm, activate = rest
        self.u, self.skip = (None if x is None else x.contiguous(memory_format=torch.channels_last) for x in (u, skip))
        self.masks = None if masks is None else masks.float().contiguous()
        self.weight, self.bias = weight.float().contiguous(), bias.float().contiguous()
        self.scale: Tensor | None
        self.shift: Tensor | None
        self.scale, self.shift = _modulation(scale, shift)
        batch, regions = (u.shape[0], 1) if masks is None else masks.shape[:2]
        self.rows, self.channels = batch * regions, weight.shape[0]
        sizes = [
            0 if self.scale is None else self.scale.stride(0),
            batch,
            regions,
            u.shape[1],
            0 if skip is None else skip.shape[1],
            u.shape[2] * u.shape[3],
            groups,
            NORMS.index(norm),
        ]
        flags = [u.shape[0] != self.rows, activate, u.dtype == torch.bfloat16]
        flags.append(self.scale is not None and self.scale.dtype == torch.bfloat16)
        tensors = (self.u, self.skip, self.masks, self.weight, self.bias, self.scale, self.shift)
        self.arguments = (addresses(*tensors), sizes, flags, EPS[norm], MASK_FLOOR)


def _modulation(scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return them in fp32 or bf16, their rows at one distance: halves of one tensor are."""
    if scale is None or shift is None:
        return None, None
    if scale.dtype == shift.dtype in CPP_DTYPES and scale.stride() == shift.stride() and scale.stride(1) == 1:
        return scale, shift
    return scale.float().contiguous(), shift.float().contiguous()


def _takes(u: Tensor, skip: Tensor | None, input_bias: Tensor | None) -> bool:
    if input_bias is not None:  # oneDNN adds it within the convolution
        return False
    one_dtype = u.dtype in CPP_DTYPES and (skip is None or skip.dtype == u.dtype)
    return one_dtype and dense_format(u) == torch.channels_last and u.numel() > 0 and has_extension("cpu")


def forward(u: Tensor, skip: Tensor | None, masks: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor] | None:
    """Return the output and the moments."""
    if not _takes(u, skip, rest[4]):
        return None
    problem = _Problem(u, skip, masks, *rest)
    shape = (problem.rows, problem.channels, *u.shape[2:])
    out = torch.empty(shape, dtype=u.dtype, memory_format=torch.channels_last)
    moments = torch.empty(shape_of_moments(problem.rows, *rest[-3:-1]))
    EXTENSION.norm_silu_forward(*problem.arguments, out.data_ptr(), moments.data_ptr(), torch.get_num_threads())
    return out, moments


def backward(
    grad: Tensor,
    moments: Tensor | None,
    others: tuple[Tensor | None, Tensor | None],
    u: Tensor,
    skip: Tensor | None,
    masks: Tensor | None,
    *rest: Any,
) -> list[Tensor] | None:
    """Return the gradients of those tensors that are not None, in the order of the op's arguments."""
    if not _takes(u, skip, rest[4]):
        return None
    problem = _Problem(u, skip, masks, *rest)
    grad = grad.to(u.dtype).contiguous(memory_format=torch.channels_last)
    found = [None if x is None else torch.empty_like(x) for x in (problem.u, problem.skip, problem.masks)]
    found += [torch.empty_like(problem.weight), torch.empty_like(problem.bias)]
    found += [
        None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (problem.scale, problem.shift)
    ]
    like_u = [None if x is None else x.to(u.dtype).contiguous(memory_format=torch.channels_last) for x in others]
    where = addresses(grad, moments, *like_u, *found)
    EXTENSION.norm_silu_backward(*problem.arguments, where, torch.get_num_threads())
    inputs = (u, skip, masks, *rest[:4])
    return [x.to(like.dtype) for x, like in zip(found, inputs, strict=True) if x is not None and like is not None]
