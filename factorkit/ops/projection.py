"""The 1x1 shortcut of the decoder's blocks, W [u_k ; m_k * skip] + b of every branch k.

The mask commutes with the convolution: W_u u_k + m_k * (W_s skip) + b. The second product is computed once for all
branches. On a CPU, C++ computes the whole in one pass where products are few, and so does its backward pass: most of
the time of such small convolutions is fixed costs. Elsewhere they precede :mod:`factorkit.ops.skip`.
Shapes are those of that module.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from factorkit.ops.dispatch import (
    CPP_DTYPES,
    CPP_MIN_CHANNELS,
    EXTENSION,
    addresses,
    dense_format,
    has_extension,
    reference_gradients,
    register,
    select,
    use_reference,
    with_layout_of,
)
from factorkit.ops.skip import add_masked_skip, count_branches, masked_skip_gradients

# Products of a forward pass from which oneDNN is faster: its fixed costs are small then, and AMX multiplies faster.
MAX_PRODUCTS_CPP = {torch.bfloat16: 1 << 24, torch.float32: 1 << 25}


def masked_skip_projection(
    u: Tensor, skip: Tensor, masks: Tensor | None, weight: Tensor, bias: Tensor, residual: Tensor | None = None
) -> Tensor:
    """Compute the 1x1 shortcut W [u_k ; m_k * skip] + b = (W_u u_k + b) + m_k * (W_s skip) of every branch.

    A residual is added in the same pass, and so is the bias then where convolutions do not add theirs.

    Args:
        u: [B*K, C_u, H, W], or [B, C_u, H, W] shared by the branches.
        skip: [B, C_s, H, W].
        masks: [B, K, H, W], or None for the shortcut of [u ; skip].
        weight: [C_out, C_u + C_s, 1, 1].
        bias: [C_out].
        residual: [B*K, C_out, H, W], the other branch of the residual block, or None.

    Returns:
        [B*K, C_out, H, W].

    Raises:
        ValueError: u has neither B nor B*K rows.
    """
    count_branches(u, masks)
    if _is_one_op(u, skip, weight) and _cpp_takes(u, skip, masks, weight, bias, residual):
        project = select("masked_skip_projection", project_masked_skip, u)
        return project(u, skip, masks, weight, bias, residual)
    return project_masked_skip(u, skip, masks, weight, bias, residual, select("masked_skip_add", add_masked_skip, u))


def project_masked_skip(
    u: Tensor,
    skip: Tensor,
    masks: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    add: Any = add_masked_skip,
) -> Tensor:
    """Compute the shortcut by two convolutions and ``add``: plain differentiable PyTorch with that of the reference."""
    weight_u, weight_skip = weight.split([u.shape[1], skip.shape[1]], dim=1)
    own_bias = bias if residual is not None and bias_is_separate(u) else None
    base = F.conv2d(u, weight_u, bias if own_bias is None else None)
    return add(base, F.conv2d(skip, weight_skip), masks, own_bias, residual)


def bias_is_separate(x: Tensor) -> bool:
    """Return whether a convolution of x adds its bias in a pass of its own, as cuDNN does and oneDNN does not."""
    return x.device.type != "cpu"


def _is_one_op(u: Tensor, skip: Tensor, weight: Tensor) -> bool:
    """Return whether C++ is faster than oneDNN's convolutions, which would compute in the dtype of u."""
    if bias_is_separate(u) or weight.shape[0] * (u.numel() + skip.numel()) >= MAX_PRODUCTS_CPP.get(u.dtype, 0):
        return False
    if use_reference() or torch._C._are_functorch_transforms_active():
        return False
    return u.dtype == (torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype)


# --- the op: PyTorch, and C++ (csrc/projection_cpu.cpp) for channels_last in fp32 or bf16 ---


def _project(
    u: Tensor, skip: Tensor, masks: Tensor | None, weight: Tensor, bias: Tensor, residual: Tensor | None
) -> Tensor:
    out = project_masked_skip(u, skip, masks, weight.to(u.dtype), bias.to(u.dtype), residual)
    return with_layout_of(out, u)


def _project_fake(u: Tensor, skip: Tensor, masks: Tensor | None, weight: Tensor, *rest: Tensor | None) -> Tensor:
    return with_layout_of(u.new_empty(count_branches(u, masks), weight.shape[0], *u.shape[2:]), u)


def _project_backward(
    grad: Tensor, u: Tensor, skip: Tensor, masks: Tensor | None, weight: Tensor, bias: Tensor
) -> list[Tensor]:
    """Return the gradients of those inputs that are not None, in their order."""
    weight_u, weight_skip = weight.to(u.dtype).split([u.shape[1], skip.shape[1]], dim=1)
    shared = masks is not None and u.shape[0] != grad.shape[0]
    on_u = grad.unflatten(0, (u.shape[0], -1)).sum(1) if shared else grad
    on_skip, *d_masks = masked_skip_gradients(grad, F.conv2d(skip, weight_skip), masks)
    d_u, d_skip = F.conv2d(on_u, weight_u.transpose(0, 1)), F.conv2d(on_skip, weight_skip.transpose(0, 1))
    pairs = ((on_u, u), (on_skip, skip))
    d_weight = torch.cat([torch.einsum("nohw,nihw->oi", g, x) for g, x in pairs], 1)[..., None, None]
    gradients = (d_u, d_skip, *d_masks, d_weight, grad.sum((0, 2, 3)))
    inputs = [x for x in (u, skip, masks, weight, bias) if x is not None]
    return [torch.empty_like(x).copy_(g) for g, x in zip(gradients, inputs, strict=True)]


def _project_backward_fake(grad: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(x) for x in inputs if x is not None]


def _project_cpp(
    u: Tensor, skip: Tensor, masks: Tensor | None, weight: Tensor, bias: Tensor, residual: Tensor | None
) -> Tensor | None:
    if not _cpp_takes(u, skip, masks, weight, bias, residual):
        return None
    rows = u.shape[0] if masks is None else masks.shape[0] * masks.shape[1]
    shape = (rows, weight.shape[0], *u.shape[2:])
    out = torch.empty(shape, dtype=u.dtype, memory_format=torch.channels_last)
    residual = None if residual is None else with_layout_of(residual, out)
    tensors, problem = _cpp_problem(u, skip, masks, weight, bias)
    where = addresses(*tensors, residual)
    EXTENSION.masked_skip_projection_forward(where, *problem, out.data_ptr(), torch.get_num_threads())
    return out


def _project_backward_cpp(
    grad: Tensor, u: Tensor, skip: Tensor, masks: Tensor | None, weight: Tensor, bias: Tensor
) -> list[Tensor] | None:
    if not _cpp_takes(u, skip, masks, weight, bias, grad):
        return None
    tensors, problem = _cpp_problem(u, skip, masks, weight, bias)
    grad = grad.contiguous(memory_format=torch.channels_last)
    gradients = [None if x is None else torch.empty_like(x) for x in tensors]
    where = addresses(*tensors, None), *problem, addresses(grad, *gradients)
    EXTENSION.masked_skip_projection_backward(*where, torch.get_num_threads())
    inputs = (u, skip, masks, weight, bias)
    pairs = zip(gradients, inputs, strict=True)
    return [_with_strides_of(x, g.to(x.dtype)) for g, x in pairs if g is not None and x is not None]


def _with_strides_of(x: Tensor, gradient: Tensor) -> Tensor:
    """Return a gradient with the shape and strides of x: contiguous ones differ in dimensions of one element."""
    if gradient.stride() == x.stride():
        return gradient
    return (
        gradient.as_strided(x.shape, x.stride())
        if x.is_contiguous()
        else torch.empty_like(x).copy_(gradient.view_as(x))
    )


def _cpp_takes(
    u: Tensor, skip: Tensor, masks: Tensor | None, weight: Tensor, bias: Tensor, residual: Tensor | None
) -> bool:
    if u.dtype not in CPP_DTYPES or skip.dtype != u.dtype or u.numel() == 0:
        return False
    if min(u.shape[1], skip.shape[1], weight.shape[0]) < CPP_MIN_CHANNELS:
        return False
    rows = u.shape[0]
    if masks is not None:
        rows = masks.shape[0] * masks.shape[1]
        if masks.dtype != torch.float32 or masks.shape[2:] != u.shape[2:] or u.shape[0] not in (masks.shape[0], rows):
            return False
    if skip.shape[0] != (rows if masks is None else masks.shape[0]) or skip.shape[2:] != u.shape[2:]:
        return False
    if weight.shape[1:] != (u.shape[1] + skip.shape[1], 1, 1) or bias.shape != weight.shape[:1]:
        return False
    if residual is not None and (residual.dtype != u.dtype or residual.shape != (rows, len(weight), *u.shape[2:])):
        return False
    return dense_format(u) == dense_format(skip) == torch.channels_last and has_extension("cpu")


def _cpp_problem(
    u: Tensor, skip: Tensor, masks: Tensor | None, weight: Tensor, bias: Tensor
) -> tuple[list[Tensor | None], tuple]:
    """Return the inputs as csrc/projection.h takes them, and its sizes and flags."""
    masks = None if masks is None else masks.contiguous()
    tensors = [u, skip, masks, weight.flatten(1).float().contiguous(), bias.float().contiguous()]
    batch, regions = (u.shape[0], 1) if masks is None else masks.shape[:2]
    sizes = [batch, regions, u.shape[1], skip.shape[1], weight.shape[0], u.shape[2] * u.shape[3]]
    return tensors, (sizes, [u.shape[0] != batch * regions, u.dtype == torch.bfloat16])


# gradient and registration


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *saved, residual = inputs
    ctx.save_for_backward(*saved)
    ctx.residual_dtype = None if residual is None else residual.dtype


def _autograd(ctx: Any, grad: Tensor) -> tuple:
    inputs = ctx.saved_tensors
    d_residual = None if ctx.residual_dtype is None else grad.to(ctx.residual_dtype)
    if torch.is_grad_enabled():
        return *reference_gradients(lambda *x: _project(*(*x, None)), inputs, (grad,)), d_residual
    gradients = iter(torch.ops.factorkit.masked_skip_projection_backward(grad, *inputs))
    return *(None if x is None else next(gradients) for x in inputs), d_residual


register("masked_skip_projection", _project, _project_fake, cpp=_project_cpp, autograd=(_setup_context, _autograd))
register("masked_skip_projection_backward", _project_backward, _project_backward_fake, cpp=_project_backward_cpp)
