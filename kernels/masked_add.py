"""base_k + m_k * skip + bias + residual_k, the end of a residual block; all branches share one read of the skip."""

from __future__ import annotations

import triton.language as tl
from factorkit.kernels import tiles
from factorkit.kernels.branches import Branches, feature_gradients
from factorkit.kernels.tiles import channels_last, contiguous, empty_features, kernel, launch, load, span
from torch import Tensor


@kernel
def masked_add_kernel(
    base,
    skip,
    masks,
    bias,
    residual,
    out,
    pixels,
    channels,
    blocks_c,
    blocks_p,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    c = span(pid % blocks_c * BLOCK_C, BLOCK_C)
    p = span((pid // blocks_c) % blocks_p * BLOCK_P, BLOCK_P)
    image = (pid // blocks_c // blocks_p).to(tl.int64)
    inside = (p < pixels)[:, None] & (c < channels)[None, :]
    s = load(skip + (image * pixels + p)[:, None] * channels + c[None, :], inside)
    if SHARED:
        common = load(base + (image * pixels + p)[:, None] * channels + c[None, :], inside)
    for k in tl.static_range(K):
        row = image * K + k
        at = (row * pixels + p)[:, None] * channels + c[None, :]
        z = s
        if masks is not None:
            z = s * load(masks + row * pixels + p, p < pixels)[:, None]
        z = z + (common if SHARED else load(base + at, inside))
        if bias is not None:
            z = z + load(bias + c, c < channels)[None, :]
        if residual is not None:
            z = z + load(residual + at, inside)
        tl.store(out + at, z, mask=inside)


def masked_add(
    base: Tensor, skip: Tensor, masks: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """Add base [B*K or B, C, H, W], m_k * skip [B, C, H, W], bias [C] and residual [B*K, C, H, W].

    Returns:
        [B*K, C, H, W] channels last, in the dtype of base.
    """
    x = Branches(base, skip, masks)
    out = empty_features(x.rows, x.channels_u, x.u)
    block_p, block_c = x.tile()
    blocks_p, blocks_c = tiles.ceil_div(x.pixels, block_p), tiles.ceil_div(x.channels_u, block_c)
    sizes = (x.pixels, x.channels_u, blocks_c, blocks_p)
    constants = {"K": x.regions, "SHARED": x.shared, "BLOCK_P": block_p, "BLOCK_C": block_c}
    tensors = (x.u, x.skip, x.masks, contiguous(bias), None if residual is None else channels_last(residual), out)
    launch(masked_add_kernel, x.batch * blocks_p * blocks_c, *tensors, *sizes, **constants, warps=4)
    return out


def masked_add_backward(
    grad: Tensor, base: Tensor | None, skip: Tensor, masks: Tensor
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Compute the gradients of :func:`masked_add` for base, skip and masks (fp32).

    The gradient of base is ``grad`` itself, and both are None here, unless the branches share base.
    """
    grad = channels_last(grad)
    x = Branches(grad if base is None else base, skip, masks)
    return feature_gradients(grad, x, None, None, activate=False, at_skip=0, with_u=x.shared)
