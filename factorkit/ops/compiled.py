"""The compiled CPU norm (csrc/norm_cpu.cpp) behind the ops: channels_last, fp32 or bf16.

Each function answers None where the compiled code does not apply (another dtype or layout, the module not built), and
the op goes on with its PyTorch implementation.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch
from torch import Tensor

from factorkit.ops.constants import GROUP_EPS, MASK_FLOOR, MASKED_GROUP_EPS, PIXEL_EPS
from factorkit.ops.dispatch import dense_format

#: the order of NormKind in csrc/norm.h, and the floor under each variance
KINDS = {"group": (0, GROUP_EPS), "masked_group": (1, MASKED_GROUP_EPS), "pixel": (2, PIXEL_EPS)}


@lru_cache
def extension():
    """factorkit._C, or None with one warning that says what it costs and how to get it."""
    try:
        from factorkit import _C
    except ImportError as error:
        warnings.warn(
            f"factorkit._C cannot be imported ({error}): ops on the CPU run several times slower. Install the package "
            "with `pip install -e .`; `factorkit doctor` tells more",
            stacklevel=2,
        )
        return None
    return _C


def _applies(u: Tensor, skip: Tensor | None) -> bool:
    alike = skip is None or skip.dtype == u.dtype
    return (
        u.dtype in (torch.float32, torch.bfloat16)
        and alike
        and dense_format(u) == torch.channels_last
        and u.numel() > 0
        and extension() is not None
    )


def last(x: Tensor) -> Tensor:
    """The same tensor with its channels last in memory."""
    return x.contiguous(memory_format=torch.channels_last)


class _Problem:
    """The tensors of one call, densely laid out, and the plain numbers of csrc/norm.h made of them."""

    def __init__(self, u, skip, masks, weight, bias, scale, shift, groups, norm, activate):
        plain = lambda x: None if x is None else x.float().contiguous()  # noqa: E731
        self.u, self.skip = last(u), None if skip is None else last(skip)
        self.rest = [plain(x) for x in (masks, weight, bias, scale, shift)]
        self.rows = u.shape[0] if masks is None else masks.shape[0] * masks.shape[1]
        regions = 1 if masks is None else masks.shape[1]
        self.channels = weight.shape[0]
        kind, eps = KINDS[norm]
        channels_skip = 0 if skip is None else skip.shape[1]
        pixels = u.shape[2] * u.shape[3]
        sizes = [self.rows // regions, regions, u.shape[1], channels_skip, pixels, groups, kind]
        flags = [u.shape[0] != self.rows, activate, u.dtype == torch.bfloat16]
        self.numbers = ([address(x) for x in (self.u, self.skip, *self.rest)], sizes, flags, eps, MASK_FLOOR)


def address(x: Tensor | None) -> int:
    """Where a tensor's numbers lie; 0 for none."""
    return 0 if x is None else x.data_ptr()


def norm_forward(u, skip, masks, weight, bias, scale, shift, groups, norm, activate) -> Tensor | None:
    """SiLU(norm([u_k ; m_k * skip]) * (1 + scale) + shift), or None where it does not apply."""
    if not _applies(u, skip):
        return None
    problem = _Problem(u, skip, masks, weight, bias, scale, shift, groups, norm, activate)
    shape = (problem.rows, problem.channels, *u.shape[2:])
    out = torch.empty(shape, dtype=u.dtype, memory_format=torch.channels_last)
    extension().norm_silu_forward(*problem.numbers, out.data_ptr(), torch.get_num_threads())
    return out


def norm_backward(grad, u, skip, masks, weight, bias, scale, shift, groups, norm, activate) -> tuple | None:
    """Gradients for u, skip, masks, weight, bias, scale and shift (None for what was not given), or None altogether."""
    if not _applies(u, skip):
        return None
    problem = _Problem(u, skip, masks, weight, bias, scale, shift, groups, norm, activate)
    grad = last(grad.to(u.dtype))
    d_u, d_skip = torch.empty_like(problem.u), None if skip is None else torch.empty_like(problem.skip)
    d_masks = None if masks is None else torch.empty_like(problem.rest[0])
    summed, moment = torch.empty(2, problem.rows, problem.channels).unbind(0)
    gradients = [address(x) for x in (grad, d_u, d_skip, d_masks, summed, moment)]
    extension().norm_silu_backward(*problem.numbers, gradients, torch.get_num_threads())
    d_weight, d_bias, d_scale, d_shift = affine_gradients(summed, moment, weight, bias, scale, shift)
    return d_u, d_skip, None if masks is None else d_masks.to(masks.dtype), d_weight, d_bias, d_scale, d_shift


def affine_gradients(summed, moment, weight, bias, scale, shift) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients for weight, bias, scale and shift from the pixel sums [N, C] of the pre-activation's gradient, alone
    (``summed``) and times the normalised value (``moment``)."""
    modulation = 1.0 if scale is None else 1 + scale
    d_weight = (moment * modulation).sum(0).to(weight.dtype)
    d_bias = (summed * modulation).sum(0).to(bias.dtype)
    if scale is None:
        return d_weight, d_bias, None, None
    return d_weight, d_bias, (moment * weight + summed * bias).to(scale.dtype), summed.to(shift.dtype)
