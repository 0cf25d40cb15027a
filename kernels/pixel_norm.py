"""Pixel norm: root mean square over the channels of [u_k ; m_k * skip] at each pixel, one pass in each direction.

A program holds all channels of some pixels and their statistics in registers; all branches share one read of the skip.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from factorkit.kernels import tiles
from factorkit.kernels.affine import Affine, gradient_sums, modulation
from factorkit.kernels.branches import Branches
from factorkit.kernels.tiles import (
    channels_last,
    contiguous,
    empty_features,
    kernel,
    launch,
    load,
    load_biased,
    pixel_strides,
    scratch,
    sigmoid,
    silu_slope,
    span,
)
from torch import Tensor


@triton.jit
def forward_half(
    z, rstd, weight, bias, scale, shift, out, row, p, c, channels, pixels, inside, column, ACTIVATE: tl.constexpr
):
    gain, offset = modulation(weight, bias, scale, shift, row, c, channels, column)
    y = z * rstd[:, None] * gain[None, :] + offset[None, :]
    if ACTIVATE:
        y = y * sigmoid(y)
    tl.store(out + (row * pixels + p)[:, None] * channels + c[None, :], y, mask=inside)


@kernel
def pixel_forward_kernel(
    u,
    skip,
    masks,
    weight,
    bias,
    scale,
    shift,
    input_bias,
    out,
    pixels,
    channels_u,
    channels_s,
    blocks_p,
    eps,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    ACTIVATE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    pid = tl.program_id(0)
    p = span(pid % blocks_p * BLOCK_P, BLOCK_P)
    image = (pid // blocks_p).to(tl.int64)
    here = p < pixels
    c_u, c_s = span(0, BLOCK_U), span(0, BLOCK_S)
    column_u, column_s = c_u < channels_u, c_s < channels_s
    in_u, in_s = here[:, None] & column_u[None, :], here[:, None] & column_s[None, :]
    channels = channels_u + channels_s
    if skip is not None:
        s = load(skip + (image * pixels + p)[:, None] * channels_s + c_s[None, :], in_s)
        square_s = tl.sum(s * s, 1)
    if SHARED:
        value = load(u + (image * pixels + p)[:, None] * channels_u + c_u[None, :], in_u)
        square_u = tl.sum(value * value, 1)
    for k in tl.static_range(K):
        row = image * K + k
        if not SHARED:
            value = u + (row * pixels + p)[:, None] * channels_u + c_u[None, :]
            value = load_biased(value, input_bias, c_u, channels_u, in_u)
            square_u = tl.sum(value * value, 1)
        square = square_u
        if skip is not None:
            m = tl.full([BLOCK_P], 1.0, tl.float32)
            if masks is not None:
                m = load(masks + row * pixels + p, here)
            square += m * m * square_s
        rstd = 1.0 / tl.sqrt(square / channels + eps)
        forward_half(
            value, rstd, weight, bias, scale, shift, out, row, p, c_u, channels, pixels, in_u, column_u, ACTIVATE
        )
        if skip is not None:
            forward_half(
                s,
                rstd * m,
                weight,
                bias,
                scale,
                shift,
                out,
                row,
                p,
                channels_u + c_s,
                channels,
                pixels,
                in_s,
                column_s,
                ACTIVATE,
            )


def pixel_forward(
    u: Tensor,
    skip: Tensor | None,
    masks: Tensor | None,
    affine: Affine,
    input_bias: Tensor | None,
    activate: bool,
    eps: float,
) -> Tensor:
    """Compute SiLU(rms_norm([u_k ; m_k * skip]) * (1 + scale) + shift), [B*K, C, H, W] channels last.

    Arguments as for :func:`factorkit.kernels.group_norm.norm_forward`.
    """
    x = Branches(u, skip, masks, input_bias)
    affine = tuple(contiguous(v) for v in affine)
    out = empty_features(x.rows, x.channels, x.u)
    block_p, block_u, block_s, warps = tiles.whole_pixel_tile(x.pixels, x.channels_u, x.channels_s, 512)
    blocks_p = tiles.ceil_div(x.pixels, block_p)
    tensors = (x.u, x.skip, x.skip_masks, *affine, x.input_bias, out)
    sizes = (x.pixels, x.channels_u, x.channels_s, blocks_p, eps)
    constants = {"K": x.regions, "SHARED": x.shared, "ACTIVATE": activate}
    blocks = {"BLOCK_P": block_p, "BLOCK_U": block_u, "BLOCK_S": block_s}
    launch(pixel_forward_kernel, x.batch * blocks_p, *tensors, *sizes, **constants, **blocks, warps=warps)
    return out


@triton.jit
def d_normal_half(
    grad,
    normal,
    weight,
    bias,
    scale,
    shift,
    row,
    p,
    c,
    channels,
    stride_n,
    stride_p,
    stride_c,
    inside,
    column,
    ACTIVATE: tl.constexpr,
):
    """Return the normalised values' gradient, and the sums over pixels of d_pre alone and times the values."""
    gain, offset = modulation(weight, bias, scale, shift, row, c, channels, column)
    d = load(grad + row * stride_n + p[:, None] * stride_p + c[None, :] * stride_c, inside)
    if ACTIVATE:
        d = d * silu_slope(normal * gain[None, :] + offset[None, :])
    return d * gain[None, :], tl.sum(d, 0), tl.sum(d * normal, 0)


@kernel
def pixel_backward_kernel(
    grad,
    u,
    skip,
    masks,
    weight,
    bias,
    scale,
    shift,
    input_bias,
    other_u,  # added to d_u: the gradient of u from elsewhere, or None
    other_skip,
    d_u,
    d_skip,
    d_masks,
    partial,
    pixels,
    channels_u,
    channels_s,
    stride_n,
    stride_p,
    stride_c,
    chunk,
    chunks,
    eps,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    ACTIVATE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    pid = tl.program_id(0)
    part = (pid % chunks).to(tl.int64)
    image = (pid // chunks).to(tl.int64)
    c_u, c_s = span(0, BLOCK_U), span(0, BLOCK_S)
    column_u, column_s = c_u < channels_u, c_s < channels_s
    channels = channels_u + channels_s
    # With one branch a program's sums over pixels stay in registers; with more, each block writes its own. An input
    # bias comes without a skip, and so with one branch.
    carry: tl.constexpr = K == 1
    plain_u = tl.zeros([BLOCK_U], tl.float32)
    times_u = tl.zeros([BLOCK_U], tl.float32)
    on_u = tl.zeros([BLOCK_U], tl.float32)
    plain_s = tl.zeros([BLOCK_S], tl.float32)
    times_s = tl.zeros([BLOCK_S], tl.float32)
    for p0 in tl.range(part * chunk, tl.minimum(part * chunk + chunk, pixels), BLOCK_P):
        p = span(p0, BLOCK_P)
        here = p < pixels
        in_u, in_s = here[:, None] & column_u[None, :], here[:, None] & column_s[None, :]
        if skip is not None:
            s = load(skip + (image * pixels + p)[:, None] * channels_s + c_s[None, :], in_s)
            square_s = tl.sum(s * s, 1)
            total_s = tl.zeros([BLOCK_P, BLOCK_S], tl.float32)
            if other_skip is not None:
                total_s = load(other_skip + (image * pixels + p)[:, None] * channels_s + c_s[None, :], in_s)
        if SHARED:
            value = load(u + (image * pixels + p)[:, None] * channels_u + c_u[None, :], in_u)
            square_u = tl.sum(value * value, 1)
            total_u = tl.zeros([BLOCK_P, BLOCK_U], tl.float32)
            if other_u is not None:
                total_u = load(other_u + (image * pixels + p)[:, None] * channels_u + c_u[None, :], in_u)
        for k in range(K):
            row = image * K + k
            if not SHARED:
                value = u + (row * pixels + p)[:, None] * channels_u + c_u[None, :]
                value = load_biased(value, input_bias, c_u, channels_u, in_u)
                square_u = tl.sum(value * value, 1)
            square = square_u
            if skip is not None:
                m = tl.full([BLOCK_P], 1.0, tl.float32)
                if masks is not None:
                    m = load(masks + row * pixels + p, here)
                square += m * m * square_s
            rstd = 1.0 / tl.sqrt(square / channels + eps)

            normal_u = value * rstd[:, None]
            du, pu, tu = d_normal_half(
                grad,
                normal_u,
                weight,
                bias,
                scale,
                shift,
                row,
                p,
                c_u,
                channels,
                stride_n,
                stride_p,
                stride_c,
                in_u,
                column_u,
                ACTIVATE,
            )
            along = tl.sum(du * normal_u, 1)
            if skip is not None:
                normal_s = s * (rstd * m)[:, None]
                ds, ps, ts = d_normal_half(
                    grad,
                    normal_s,
                    weight,
                    bias,
                    scale,
                    shift,
                    row,
                    p,
                    channels_u + c_s,
                    channels,
                    stride_n,
                    stride_p,
                    stride_c,
                    in_s,
                    column_s,
                    ACTIVATE,
                )
                along += tl.sum(ds * normal_s, 1)
            along = along / channels
            dz = rstd[:, None] * (du - normal_u * along[:, None])
            if SHARED:
                total_u += dz
            else:
                to_u = dz
                if other_u is not None:
                    to_u = dz + load(other_u + (row * pixels + p)[:, None] * channels_u + c_u[None, :], in_u)
                tl.store(d_u + (row * pixels + p)[:, None] * channels_u + c_u[None, :], to_u, mask=in_u)
            if skip is not None:
                dz = rstd[:, None] * (ds - normal_s * along[:, None])
                total_s += dz * m[:, None]
                if masks is not None:
                    tl.store(d_masks + row * pixels + p, tl.sum(dz * s, 1), mask=here)
            if carry:
                plain_u += pu
                times_u += tu
                if input_bias is not None:
                    on_u += tl.sum(dz, 0)
                if skip is not None:
                    plain_s += ps
                    times_s += ts
            else:
                at = partial + (row * chunks + part) * 2 * channels
                tl.store(at + c_u, pu, mask=column_u)
                tl.store(at + channels + c_u, tu, mask=column_u)
                if skip is not None:
                    tl.store(at + channels_u + c_s, ps, mask=column_s)
                    tl.store(at + channels + channels_u + c_s, ts, mask=column_s)
        if SHARED:
            tl.store(d_u + (image * pixels + p)[:, None] * channels_u + c_u[None, :], total_u, mask=in_u)
        if skip is not None:
            tl.store(d_skip + (image * pixels + p)[:, None] * channels_s + c_s[None, :], total_s, mask=in_s)
    if carry:
        at = partial + (image * chunks + part) * (2 if input_bias is None else 3) * channels
        tl.store(at + c_u, plain_u, mask=column_u)
        tl.store(at + channels + c_u, times_u, mask=column_u)
        if input_bias is not None:
            tl.store(at + 2 * channels + c_u, on_u, mask=column_u)
        if skip is not None:
            tl.store(at + channels_u + c_s, plain_s, mask=column_s)
            tl.store(at + channels + channels_u + c_s, times_s, mask=column_s)


def pixel_backward(
    grad: Tensor,
    u: Tensor,
    skip: Tensor | None,
    masks: Tensor | None,
    affine: Affine,
    input_bias: Tensor | None,
    activate: bool,
    eps: float,
    others: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of :func:`pixel_forward`, as :func:`factorkit.kernels.group_norm.norm_backward` does."""
    x = Branches(u, skip, masks, input_bias)
    affine = tuple(contiguous(v) for v in affine)
    grad, *strides = pixel_strides(grad)
    d_u = torch.empty_like(x.u)
    d_skip = None if skip is None else torch.empty_like(x.skip)
    d_masks = None if x.skip_masks is None else torch.empty_like(x.skip_masks)
    # Blocks are larger where each of them writes sums.
    elements, min_warps = (256, 4) if x.regions == 1 else (512, 8)
    block_p, block_u, block_s, warps = tiles.whole_pixel_tile(x.pixels, x.channels_u, x.channels_s, elements, min_warps)
    chunk = tiles.pixels_per_program(x.pixels, block_p, x.batch) if x.regions == 1 else block_p
    chunks = tiles.ceil_div(x.pixels, chunk)
    partial = scratch(x.rows, chunks, 2 if input_bias is None else 3, x.channels, like=u)
    others = tuple(None if x is None else channels_last(x) for x in others)
    tensors = (grad, x.u, x.skip, x.skip_masks, *affine, x.input_bias, *others, d_u, d_skip, d_masks, partial)
    sizes = (x.pixels, x.channels_u, x.channels_s, *strides, chunk, chunks, eps)
    constants = {"K": x.regions, "SHARED": x.shared, "ACTIVATE": activate}
    blocks = {"BLOCK_P": block_p, "BLOCK_U": block_u, "BLOCK_S": block_s}
    launch(pixel_backward_kernel, x.batch * chunks, *tensors, *sizes, **constants, **blocks, warps=warps)
    sums = gradient_sums(partial, x.pixels, affine, input_bias, 1, eps, None)
    return d_u, d_skip, d_masks, *sums.affine
