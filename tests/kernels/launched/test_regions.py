"""Shortcut, blend, pyramid and pool against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from kernel_compare import compare, rand, soft_masks

from factorkit import ops
from factorkit.ops import reference

#: batch, regions, channels, more channels, height, width
SIZES = [(2, 3, 5, 7, 5, 7), (2, 1, 3, 2, 1, 1), (1, 7, 9, 4, 4, 3), (1, 2, 72, 40, 5, 9)]
SHARED = pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
SIZE = pytest.mark.parametrize("size", SIZES, ids=str)
HALF = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
pytestmark = pytest.mark.usefixtures("fill_memory_with_nan")


def slices(like):
    """The gradient that a torch.cat with something else sends back."""
    if like.dim() < 4:
        return torch.randn_like(like)
    n, c, h, w = like.shape
    return rand(n, c + 5, h, w, dtype=like.dtype)[:, 2 : 2 + c]


@SIZE
@SHARED
@HALF
@pytest.mark.parametrize("residual", [True, False])
def test_masked_add_matches_reference(size, shared, dtype, residual):
    b, k, c, _, h, w = size
    inputs = {
        "base": rand(b if shared else b * k, c, h, w, dtype=dtype),
        "skip": rand(b, c, h, w, dtype=dtype),
        "masks": soft_masks(b, k, h, w),
        "bias": rand(c) if residual else None,
        "residual": rand(b * k, c, h, w, dtype=dtype) if residual else None,
    }
    compare(torch.ops.factorkit.masked_skip_add, reference.masked_skip_add, inputs)
    compare(torch.ops.factorkit.masked_skip_add, reference.masked_skip_add, inputs, make_grad=slices)


@SHARED
def test_masked_projection_matches_reference(shared):
    b, k, c_u, c_s = 2, 3, 6, 5
    inputs = {"u": rand(b if shared else b * k, c_u, 4, 5), "skip": rand(b, c_s, 4, 5), "masks": soft_masks(b, k, 4, 5)}
    inputs |= {"weight": rand(7, c_u + c_s, 1, 1), "bias": rand(7)}
    compare(
        ops.masked_skip_projection,
        lambda u, s, m, w, b: torch.nn.functional.conv2d(reference.concatenate_masked_skip(u, s, m), w, b),
        inputs,
    )


@SIZE
@HALF
def test_blend_matches_reference(size, dtype):
    b, k, c, _, h, w = size
    inputs = {"logits": torch.randn(b, k, h, w), "branches": rand(b * k, c, h, w, dtype=dtype)}
    compare(ops.region_blend, reference.region_blend, inputs)
    compare(ops.region_blend, reference.region_blend, inputs, make_grad=slices)


def test_blend_of_extreme_logits():
    """No overflow, and a saturated softmax is exactly one."""
    logits = torch.tensor([3e4, 0.0, -3e4]).reshape(1, 3, 1, 1).expand(1, 3, 2, 2)
    branches = rand(3, 2, 2, 2)
    masks, out = ops.region_blend(logits, branches)
    assert torch.equal(masks[:, 0], torch.ones(1, 2, 2)) and torch.equal(out[0], branches[0])


def test_gradient_of_the_branches_keeps_their_layout():
    branches = rand(4, 3, 5, 6).requires_grad_()
    _, out = ops.region_blend(torch.randn(2, 2, 5, 6), branches)
    (grad,) = torch.autograd.grad(out.square().sum(), branches)
    assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("levels", "height", "width"), [(1, 2, 6), (3, 8, 24), (3, 40, 16), (5, 32, 64), (6, 64, 64)])
def test_pyramid_matches_reference(levels, height, width):
    inputs = {"masks": soft_masks(2, 3, height, width)}
    compare(lambda m: ops.mask_pyramid(m, levels)[1:], lambda m: reference.mask_pyramid(m, levels), inputs)


def test_pyramid_of_a_view_with_one_level_unused_has_the_right_gradient():
    masks = soft_masks(1, 4, 8, 8)[:, ::2].requires_grad_()
    (got,) = torch.autograd.grad(ops.mask_pyramid(masks, 2)[2].square().sum(), masks)
    (want,) = torch.autograd.grad(reference.mask_pyramid(masks, 2)[1].square().sum(), masks)
    torch.testing.assert_close(got, want)


@SIZE
@HALF
def test_pool_matches_reference(size, dtype):
    b, k, c, _, h, w = size
    inputs = {"features": rand(b, c, h, w, dtype=dtype), "masks": soft_masks(b, k, h, w)}
    compare(ops.region_pool, reference.region_pool, inputs)
    expanded = lambda like: torch.randn(b, 1, c).expand(b, k, c)  # noqa: E731
    compare(ops.region_pool, reference.region_pool, inputs, make_grad=expanded)


def test_pool_of_an_empty_region_is_small():
    masks = torch.zeros(1, 2, 4, 4)
    masks[:, 0] = 1
    tokens = ops.region_pool(rand(1, 6, 4, 4), masks)
    assert torch.equal(tokens[0, 1], torch.zeros(6)) and tokens[0, 0].abs().max() > 0
