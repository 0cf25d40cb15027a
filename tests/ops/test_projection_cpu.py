"""The C++ of csrc/projection_cpu.cpp against fp64, with NaN in all memory that nobody writes, and where it is used."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from kernel_compare import assert_close, compare, rand, soft_masks

from factorkit import ops
from factorkit.nn.unet import ResBlock
from factorkit.ops import projection, reference

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
KINDS = pytest.mark.parametrize("kind", ["shared", "own", "plain"])
pytestmark = pytest.mark.usefixtures("fill_memory_with_nan")
OP = torch.ops.factorkit.masked_skip_projection


def slices(like):
    """The gradient that a torch.cat with something else sends back: strides that belong to more channels."""
    if like.dim() < 4:
        return torch.randn_like(like)
    n, c, h, w = like.shape
    return rand(n, c + 5, h, w, dtype=like.dtype)[:, 2 : 2 + c]


def inputs_of(batch, regions, channels, size=(3, 5), *, kind="own", residual=True, dtype=FP32):
    c_u, c_skip, c_out = channels
    rows = batch if kind == "plain" else batch * regions
    return {
        "u": rand(rows if kind == "own" else batch, c_u, *size, dtype=dtype),
        "skip": rand(batch, c_skip, *size, dtype=dtype),
        "masks": None if kind == "plain" else soft_masks(batch, regions, *size),
        "weight": rand(c_out, c_u + c_skip, 1, 1) / (c_u + c_skip) ** 0.5,
        "bias": rand(c_out),
        "residual": rand(rows, c_out, *size, dtype=dtype) if residual else None,
    }


def count_calls(monkeypatch):
    """Return a list of the calls of the op by ``masked_skip_projection``."""
    calls, select = [], projection.select
    spy = lambda name, *rest: lambda *x: calls.append((name, x)) or select(name, *rest)(*x)  # noqa: E731
    monkeypatch.setattr(projection, "select", spy)
    return calls


@DTYPES
@KINDS
@pytest.mark.parametrize("size", [(3, 5), (8, 9)], ids=str)
@pytest.mark.parametrize(
    ("batch", "regions", "channels"),
    [(1, 1, (8, 8, 8)), (3, 2, (17, 9, 24)), (1, 5, (16, 32, 16)), (35, 2, (8, 12, 41)), (2, 3, (33, 64, 50))],
)
def test_compiled_projection_of_any_shape_matches_reference(batch, regions, channels, size, kind, dtype):
    for residual in (True, False):
        inputs = inputs_of(batch, regions, channels, size, kind=kind, residual=residual, dtype=dtype)
        out = projection._project_cpp(*inputs.values())
        assert out is not None and out.is_contiguous(memory_format=torch.channels_last)
        gradients = projection._project_backward_cpp(out, *list(inputs.values())[:-1])
        assert gradients is not None and len(gradients) == 5 - (kind == "plain")
        assert all(g.is_contiguous(memory_format=torch.channels_last) for g in gradients[:2])
        for make_grad in (torch.randn_like, slices):
            compare(OP, reference.masked_skip_projection, inputs, make_grad)


@pytest.mark.slow
@pytest.mark.parametrize("level", range(3))
def test_compiled_projection_of_lesser_processors_matches_reference(level):
    """Without vectors, with AVX2, and with AVX-512 but not its bf16: what this processor would not choose."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", __file__, "-k", "of_any_shape"]
    environment = os.environ | {"FACTORKIT_SIMD_LEVEL": str(level)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "60 passed" in done.stdout, done.stdout[-4000:]


@DTYPES
def test_projection_of_many_pixels_and_images_sums_gradients_as_exactly(dtype):
    inputs = inputs_of(40, 2, (16, 16, 16), (32, 32), dtype=dtype)
    compare(OP, reference.masked_skip_projection, inputs)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_compiled_projection_of_tensors_with_other_strides_matches_reference(dtype):
    inputs = inputs_of(3, 2, (9, 8, 10), dtype=dtype)
    inputs["residual"] = inputs["residual"].contiguous()
    inputs["masks"] = soft_masks(3, 4, 3, 5)[:, ::2]
    inputs["weight"] = rand(17, 10, 1, 1).to(dtype).transpose(0, 1)
    inputs["bias"] = rand(20)[::2]
    out, tensors = projection._project_cpp(*inputs.values()), list(inputs.values())[:-1]
    gradients = projection._project_backward_cpp(out, *tensors)
    assert [(g.shape, g.dtype) for g in gradients] == [(x.shape, x.dtype) for x in tensors]
    compare(OP, reference.masked_skip_projection, inputs)


CHANGES = ["five channels", "many products", "contiguous", "fp64", "masks in bf16", "empty"]


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_the_compiled_projection_does_not_take_are_convolved(change, monkeypatch):
    inputs = inputs_of(2, 3, (5 if change == "five channels" else 8, 8, 8))
    if change == "contiguous":
        inputs = {n: x.contiguous() for n, x in inputs.items()}
    elif change == "fp64":
        inputs = {n: x.double() for n, x in inputs.items()}
    elif change == "masks in bf16":
        inputs["masks"] = inputs["masks"].bfloat16()
    elif change == "empty":
        inputs = {n: x if n in ("weight", "bias") else x[:0] for n, x in inputs.items()}
    elif change == "many products":
        monkeypatch.setitem(projection.MAX_PRODUCTS_CPP, FP32, 8 * 8 * (6 + 2) * 15)
    calls = count_calls(monkeypatch)
    got, want = ops.masked_skip_projection(*inputs.values()), reference.masked_skip_projection(*inputs.values())
    assert [name for name, _ in calls] == ["masked_skip_add"]
    torch.testing.assert_close(got, want)
    if change == "many products":
        monkeypatch.setitem(projection.MAX_PRODUCTS_CPP, FP32, 8 * 8 * (6 + 2) * 15 + 1)
        torch.testing.assert_close(ops.masked_skip_projection(*inputs.values()), want)
        assert calls[-1][0] == "masked_skip_projection"
    if change != "many products":  # the op itself runs as PyTorch then
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        got = OP(*leaves)
        torch.testing.assert_close(got, want)
        found = torch.autograd.grad(got.square().sum(), leaves)
        wanted = torch.autograd.grad(reference.masked_skip_projection(*leaves).square().sum(), leaves)
        torch.testing.assert_close(found, wanted)


def test_projection_without_extension_is_convolved(monkeypatch):
    monkeypatch.setattr(projection, "has_extension", lambda device: False)
    calls = count_calls(monkeypatch)
    compare(ops.masked_skip_projection, reference.masked_skip_projection, inputs_of(2, 3, (8, 8, 8)))
    assert [name for name, _ in calls] == ["masked_skip_add"]


@pytest.mark.parametrize("wrong", ["u", "skip", "masks", "weight", "bias", "residual"])
def test_projection_of_shapes_that_do_not_fit_raises_instead_of_reading_beyond_the_end(wrong):
    inputs = inputs_of(2, 3, (16, 16, 16))
    shapes = {
        "u": (5, 16, 3, 5),
        "skip": (2, 16, 3, 4),
        "masks": (2, 3, 2, 5),
        "weight": (16, 24, 1, 1),
        "bias": (8,),
        "residual": (6, 16, 3, 4),
    }
    inputs[wrong] = rand(*shapes[wrong])
    assert projection._project_cpp(*inputs.values()) is None
    with pytest.raises((RuntimeError, ValueError)):
        ops.masked_skip_projection(*inputs.values())


@DTYPES
@KINDS
def test_compiled_projection_on_two_threads_equals_that_on_one(dtype, kind, monkeypatch):
    inputs = inputs_of(5, 2, (24, 16, 40), (9, 15), kind=kind, dtype=dtype)
    results = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        leaves = [x.detach().requires_grad_() for x in inputs.values() if x is not None]
        rest = iter(leaves)
        out = OP(*(None if x is None else next(rest) for x in inputs.values()))
        results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@DTYPES
def test_compiled_projection_with_nan_in_a_pixel_is_nan_in_that_pixel_alone(dtype):
    inputs = inputs_of(2, 2, (8, 9, 10), residual=False, dtype=dtype)
    inputs["skip"][0, 3, 1, 2] = torch.nan
    bad = OP(*inputs.values()).isnan()
    assert bad[:2, :, 1, 2].all() and bad.sum() == 2 * 10
    grad = rand(4, 10, 3, 5, dtype=dtype)
    grad[3, 9, 2, 4] = torch.nan
    inputs["skip"][0, 3, 1, 2] = 0
    d_u, d_skip, d_masks, _, d_bias = projection._project_backward_cpp(grad, *list(inputs.values())[:-1])
    assert d_u[3, :, 2, 4].isnan().all() and d_u.isnan().sum() == 8
    assert d_skip[1, :, 2, 4].isnan().all() and d_skip.isnan().sum() == 9
    assert d_masks[1, 1, 2, 4].isnan() and d_masks.isnan().sum() == 1
    assert d_bias[9].isnan() and d_bias.isnan().sum() == 1


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_projection_under_autocast_has_the_dtype_of_a_convolution(dtype, monkeypatch):
    calls = count_calls(monkeypatch)
    inputs = inputs_of(2, 3, (8, 8, 8), residual=False, dtype=dtype)
    with torch.autocast("cpu", BF16):
        out = ops.masked_skip_projection(*inputs.values())
        assert out.dtype == F.conv2d(inputs["u"], inputs["weight"][:, :8]).dtype == BF16
    assert [name for name, _ in calls] == ["masked_skip_add" if dtype == FP32 else "masked_skip_projection"]
    exact = [None if x is None else x.double() for x in inputs.values()]
    assert_close(out, reference.masked_skip_projection(*exact), size=1.0)


@pytest.mark.parametrize("masked", [True, False])
def test_res_block_adds_its_residual_in_one_call_of_the_op(masked, monkeypatch):
    block = ResBlock(16, 16, 8, skip_channels=16, norm_groups=2).to(memory_format=torch.channels_last)
    calls = count_calls(monkeypatch)
    masks, rows = (soft_masks(2, 3, 4, 4), 6) if masked else (None, 2)
    block(rand(rows, 16, 4, 4), torch.randn(rows, 8), rand(2, 16, 4, 4), masks)
    ((name, (*_, residual)),) = calls
    assert name == "masked_skip_projection" and residual.shape == (rows, 16, 4, 4)


def layouts():
    """Inputs whose gradients must lie as the fake ones, which torch.compile plans with."""
    inputs = inputs_of(2, 3, (9, 8, 10), residual=False)
    yield "contiguous", inputs
    yield "masks by channel", inputs | {"masks": inputs["masks"].contiguous(memory_format=torch.channels_last)}
    yield "expanded masks", inputs | {"masks": inputs["masks"][:1].expand(2, -1, -1, -1)}
    yield "contiguous weight", inputs | {"weight": inputs["weight"].contiguous()}
    yield "transposed weight", inputs | {"weight": rand(17, 10, 1, 1).transpose(0, 1)}
    yield "contiguous features", inputs | {"u": inputs["u"].contiguous()}


LAYOUTS = {name: list(inputs.values()) for name, inputs in layouts()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_projection_have_the_layout_of_the_fake_ones(layout):
    tests = ["test_schema", "test_faketensor"]
    inputs = LAYOUTS[layout]
    torch.library.opcheck(OP, inputs, test_utils=tests)
    backward = torch.ops.factorkit.masked_skip_projection_backward
    torch.library.opcheck(backward, (torch.randn(6, 10, 3, 5), *inputs[:-1]), test_utils=tests)
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    compiled = torch.compile(OP, backend="aot_eager", fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, OP(*leaves))
    wanted = [x for x in leaves if x is not None]
    found = [torch.autograd.grad(out.square().sum(), wanted) for out in (compiled, OP(*leaves))]
    torch.testing.assert_close(*found)
    assert found[1][3].stride() == leaves[3].stride(), "as DDP's buckets have it"


def test_projection_under_vmap_is_convolved():
    u, skip, masks, weight, bias, _ = inputs_of(2, 3, (8, 8, 8)).values()
    together = torch.func.vmap(lambda u: ops.masked_skip_projection(u, skip, masks, weight, bias))(torch.stack([u, -u]))
    alone = torch.stack([ops.masked_skip_projection(x, skip, masks, weight, bias) for x in (u, -u)])
    torch.testing.assert_close(together, alone)


def test_mask_gradient_of_projection_of_infinity_is_that_of_the_reference():
    inputs = inputs_of(1, 2, (8, 8, 10), residual=False)
    inputs["skip"][0, 3, 1, 2] = torch.inf
    grad = torch.ones(2, 10, 3, 5).contiguous(memory_format=torch.channels_last)
    inputs["weight"].abs_()
    d_masks = projection._project_backward_cpp(grad, *list(inputs.values())[:-1])[2]
    assert d_masks[0, :, 1, 2].isposinf().all() and d_masks.isfinite().sum() == d_masks.numel() - 2


@KINDS
def test_second_derivative_of_compiled_projection_matches_reference(kind):
    def penalty(project, inputs):
        tensors = [x for x in inputs if x is not None]
        grads = torch.autograd.grad(project(*inputs).pow(3).mean(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)

    inputs = [None if x is None else x.requires_grad_() for x in inputs_of(2, 2, (17, 8, 9), kind=kind).values()]
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    found, wanted = penalty(ops.masked_skip_projection, inputs), penalty(reference.masked_skip_projection, exact)
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f.double(), w, rtol=1e-4, atol=1e-6)
