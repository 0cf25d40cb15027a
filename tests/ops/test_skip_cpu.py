"""The C++ of csrc/skip_cpu.cpp and region_pool_cpu.cpp against fp64, with NaN in all memory that nobody writes."""

from __future__ import annotations

import pytest
import torch
from kernel_compare import compare, rand, soft_masks

from factorkit import ops
from factorkit.ops import reference, region, skip

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
SHARED = pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
SHAPES = pytest.mark.parametrize(
    ("batch", "regions", "channels"), [(1, 1, 8), (3, 2, 17), (1, 5, 16), (3, 2, 24), (1, 2, 333)]
)
SIZES = pytest.mark.parametrize("size", [(3, 5), (8, 9)], ids=str)
pytestmark = pytest.mark.usefixtures("fill_memory_with_nan")


def slices(like):
    """The gradient that a torch.cat with something else sends back: strides that belong to more channels."""
    if like.dim() < 4:
        return torch.randn_like(like)
    n, c, h, w = like.shape
    return rand(n, c + 5, h, w, dtype=like.dtype)[:, 2 : 2 + c]


def add_inputs(batch, regions, channels, size, *, shared=False, bias=False, residual=False, dtype=FP32):
    rows = batch * regions
    return {
        "base": rand(batch if shared else rows, channels, *size, dtype=dtype),
        "skip": rand(batch, channels, *size, dtype=dtype),
        "masks": soft_masks(batch, regions, *size),
        "bias": rand(channels) if bias else None,
        "residual": rand(rows, channels, *size, dtype=dtype) if residual else None,
    }


@DTYPES
@SHARED
@SHAPES
@SIZES
@pytest.mark.parametrize("extra", ["", "bias", "residual", "bias residual"])
def test_compiled_masked_add_of_any_shape_matches_reference(batch, regions, channels, size, shared, extra, dtype):
    inputs = add_inputs(
        batch, regions, channels, size, shared=shared, bias="bias" in extra, residual="residual" in extra, dtype=dtype
    )
    out = skip._add_cpp(*inputs.values())
    assert out is not None and out.is_contiguous(memory_format=torch.channels_last)
    gradients = skip._add_backward_cpp(out, inputs["base"] if shared else None, inputs["skip"], inputs["masks"])
    assert gradients is not None and len(gradients) == 2 + shared
    assert all(g.is_contiguous(memory_format=torch.channels_last) for g in gradients[:-1])
    compare(torch.ops.factorkit.masked_skip_add, reference.masked_skip_add, inputs)
    compare(torch.ops.factorkit.masked_skip_add, reference.masked_skip_add, inputs, make_grad=slices)


@DTYPES
@SHAPES
@SIZES
def test_compiled_pool_of_any_shape_matches_reference(batch, regions, channels, size, dtype):
    inputs = {"features": rand(batch, channels, *size, dtype=dtype), "masks": soft_masks(batch, regions, *size)}
    tokens = region._pool_cpp(*inputs.values())
    assert tokens is not None and tokens.shape == (batch, regions, channels)
    d_features, d_masks = region._pool_backward_cpp(tokens, *inputs.values(), tokens)
    assert d_features.is_contiguous(memory_format=torch.channels_last) and d_masks.is_contiguous()
    compare(ops.region_pool, reference.region_pool, inputs)
    compare(
        ops.region_pool,
        reference.region_pool,
        inputs,
        make_grad=lambda x: torch.randn(x.shape[:2])[..., None].expand_as(x),
    )


def test_compiled_pool_of_an_empty_region_is_zero_and_of_many_pixels_exact():
    features, masks = rand(2, 16, 64, 64) + 100, soft_masks(2, 3, 64, 64)
    masks[:, 1] = 0
    tokens = ops.region_pool(features, masks)
    assert not tokens[:, 1].any()
    torch.testing.assert_close(
        tokens.double(), reference.region_pool(features.double(), masks.double()), rtol=2e-6, atol=0
    )


@pytest.mark.parametrize(
    "change", ["five channels", "contiguous", "fp64", "masks in bf16", "mixed", "no masks", "empty"]
)
def test_tensors_that_the_compiled_code_does_not_take_run_as_pytorch(change):
    inputs = add_inputs(2, 3, 5 if change == "five channels" else 8, (3, 5), residual=True)
    if change == "contiguous":
        inputs = {n: None if x is None else x.contiguous() for n, x in inputs.items()}
    elif change == "fp64":
        inputs = {n: None if x is None else x.double() for n, x in inputs.items()}
    elif change == "masks in bf16":
        inputs["masks"] = inputs["masks"].bfloat16()
    elif change == "mixed":
        inputs["skip"] = inputs["skip"].bfloat16()
    elif change == "no masks":
        inputs |= {"base": inputs["skip"], "masks": None, "residual": None}
    elif change == "empty":
        inputs = {n: None if x is None else x[:0] for n, x in inputs.items()}
    assert skip._add_cpp(*inputs.values()) is None
    got, want = torch.ops.factorkit.masked_skip_add(*inputs.values()), reference.masked_skip_add(*inputs.values())
    torch.testing.assert_close(got, want)
    if inputs["masks"] is not None:
        assert skip._add_backward_cpp(got, None, inputs["skip"], inputs["masks"]) is None
        if change != "mixed":
            assert region._pool_cpp(inputs["skip"], inputs["masks"]) is None


@pytest.mark.parametrize("wrong", ["skip", "masks", "residual", "bias", "base"])
def test_masked_add_of_shapes_that_do_not_fit_raises_instead_of_reading_beyond_the_end(wrong):
    inputs = add_inputs(2, 3, 16, (3, 5), bias=True, residual=True)
    shapes = {
        "skip": (2, 16, 3, 4),
        "masks": (2, 3, 2, 5),
        "residual": (6, 16, 3, 4),
        "bias": (8,),
        "base": (5, 16, 3, 5),
    }
    inputs[wrong] = rand(*shapes[wrong])
    assert skip._add_cpp(*inputs.values()) is None
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.factorkit.masked_skip_add(*inputs.values())


@DTYPES
@SHARED
def test_compiled_masked_add_and_pool_on_two_threads_equal_those_on_one(dtype, shared, monkeypatch):
    inputs = add_inputs(3, 2, 40, (9, 15), shared=shared, bias=True, residual=True, dtype=dtype)
    upstream = [rand(6, 40, 9, 15, dtype=dtype), torch.randn(3, 2, 40)]
    results = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        outputs = [torch.ops.factorkit.masked_skip_add(*leaves), ops.region_pool(leaves[1], leaves[2])]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, upstream)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@DTYPES
def test_compiled_masked_add_with_nan_in_a_pixel_is_nan_in_that_pixel_alone(dtype):
    inputs = add_inputs(1, 2, 17, (3, 5), shared=True, dtype=dtype)
    inputs["skip"][0, 3, 1, 2] = torch.nan
    bad = torch.ops.factorkit.masked_skip_add(*inputs.values()).isnan()
    assert bad[:, 3, 1, 2].all() and bad.sum() == 2
    grad = rand(2, 17, 3, 5, dtype=dtype)
    d_base, d_skip, d_masks = skip._add_backward_cpp(grad, inputs["base"], inputs["skip"], inputs["masks"])
    assert not d_base.isnan().any() and not d_skip.isnan().any()
    assert d_masks.isnan()[0, :, 1, 2].all() and d_masks.isnan().sum() == 2
    grad[1, 16, 2, 4] = torch.nan
    d_base, d_skip, _ = skip._add_backward_cpp(grad, inputs["base"], inputs["skip"], inputs["masks"])
    for x in (d_base, d_skip):
        assert x.isnan()[0, 16, 2, 4] and x.isnan().sum() == 1


@DTYPES
def test_compiled_pool_with_nan_in_a_channel_is_nan_in_that_channel_alone(dtype):
    features, masks = rand(2, 17, 3, 5, dtype=dtype), soft_masks(2, 2, 3, 5)
    features[0, 16, 1, 2] = torch.nan
    bad = ops.region_pool(features, masks).isnan()
    assert bad[0, :, 16].all() and bad.sum() == 2


@SHARED
def test_second_derivative_of_compiled_masked_add_and_pool_matches_reference(shared):
    def penalty(add, pool, tensors):
        base, s, m, residual = tensors
        out = add(base, s, m, None, residual)
        loss = out.square().mean() + pool(out[: len(s)], m).square().sum() + pool(s, m).pow(3).sum()
        grads = torch.autograd.grad(loss, tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)

    inputs = add_inputs(2, 2, 17, (3, 5), shared=shared, residual=True)
    values = [x for x in inputs.values() if x is not None]
    got = penalty(torch.ops.factorkit.masked_skip_add, ops.region_pool, [x.requires_grad_() for x in values])
    exact = [x.detach().double().requires_grad_() for x in values]
    want = penalty(reference.masked_skip_add, reference.region_pool, exact)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-6)


def test_masked_add_and_pool_without_extension_run_as_pytorch(monkeypatch):
    monkeypatch.setattr(skip, "has_extension", lambda device: False)
    monkeypatch.setattr(region, "has_extension", lambda device: False)
    inputs = add_inputs(2, 3, 8, (3, 5), residual=True)
    assert skip._add_cpp(*inputs.values()) is None and region._pool_cpp(inputs["skip"], inputs["masks"]) is None
    compare(torch.ops.factorkit.masked_skip_add, reference.masked_skip_add, inputs)
