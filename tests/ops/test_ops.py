"""Each registered op against a loop written from its equation: random upstream gradients, opcheck, gradcheck."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from factorkit import ops
from factorkit.ops import dispatch, norm_cpp, reference, region
from factorkit.ops.norm_pytorch import GROUP_EPS, MASK_FLOOR, MASKED_GROUP_EPS, NORMS, PIXEL_EPS
from factorkit.ops.region import POOL_FLOOR


def rand(*shape, dtype=torch.float64, grad=True):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def soft_masks(b, k, h, w, dtype=torch.float64):
    return rand(b, k, h, w, dtype=dtype, grad=False).softmax(1).requires_grad_()


def norm_by_loops(x, weight, bias, scale, shift, masks, groups, norm, activate):
    """The definition, one output number at a time."""
    n, c, h, w = x.shape
    out = torch.empty_like(x)
    flat_masks = None if masks is None else masks.reshape(n, h, w)
    for i in range(n):
        for ch in range(c):
            if norm == "pixel":
                normal = x[i, ch] / torch.sqrt((x[i] ** 2).mean(0) + PIXEL_EPS)
            else:
                size = c // groups
                members = x[i, ch // size * size : (ch // size + 1) * size]
                if norm == "group":
                    weights, eps = torch.ones(h, w, dtype=x.dtype), GROUP_EPS
                else:
                    weights, eps = flat_masks[i] + MASK_FLOOR, MASKED_GROUP_EPS
                weights = weights / weights.sum()
                mean = sum((weights * m).sum() for m in members) / size
                var = sum((weights * (m - mean) ** 2).sum() for m in members) / size
                normal = (x[i, ch] - mean) / math.sqrt(var + eps)
            y = normal * weight[ch] + bias[ch]
            if scale is not None:
                y = y * (1 + scale[i, ch]) + shift[i, ch]
            out[i, ch] = y / (1 + torch.exp(-y)) if activate else y
    return out


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("activate", [True, False])
def test_norm_equals_its_definition(norm, modulated, activate):
    torch.manual_seed(0)
    b, k, c, h, w, groups = 2, 3, 6, 5, 3, 2
    x, masks = rand(b * k, c, h, w), soft_masks(b, k, h, w)
    weight, bias = rand(c), rand(c)
    scale, shift = (rand(b * k, c), rand(b * k, c)) if modulated else (None, None)
    affine = (weight, bias, scale, shift)
    with torch.no_grad():
        expected = norm_by_loops(x, *affine, masks, groups, norm, activate)
        torch.testing.assert_close(reference.norm_silu(x, None, masks, *affine, None, groups, norm, activate), expected)
        got = ops.group_norm_silu(
            x, weight, bias, scale, shift, groups=groups, norm=norm, masks=masks, activate=activate
        )
        torch.testing.assert_close(got, expected)


def compare_gradients(run, plain, inputs):
    """Gradients of the op and of the reference under the same random upstream gradients, expanded ones included."""
    leaves = [x for x in inputs if isinstance(x, torch.Tensor)]
    outs = [run(), plain()]
    outs = [[o] if isinstance(o, torch.Tensor) else list(o) for o in outs]
    for make in (torch.randn_like, lambda o: torch.randn(o.shape[0], 1, 1, 1, dtype=o.dtype).expand_as(o)):
        grads = [make(o) if o.dim() == 4 else torch.randn_like(o) for o in outs[0]]
        got = torch.autograd.grad(outs[0], leaves, grads, retain_graph=True, allow_unused=True)
        want = torch.autograd.grad(outs[1], leaves, grads, retain_graph=True, allow_unused=True)
        for g, w in zip(got, want, strict=True):
            assert (g is None) == (w is None)
            if g is not None:
                torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("input_bias", [None, rand(6)], ids=["plain", "input bias"])
@pytest.mark.parametrize("modulated", [True, False])
def test_norm_gradient_matches_reference(norm, modulated, input_bias):
    torch.manual_seed(1)
    x, weight, bias = rand(4, 6, 3, 5), rand(6), rand(6)
    masks = soft_masks(2, 2, 3, 5) if norm == "masked_group" else None
    scale, shift = (rand(4, 6), rand(4, 6)) if modulated else (None, None)
    compare_gradients(
        lambda: ops.group_norm_silu(
            x, weight, bias, scale, shift, groups=3, norm=norm, masks=masks, input_bias=input_bias
        ),
        lambda: reference.norm_silu(x, None, masks, weight, bias, scale, shift, input_bias, 3, norm),
        [x, weight, bias, scale, shift, masks, input_bias],
    )


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_masked_skip_norm_matches_reference(shared, norm):
    """Odd sizes, groups that straddle u and the skip, u shared by the branches or not."""
    torch.manual_seed(2)
    b, k, h, w = 2, 3, 3, 5
    u, skip, masks = rand(b if shared else b * k, 3, h, w), rand(b, 5, h, w), soft_masks(b, k, h, w)
    weight, bias, scale, shift = rand(8), rand(8), rand(b * k, 8), rand(b * k, 8)
    run = lambda: ops.masked_skip_norm_silu(u, skip, masks, weight, bias, scale, shift, groups=2, norm=norm)  # noqa: E731
    rows = []
    for i in range(b):
        for j in range(k):
            rows.append(torch.cat([u[i if shared else i * k + j], masks[i, j] * skip[i]]))
    z = torch.stack(rows)
    torch.testing.assert_close(reference.concatenate_masked_skip(u, skip, masks), z)
    with torch.no_grad():
        torch.testing.assert_close(run(), norm_by_loops(z, weight, bias, scale, shift, masks, 2, norm, True))
    plain = lambda: reference.norm_silu(u, skip, masks, weight, bias, scale, shift, None, 2, norm)  # noqa: E731
    compare_gradients(run, plain, [u, skip, masks, weight, bias, scale, shift])


@pytest.mark.parametrize("shared", [True, False])
def test_projection_gradients_match_reference(shared):
    torch.manual_seed(3)
    b, k = 2, 3
    u, skip, masks = rand(b if shared else b * k, 2, 4, 3), rand(b, 3, 4, 3), soft_masks(b, k, 4, 3)
    weight, bias = rand(4, 5, 1, 1), rand(4)
    concat = lambda: reference.concatenate_masked_skip(u, skip, masks)  # noqa: E731
    compare_gradients(
        lambda: ops.masked_skip_projection(u, skip, masks, weight, bias),
        lambda: F.conv2d(concat(), weight, bias),
        [u, skip, masks, weight, bias],
    )
    torch.testing.assert_close(
        ops.masked_skip_projection(u, skip, masks, weight, bias), F.conv2d(concat(), weight, bias)
    )
    residual = rand(b * k, 4, 4, 3)
    compare_gradients(
        lambda: ops.masked_skip_projection(u, skip, masks, weight, bias, residual),
        lambda: F.conv2d(concat(), weight, bias) + residual,
        [u, skip, masks, weight, bias, residual],
    )


def test_masked_add_saves_no_tensor_of_its_output_size():
    base, skip, masks, bias, residual = CASES["add"][1]
    arguments = [x.requires_grad_() for x in (torch.cat([base, base]), skip, masks, bias, residual)]
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        torch.ops.factorkit.masked_skip_add(*arguments)
    assert sorted(sizes) == sorted([skip.numel(), masks.numel()])


def test_skip_ops_without_masks_match_plain_unet():
    u, skip = rand(2, 4, 3, 3), rand(2, 4, 3, 3)
    weight, bias = rand(8), rand(8)
    z = torch.cat([u, skip], 1)
    torch.testing.assert_close(reference.concatenate_masked_skip(u, skip, None), z)
    got = ops.masked_skip_norm_silu(u, skip, None, weight, bias, groups=4)
    torch.testing.assert_close(got, F.silu(F.group_norm(z, 4, weight, bias, GROUP_EPS)))


def test_mask_pyramid_sums_to_one_at_every_resolution():
    torch.manual_seed(4)
    masks = soft_masks(2, 3, 16, 8)
    pyramid = ops.mask_pyramid(masks, 3)
    assert [tuple(m.shape[2:]) for m in pyramid] == [(16, 8), (8, 4), (4, 2), (2, 1)]
    for level, m in enumerate(pyramid):
        torch.testing.assert_close(m.sum(1), torch.ones_like(m[:, 0]))
        size = 2**level
        torch.testing.assert_close(m[1, 2, -1, -1], masks[1, 2, -size:, -size:].mean())
    compare_gradients(lambda: ops.mask_pyramid(masks, 3)[1:], lambda: reference.mask_pyramid(masks, 3), [masks])


def test_pyramid_gradient_when_one_level_is_unused():
    masks = soft_masks(1, 2, 8, 8)
    (got,) = torch.autograd.grad(ops.mask_pyramid(masks, 3)[2].square().sum(), masks)
    (want,) = torch.autograd.grad(reference.mask_pyramid(masks, 3)[1].square().sum(), masks)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["C++", "PyTorch"])
@pytest.mark.parametrize(
    ("mean", "first"), [(0.0, 100.0), (1e3, 1e3)], ids=["first pixel unlike the region", "far mean"]
)
@pytest.mark.parametrize("norm", ["group", "masked_group"])
def test_norm_of_values_far_from_zero_is_exact(norm, mean, first, layout):
    x = torch.randn(2, 16, 12, 12) * 0.1 + mean
    x[:, :, 0, 0] = first
    masks = torch.ones(2, 1, 12, 12)
    masks[:, :, 0, 0] = 0
    x, affine = x.contiguous(memory_format=layout), (torch.ones(16), torch.zeros(16))
    found = ops.group_norm_silu(x, *affine, groups=2, norm=norm, masks=masks, activate=False)
    exact = (v.double() for v in (x, *affine))
    wanted = ops.reference.norm_silu(*_norm_arguments(*exact, masks.double()), 2, norm, False)
    assert (found - wanted).abs()[:, :, 1:].max() < 1e-3 * wanted.abs()[:, :, 1:].max()


def _norm_arguments(x, weight, bias, masks):
    return x, None, masks, weight, bias, None, None, None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skip": torch.randn(2, 8, 2, 2)}, r"the skip is \(2, 8, 2, 2\)"),
        ({"skip": torch.randn(1, 8, 4, 4)}, r"the skip is \(1, 8, 4, 4\)"),
        ({"masks": torch.ones(2, 2, 3, 3)}, "masks are .3, 3. pixels"),
        ({"weight": torch.ones(8)}, r"weight \(8,\)"),
        ({"bias": torch.ones(17)}, r"bias \(17,\)"),
        ({"scale": torch.ones(4, 16)}, r"scale \(4, 16\) and shift None must be \(4, 16\)"),
        ({"scale": torch.ones(2, 16), "shift": torch.ones(2, 16)}, r"must be \(4, 16\)"),
    ],
)
def test_masked_skip_norm_with_shapes_that_do_not_fit_is_refused(change, message):
    inputs = {"u": torch.randn(4, 8, 4, 4), "skip": torch.randn(2, 8, 4, 4), "masks": torch.ones(2, 2, 4, 4)}
    inputs |= {"weight": torch.ones(16), "bias": torch.ones(16)}
    with pytest.raises(ValueError, match=message):
        ops.masked_skip_norm_silu(**{**inputs, **change}, groups=4)


def test_region_pool_is_the_area_normalised_mean():
    torch.manual_seed(5)
    features, masks = rand(2, 4, 3, 5), soft_masks(2, 3, 3, 5)
    got = ops.region_pool(features, masks)
    for b in range(2):
        for k in range(3):
            for c in range(4):
                want = (masks[b, k] * features[b, c]).sum() / (masks[b, k].sum() + POOL_FLOOR)
                torch.testing.assert_close(got[b, k, c], want)
    compare_gradients(
        lambda: ops.region_pool(features, masks), lambda: reference.region_pool(features, masks), [features, masks]
    )


def test_region_blend_is_the_softmax_weighted_sum():
    torch.manual_seed(6)
    logits, branches = rand(2, 3, 4, 5), rand(6, 2, 4, 5)
    masks, out = ops.region_blend(logits, branches)
    by_hand = torch.zeros(2, 2, 4, 5, dtype=torch.float64)
    for b in range(2):
        weights = [torch.exp(logits[b, k]) for k in range(3)]
        for k in range(3):
            share = weights[k] / sum(weights)
            torch.testing.assert_close(masks[b, k], share)
            by_hand[b] += share * branches[b * 3 + k]
    torch.testing.assert_close(out, by_hand)
    compare_gradients(
        lambda: ops.region_blend(logits, branches), lambda: reference.region_blend(logits, branches), [logits, branches]
    )


def cases():
    """One call of every registered forward op, small enough for gradcheck and odd enough to matter."""
    torch.manual_seed(7)
    u, skip, masks = rand(2, 2, 3, 2), rand(2, 4, 3, 2), soft_masks(2, 2, 3, 2)
    weight, bias, scale, shift = rand(6), rand(6), rand(4, 6), rand(4, 6)
    o = torch.ops.factorkit
    for norm in NORMS:
        m = masks if norm == "masked_group" else None
        x, tail = rand(4, 6, 3, 2), (2, norm, True)
        yield f"norm-{norm}", o.norm_silu, (x, None, m, weight, bias, scale, shift, None, *tail)
        yield f"input-bias-{norm}", o.norm_silu, (x, None, m, weight, bias, scale, shift, rand(6), *tail)
        yield f"skip-{norm}", o.norm_silu, (u, skip, masks, weight, bias, scale, shift, None, 2, norm, True)
    yield "norm-plain", o.norm_silu, (rand(1, 6, 3, 2), None, None, weight, bias, None, None, None, 2, "group", False)
    yield "skip-plain", o.norm_silu, (u, skip, None, weight, bias, None, None, None, 2, "group", True)
    yield "add", o.masked_skip_add, (rand(2, 4, 3, 2), skip, masks, rand(4), rand(4, 4, 3, 2))
    projection = (skip, masks, rand(3, 6, 1, 1), rand(3))
    yield "projection", o.masked_skip_projection, (rand(2, 2, 3, 2), *projection, rand(4, 3, 3, 2))
    yield "projection-own", o.masked_skip_projection, (rand(4, 2, 3, 2), *projection, None)
    yield "projection-plain", o.masked_skip_projection, (u, skip, None, *projection[2:], None)
    yield "pyramid", o.mask_pyramid, (soft_masks(1, 2, 4, 4), 2)
    yield "pool", o.region_pool, (rand(2, 2, 3, 2), masks)
    yield "blend", o.region_blend, (rand(2, 2, 3, 2), rand(4, 2, 3, 2))


CASES = {name: (op, args) for name, op, args in cases()}
OPCHECKS = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    op, args = CASES[name]
    tensors = [a for a in args if isinstance(a, torch.Tensor)]

    def run(*values):
        values = iter(values)
        return op(*(next(values) if isinstance(a, torch.Tensor) else a for a in args))

    assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name, dtype):
    """In bf16 without the compiled gradient, which differs from that in fp32 by its types alone."""
    op, args = CASES[name]
    cast = [a.detach().to(dtype).requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    torch.library.opcheck(op, cast, test_utils=OPCHECKS if dtype == torch.float32 else OPCHECKS[:2])


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("pyramid", "pool", "blend")])
def test_channels_last_layout_is_kept(name):
    op, args = CASES[name]
    last = [
        a.detach().to(memory_format=torch.channels_last) if isinstance(a, torch.Tensor) and a.dim() == 4 else a
        for a in args
    ]
    out, want = (x if isinstance(x, torch.Tensor) else x[0] for x in (op(*last), op(*args)))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, want.detach())
    torch.library.opcheck(op, last, test_utils=OPCHECKS[:2])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bf16_statistics_are_computed_in_fp32(layout):
    """A mean of 100 with a spread of 1 would drown in bf16 sums."""
    torch.manual_seed(8)
    x = (100 + torch.randn(1, 4, 64, 64)).bfloat16().to(memory_format=layout)
    weight, bias = torch.ones(4), torch.zeros(4)
    got = ops.group_norm_silu(x, weight, bias, groups=1, activate=False).float()
    assert abs(got.mean().item()) < 0.02 and abs(got.std().item() - 1) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("shared", "masked"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize(("c_u", "c_s"), [(6, 10), (24, 40)])
def test_compiled_norm_matches_reference(dtype, norm, shared, masked, c_u, c_s, monkeypatch):
    """The C++ of csrc/norm_cpu.cpp, on several threads, odd sizes, gradients with stride 0: against fp64.

    The channels fill no vector of AVX-512, or more than one. Scale and shift are halves of one tensor.
    """
    if not masked and norm == "masked_group":
        norm = "group"  # there is nothing to weigh the moments by
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    torch.manual_seed(9)
    b, k, h, w = 3, 3, 7, 5  # branches whose sums begin, go on and end
    u, skip = 3 + rand(b if shared or not masked else b * k, c_u, h, w, grad=False), rand(b, c_s, h, w, grad=False)
    masks = soft_masks(b, k, h, w) if masked else None
    rows = b * k if masked else b
    weight, bias, modulation = rand(c_u + c_s), rand(c_u + c_s), rand(rows, 2 * (c_u + c_s))
    rest = (None if x is None else x.float() for x in (masks, weight, bias))
    inputs = [u.to(dtype), skip.to(dtype), *rest, *modulation.to(dtype).chunk(2, dim=1)]
    inputs[:2] = [x.to(memory_format=torch.channels_last) for x in inputs[:2]]
    inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    assert norm_cpp.forward(*inputs, None, 4, norm, True) is not None
    got = torch.ops.factorkit.norm_silu(*inputs, None, 4, norm, True)[0]
    want = reference.norm_silu(*exact, None, 4, norm)
    loose = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(got.double(), want, **loose)
    for grad in (torch.randn_like(want), torch.randn(rows, 1, 1, 1, dtype=torch.float64).expand_as(want)):
        grad = grad.to(dtype)
        found = torch.autograd.grad(got, [x for x in inputs if x is not None], grad, retain_graph=True)
        wanted = torch.autograd.grad(want, [x for x in exact if x is not None], grad.double(), retain_graph=True)
        for f, x in zip(found, wanted, strict=True):
            error = (f.double() - x).norm() / x.norm()
            assert error < (1e-2 if dtype == torch.bfloat16 else 1e-5), error


def test_compiled_silu_in_bf16_is_off_by_little_more_than_the_rounding():
    torch.manual_seed(2)
    x = (3 * torch.randn(4, 32, 16, 16)).bfloat16().to(memory_format=torch.channels_last)
    affine = torch.full((32,), 3.0), torch.zeros(32)  # from -12 to 12
    got = ops.group_norm_silu(x, *affine, groups=4)
    want = reference.norm_silu(x.double(), None, None, *(v.double() for v in affine), None, None, None, 4, "group")
    torch.testing.assert_close(got.double(), want, rtol=2**-8 + 2e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("level", range(3))
def test_compiled_norm_of_lesser_processors_matches_reference(level):
    """Without vectors, with AVX2, and with AVX-512 but not its bf16: what this processor would not choose."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", __file__, "-k", "test_compiled_norm_matches_reference"]
    environment = os.environ | {"FACTORKIT_SIMD_LEVEL": str(level)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "36 passed" in done.stdout, done.stdout[-4000:]


@pytest.mark.parametrize("norm", NORMS)
def test_input_bias_of_tensors_that_the_compiled_norm_takes_is_added(norm):
    x, bias = torch.randn(4, 6, 3, 5).to(memory_format=torch.channels_last), torch.randn(6, requires_grad=True)
    weight, options = torch.randn(6), {"groups": 2, "norm": norm, "masks": soft_masks(2, 2, 3, 5).detach().float()}
    runs = (
        ops.group_norm_silu(x, weight, weight, input_bias=bias, **options),
        ops.group_norm_silu(x + bias[:, None, None], weight, weight, **options),
    )
    torch.testing.assert_close(*runs)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), bias) for out in runs), rtol=1e-4, atol=1e-4)


def test_empty_batch_gives_empty_output():
    x, w = torch.zeros(0, 4, 3, 3), torch.ones(4)
    assert ops.group_norm_silu(x, w, w, groups=2).shape == (0, 4, 3, 3)
    bias = torch.ones(4, requires_grad=True)
    for norm in NORMS:
        out = ops.group_norm_silu(x, w, w, groups=2, norm=norm, masks=torch.zeros(0, 2, 3, 3), input_bias=bias)
        assert out.shape == (0, 4, 3, 3) and not torch.autograd.grad(out.sum(), bias)[0].any()
    w = torch.ones(8)
    assert ops.masked_skip_norm_silu(x, x, torch.zeros(0, 2, 3, 3), w, w, groups=2).shape == (0, 8, 3, 3)


def test_wrong_input_is_refused():
    x, w = torch.zeros(4, 6, 3, 3), torch.ones(6)
    with pytest.raises(ValueError, match="4 groups do not divide 6"):
        ops.group_norm_silu(x, w, w, groups=4)
    with pytest.raises(ValueError, match="unknown"):
        ops.group_norm_silu(x, w, w, groups=2, norm="batch")
    with pytest.raises(ValueError, match="B\\*K = 4"):
        ops.group_norm_silu(x, w, w, groups=2, norm="masked_group", masks=torch.zeros(1, 3, 3, 3))
    u, skip, masks, w = torch.zeros(3, 1, 2, 2), torch.zeros(2, 1, 2, 2), torch.zeros(2, 4, 2, 2), torch.ones(2)
    with pytest.raises(ValueError, match="3 rows"):
        ops.masked_skip_norm_silu(u, skip, masks, w, w, groups=1)
    with pytest.raises(ValueError, match="halved"):
        ops.mask_pyramid(torch.zeros(1, 2, 6, 6), 2)


def test_reference_can_be_forced(monkeypatch):
    def marked(*args):
        raise RuntimeError("the reference was asked")

    monkeypatch.setattr(region, "average_features", marked)
    monkeypatch.setenv("FACTORKIT_REFERENCE", "1")
    with pytest.raises(RuntimeError, match="the reference was asked"):
        ops.region_pool(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3))


def test_compiled_op_runs_on_the_device_of_its_tensors(monkeypatch):
    entered, calls = [], []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(dispatch, "EXTENSION", SimpleNamespace(march_count_cuda=lambda *given: calls.append(given)))
    with FakeTensorMode():
        dispatch.call_extension("march_count", torch.empty(4, device="cuda:1"), 3)
    assert entered == [torch.device("cuda", 1)] and calls == [("float32", 3, 7)]


@pytest.mark.parametrize("used", ["all", "output", "inputs"])
@pytest.mark.parametrize("kind", ["norm", "shared", "own", "skip"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norm_with_inputs_adds_the_gradients_of_their_other_uses(dtype, norm, kind, used):
    """In fp64 in PyTorch, else in C++; in bf16 the sum is rounded once, where autograd rounds twice."""
    if kind == "skip" and norm == "masked_group":
        pytest.skip("there is nothing to weigh the moments by")
    torch.manual_seed(3)
    rows = 3 if kind in ("shared", "skip") else 6
    u, skip = (torch.randn(n, 8, 5, 3).to(dtype, memory_format=torch.channels_last) for n in (rows, 3))
    masks = None if kind == "skip" or (kind == "norm" and norm != "masked_group") else soft_masks(3, 2, 5, 3).detach()
    masks = None if masks is None else masks.to(torch.promote_types(dtype, torch.float32))
    skip = None if kind == "norm" else skip.requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = torch.randn(2, 8 if skip is None else 16, dtype=wide)
    inputs = [u.requires_grad_()] + ([] if skip is None else [skip])
    out, *again = ops.norm_silu_with_inputs(u, skip, masks, weight, bias, groups=2, norm=norm)
    again = [x for x in again if x is not None]
    assert all(torch.equal(x, y) for x, y in zip(again, inputs, strict=True))
    parts = {"all": [out, *again], "output": [out], "inputs": again}[used]
    upstream = [torch.randn_like(x) for x in parts]
    with CountedAdditions() as counted:
        found = torch.autograd.grad(parts, inputs, upstream)
    if skip is None:
        plain = ops.group_norm_silu(u, weight, bias, groups=2, norm=norm, masks=masks)
    else:
        plain = ops.masked_skip_norm_silu(u, skip, masks, weight, bias, groups=2, norm=norm)
    parts = {"all": [plain, *inputs], "output": [plain], "inputs": inputs}[used]
    wanted = torch.autograd.grad(parts, inputs, upstream)
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, **close)
    assert dtype == torch.float64 or counted.additions == 0


def test_norm_with_inputs_where_they_need_no_gradient_or_are_transformed_is_the_plain_norm():
    x, weight = torch.randn(2, 3, 4, 5, 5), torch.randn(4, requires_grad=True)
    run = lambda x: ops.norm_silu_with_inputs(x, None, None, weight, weight, groups=2)[:2]  # noqa: E731
    out, again = run(x[0])
    assert out.requires_grad and not again.requires_grad
    together = torch.vmap(lambda x: run(x)[0])(x.requires_grad_())
    torch.testing.assert_close(together, torch.stack([run(part)[0] for part in x]))


class CountedAdditions(TorchDispatchMode):
    """Count the sums of tensors, which autograd takes where a tensor is used twice."""

    additions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.additions += func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_)
        return func(*args, **(kwargs or {}))
