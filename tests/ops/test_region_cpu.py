"""The C++ of csrc/region_cpu.cpp against the fp64 references, with NaN in all memory that nobody writes."""

from __future__ import annotations

import pytest
import torch

from factorkit import ops
from factorkit.ops import reference, region

LAYOUTS = ("contiguous", "channels_last", "slices")
BF16, FP32 = torch.bfloat16, torch.float32
ALLOWED = {FP32: 3e-6, BF16: 1.5 * torch.finfo(BF16).eps}  # relative error, by the least precise dtype involved
DTYPES = pytest.mark.parametrize(
    ("of_logits", "of_branches"), [(FP32, FP32), (FP32, BF16), (BF16, FP32), (BF16, BF16)], ids=str
)


pytestmark = pytest.mark.usefixtures("fill_memory_with_nan")


def random(*shape, dtype=FP32, layout="contiguous"):
    if layout == "slices":  # what torch.cat sends back: strides that belong to more channels
        n, c, h, w = shape
        return torch.randn(n, c + 3, h, w).to(dtype)[:, 1 : 1 + c]
    x = torch.randn(*shape).to(dtype)
    return x.to(memory_format=torch.channels_last) if layout == "channels_last" else x


def compare(run, plain, inputs, layout, allowed):
    """Compare outputs, and gradients for all inputs under random upstream ones of the given layout, with fp64."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got, want = run(*leaves), plain(*exact)
    upstream = [random(*x.shape, dtype=x.dtype, layout=layout) for x in got]
    found = torch.autograd.grad(got, leaves, upstream)
    wanted = torch.autograd.grad(want, exact, [g.double() for g in upstream])
    assert [(g.shape, g.dtype) for g in found] == [(x.shape, x.dtype) for x in inputs]
    for g, w in [*zip(got, want, strict=True), *zip(found, wanted, strict=True)]:
        error = (g.double() - w).norm() / w.norm().clamp_min(1e-30)
        assert error <= allowed, f"off by {error:.1e}, allowed {allowed:.0e}"
    return got, found


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch_regions_channels", [(1, 1, 3), (2, 2, 3), (1, 3, 4), (2, 4, 1), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (8, 8), (9, 15)], ids=str)
def test_compiled_blend_of_any_shape_matches_reference(of_logits, of_branches, layout, batch_regions_channels, size):
    b, k, c = batch_regions_channels
    inputs = [random(b, k, *size, dtype=of_logits, layout=layout)]
    inputs += [random(b * k, c, *size, dtype=of_branches, layout=layout)]
    assert region._blend_cpp(*inputs) is not None
    allowed = max(ALLOWED[of_logits], ALLOWED[of_branches])
    _, (_, d_branches) = compare(ops.region_blend, reference.region_blend, inputs, layout, allowed)
    if layout == "channels_last":
        assert d_branches.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "levels"), [((1, 1, 2, 2), 1), ((2, 3, 6, 10), 1), ((3, 5, 8, 24), 3), ((1, 2, 64, 64), 6)], ids=str
)
def test_compiled_pyramid_of_any_shape_matches_reference(dtype, layout, shape, levels):
    masks = random(*shape, layout=layout).abs().to(dtype)
    assert region._pyramid_cpp(masks, 1) is not None
    plain = lambda m: reference.mask_pyramid(m, levels)  # noqa: E731
    compare(lambda m: ops.mask_pyramid(m, levels)[1:], plain, [masks], layout, ALLOWED[dtype])


def test_compiled_blend_of_extreme_logits_is_finite_and_saturated():
    logits = torch.tensor([3e4, 0.0, -3e4]).reshape(1, 3, 1, 1).expand(1, 3, 2, 9).requires_grad_()
    branches = random(3, 2, 2, 9).requires_grad_()
    masks, out = ops.region_blend(logits, branches)
    assert torch.equal(masks[:, 0], torch.ones(1, 2, 9)) and torch.equal(out[0], branches[0])
    gradients = torch.autograd.grad(out.sum(), (logits, branches))
    assert all(torch.isfinite(g).all() for g in gradients)
    large = torch.tensor([1000.0, 1001.0, -1000.0]).reshape(1, 3, 1, 1).expand(1, 3, 2, 9)
    torch.testing.assert_close(ops.region_blend(large, branches)[0], large.softmax(1))


@pytest.mark.parametrize("used", [0, 1], ids=["masks", "prediction"])
def test_compiled_blend_with_one_output_used_matches_reference(used):

    def one_of(op):
        return lambda logits, branches: [op(logits, branches)[used] + 0 * branches.sum()]

    inputs = [random(2, 3, 5, 7), random(6, 3, 5, 7)]
    compare(one_of(ops.region_blend), one_of(reference.region_blend), inputs, "contiguous", ALLOWED[FP32])


def test_compiled_blend_with_nan_in_a_pixel_is_nan_in_that_pixel_alone():
    logits, branches = random(1, 2, 3, 5), random(2, 3, 3, 5)
    logits[0, 1, 1, 2] = torch.nan
    for x in ops.region_blend(logits, branches):
        bad = x.isnan()
        assert bad[:, :, 1, 2].all() and bad.sum() == x.shape[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_region_ops_on_two_threads_equal_those_on_one(layout, monkeypatch):
    logits, branches = random(3, 3, 16, 24, layout=layout), random(9, 3, 16, 24, layout=layout)
    upstream = [random(3, 3, 16, 24), random(3, 3, 16, 24), random(3, 3, 8, 12), random(3, 3, 4, 6)]
    results = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        leaves = [x.detach().requires_grad_() for x in (logits, branches)]
        masks, out = ops.region_blend(*leaves)
        outputs = [masks, out, *ops.mask_pyramid(masks, 2)[1:]]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, upstream)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_region_ops_of_an_empty_batch_give_empty_outputs_and_gradients():
    logits, branches = torch.zeros(0, 2, 4, 4, requires_grad=True), torch.zeros(0, 3, 4, 4, requires_grad=True)
    masks, out = ops.region_blend(logits, branches)
    pyramid = ops.mask_pyramid(masks, 2)
    shapes = [(0, 2, 4, 4), (0, 3, 4, 4), (0, 2, 2, 2), (0, 2, 1, 1)]
    assert [tuple(x.shape) for x in (masks, out, *pyramid[1:])] == shapes
    gradients = torch.autograd.grad(out.sum() + pyramid[2].sum(), (logits, branches))
    assert [tuple(g.shape) for g in gradients] == [(0, 2, 4, 4), (0, 3, 4, 4)]


@pytest.mark.parametrize("shape", [(3, 3, 4, 4), (2, 3, 4, 4), (4, 3, 4, 3), (4, 3, 2, 4)], ids=str)
def test_blend_of_branches_that_do_not_fit_raises_value_error(shape):
    with pytest.raises(ValueError, match=r"branches .* must be \[B\*K, C, H, W\] of logits \(2, 2, 4, 4\)"):
        ops.region_blend(random(2, 2, 4, 4), random(*shape))


def test_region_ops_without_extension_run_as_pytorch(monkeypatch):
    monkeypatch.setattr(region, "has_extension", lambda device: False)
    logits, branches = random(2, 2, 4, 4), random(4, 3, 4, 4)
    assert region._blend_cpp(logits, branches) is None and region._pyramid_cpp(logits, 1) is None
    compare(ops.region_blend, reference.region_blend, [logits, branches], "contiguous", ALLOWED[FP32])
    compare(
        lambda m: ops.mask_pyramid(m, 1)[1:],
        lambda m: reference.mask_pyramid(m, 1),
        [logits],
        "contiguous",
        ALLOWED[FP32],
    )
