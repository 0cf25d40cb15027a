"""The norms, with and without a masked skip, against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from kernel_compare import compare, rand, soft_masks

from benchmarks.two_pass_norm import two_pass_group_norm_silu
from factorkit import ops
from factorkit.ops import reference
from factorkit.ops.norm_pytorch import EPS

NORMS = ("group", "masked_group", "pixel")
#: batch, regions, channels of u and of the skip, height, width, groups (which straddle the two)
SHAPES = {
    "odd": (2, 3, 5, 7, 5, 7, 3),
    "one pixel": (2, 2, 6, 3, 1, 1, 3),
    "one branch": (2, 1, 3, 5, 4, 3, 1),
    "seven branches": (1, 7, 6, 2, 3, 5, 2),
    "blocks": (1, 2, 72, 40, 9, 8, 7),
}


def skip_inputs(batch, regions, c_u, c_s, height, width, *, shared, masked=True, dtype=torch.float32, modulated=True):
    rows = batch * regions if masked else batch
    c = c_u + c_s
    inputs = {
        "u": rand(batch if shared else rows, c_u, height, width, dtype=dtype) + 1,
        "skip": rand(batch, c_s, height, width, dtype=dtype),
        "masks": soft_masks(batch, regions, height, width) if masked else None,
        "weight": rand(c),
        "bias": rand(c),
    }
    return inputs | {name: rand(rows, c, dtype=dtype) if modulated else None for name in ("scale", "shift")}


def check_skip(inputs, groups, norm, **more):
    compare(
        lambda *x: ops.masked_skip_norm_silu(*x, groups=groups, norm=norm),
        lambda *x: reference.norm_silu(*x, None, groups, norm),
        inputs,
        size=1.0,  # where one pixel is the whole image, gradients cancel to nothing
        **more,
    )


@pytest.mark.usefixtures("fill_memory_with_nan")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_masked_skip_norm_matches_reference(norm, shape, shared):
    *sizes, groups = SHAPES[shape]
    check_skip(skip_inputs(*sizes, shared=shared), groups, norm)


@pytest.mark.usefixtures("fill_memory_with_nan")
@pytest.mark.parametrize("shape", ["odd", "one branch", "blocks"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_gradients_of_other_uses_are_added(norm, shape, shared):
    *sizes, groups = SHAPES[shape]
    compare(
        lambda *x: ops.norm_silu_with_inputs(*x, groups=groups, norm=norm),
        lambda *x: (reference.norm_silu(*x, None, groups, norm), *x[:2]),
        skip_inputs(*sizes, shared=shared),
        size=1.0,
    )


@pytest.mark.usefixtures("fill_memory_with_nan")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_features_match_reference(norm, dtype):
    check_skip(skip_inputs(2, 3, 5, 7, 4, 5, shared=False, dtype=dtype, modulated=False), 3, norm)
    check_skip(skip_inputs(1, 2, 24, 8, 3, 5, shared=True, dtype=dtype), 4, norm)


@pytest.mark.parametrize("norm", NORMS)
def test_u_and_skip_of_different_dtypes_match_reference(norm):
    inputs = skip_inputs(1, 2, 6, 4, 3, 5, shared=False)
    check_skip(inputs | {"u": inputs["u"].bfloat16()}, 2, norm)
    check_skip(inputs | {"skip": inputs["skip"].bfloat16()}, 2, norm)


@pytest.mark.parametrize("norm", ["group", "pixel"])
def test_skip_without_masks_matches_reference(norm):
    """No masks: the norm of [u ; skip]."""
    check_skip(skip_inputs(2, 1, 5, 7, 5, 3, shared=False, masked=False), 3, norm)


@pytest.mark.usefixtures("fill_memory_with_nan")
@pytest.mark.parametrize("size", [(6, 6, 5, 7, 3), (6, 12, 1, 1, 3), (2, 130, 3, 11, 13)], ids=str)
@pytest.mark.parametrize("input_bias", [True, False], ids=["input bias", "plain"])
@pytest.mark.parametrize("activate", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_norm_without_a_skip_matches_reference(norm, activate, input_bias, size):
    rows, channels, height, width, groups = size
    masks = soft_masks(rows // 2, 2, height, width) if norm == "masked_group" else None
    inputs = {"x": rand(rows, channels, height, width), "weight": rand(channels), "bias": rand(channels)}
    inputs |= {"scale": rand(rows, channels), "shift": rand(rows, channels), "masks": masks}
    inputs["input_bias"] = None
    if input_bias:  # what is normalised stays the same: nearly equal numbers would only show their rounding
        inputs["input_bias"] = rand(channels)
        inputs["x"] -= inputs["input_bias"][:, None, None]
    check_own(inputs, groups, norm, activate=activate)


def check_own(inputs, groups, norm, activate=True, **more):
    options = {"groups": groups, "norm": norm, "activate": activate}
    compare(
        lambda *x: ops.group_norm_silu(*x[:5], masks=x[5], input_bias=x[6], **options),
        lambda x, w, b, s, t, m, extra: reference.norm_silu(x, None, m, w, b, s, t, extra, *options.values()),
        inputs,
        size=1.0,
        **more,
    )


@pytest.mark.usefixtures("fill_memory_with_nan")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_input_bias_of_half_precision_features_matches_reference(norm, dtype):
    """Without a modulation, a bias in fp32 and in the dtype of the features, gradients with stride 0."""
    for bias_dtype in (torch.float32, dtype):
        inputs = {"x": rand(4, 24, 3, 5, dtype=dtype), "weight": rand(24), "bias": rand(24)}
        inputs |= {"scale": None, "shift": None, "masks": soft_masks(2, 2, 3, 5) if norm == "masked_group" else None}
        check_own(inputs | {"input_bias": rand(24, dtype=bias_dtype)}, 3, norm, make_grad=strided("expanded"))


def strided(kind):
    """Upstream gradients as autograd makes them: not one of them lies as the answer does."""

    def make(like):
        n, c, h, w = like.shape
        if kind == "expanded":
            return torch.randn(n, 1, 1, 1, dtype=like.dtype).expand_as(like)
        if kind == "slice of a cat":
            return rand(n, c + 16, h, w, dtype=like.dtype)[:, 8 : 8 + c]
        if kind == "contiguous":
            return torch.randn(n, c, h, w, dtype=like.dtype)
        if kind == "transposed":
            return torch.randn(n, w, h, c, dtype=like.dtype).permute(0, 3, 2, 1)
        return torch.randn(n, c, 2 * h, 2 * w, dtype=like.dtype)[:, :, ::2, ::2]

    return make


@pytest.mark.parametrize("kind", ["expanded", "slice of a cat", "contiguous", "transposed", "every other pixel"])
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_of_any_strides_match_reference(norm, kind):
    check_skip(skip_inputs(2, 2, 5, 3, 4, 3, shared=False), 2, norm, make_grad=strided(kind))


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_offset_beyond_2_to_the_31_is_read(norm):
    """Offsets are 64-bit: the gradient's rows lie far apart in a storage of which almost nothing is ever touched."""
    inputs = skip_inputs(1, 2, 3, 5, 2, 3, shared=False, dtype=torch.bfloat16)
    apart = 2**31 + 64
    storage = torch.empty(apart + 64, dtype=torch.bfloat16)

    def make(like):
        far = storage.as_strided(like.shape, (apart, 1, 24, 8))
        return far.copy_(torch.randn_like(like))

    check_skip(inputs, 2, norm, make_grad=make)


def test_contiguous_layout_is_kept():
    x, w = torch.randn(2, 6, 3, 5), rand(6)
    out = ops.group_norm_silu(x, w, w, groups=2)
    assert out.is_contiguous()
    last = ops.group_norm_silu(x.contiguous(memory_format=torch.channels_last), w, w, groups=2)
    assert last.is_contiguous(memory_format=torch.channels_last) and not last.is_contiguous()
    torch.testing.assert_close(out, last)


@pytest.mark.parametrize("norm", NORMS)
def test_repeated_runs_are_bit_identical(norm):
    inputs = [x.requires_grad_() for x in skip_inputs(1, 2, 40, 24, 9, 8, shared=False, dtype=torch.bfloat16).values()]
    out = ops.masked_skip_norm_silu(*inputs, groups=4, norm=norm)
    grad = torch.randn_like(out)
    once, twice = (torch.autograd.grad(out, inputs, grad, retain_graph=True) for _ in range(2))
    for a, b in zip(once, twice, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mean", [100.0, 1000.0])
def test_bf16_statistics_are_computed_in_fp32(mean):
    x = (mean + 16 * torch.randn(1, 4, 64, 32)).bfloat16()
    got = ops.group_norm_silu(x, torch.ones(4), torch.zeros(4), groups=1, activate=False).float()
    assert abs(got.mean().item()) < 0.02 and abs(got.std().item() - 1) < 0.02


@pytest.mark.usefixtures("fill_memory_with_nan")
def test_two_pass_peer_of_the_benchmarks_matches_reference():
    x, weight, bias = rand(2, 6, 33, 40) + 3, rand(6), rand(6)  # planes of more than one block
    scale, shift = rand(2, 6), rand(2, 6)
    wanted = reference.norm_silu(x, None, None, weight, bias, scale, shift, None, 3, "group")
    torch.testing.assert_close(two_pass_group_norm_silu(x, weight, bias, scale, shift, 3, EPS["group"]), wanted)
