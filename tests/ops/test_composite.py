"""Compositing: against loops written from the equations, closed forms, the reference's gradients, and fp64 for
accuracy."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from factorkit import ops
from factorkit.ops import reference

RAGGED = ([10, 4, 0, 6], [0, 0, 0], [1], [], [0, 33, 64, 1, 200, 31], [3] * 40)


def batch(counts, channels, dtype=torch.float64, tail=0, dense=False, background="shared"):
    """Leaves (sigma, rgb, t_start, t_end), offsets or None, background; intervals touch, some have zero length."""
    n = sum(counts) + tail
    lengths = torch.rand(n, dtype=torch.float64) * (torch.rand(n) > 0.15)
    gaps = torch.rand(n, dtype=torch.float64) * (torch.rand(n) > 0.6)
    end = torch.cat([(lengths + gaps)[a : a + k].cumsum(0) for a, k in spans(counts, tail)] or [lengths])
    t_start, t_end = 0.5 + end - lengths, 0.5 + end
    sigma = torch.rand(n, dtype=torch.float64) * 3 * (torch.rand(n) > 0.2)
    rgb = torch.randn(n, channels, dtype=torch.float64)
    leaves = [sigma, rgb, t_start, t_end]
    if dense:
        leaves = [x.reshape(len(counts), counts[0], *x.shape[1:]) for x in leaves]
    leaves = [x.to(dtype).requires_grad_() for x in leaves]
    offsets = None if dense else torch.tensor([0, *torch.tensor(counts, dtype=torch.int64).cumsum(0).tolist()])
    shape = {"shared": (channels,), "each": (len(counts), channels), None: None}[background]
    return leaves, offsets, None if shape is None else torch.rand(shape, dtype=dtype).requires_grad_()


def spans(counts, tail):
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    return list(zip(starts, [*counts, tail], strict=True))


def by_loops(sigma, rgb, t_start, t_end, counts, background, early_stop):
    """The definition, one ray, sample and pair at a time; plain floats but for the colours."""
    rows, weights = [], []
    for r, (at, count) in enumerate(spans(counts, 0)[:-1]):
        depth_before, w = 0.0, []
        for i in range(at, at + count):
            tau = sigma[i].item() * (t_end[i] - t_start[i]).item()
            through = math.exp(-depth_before)
            if early_stop > 0 and through < early_stop:
                w.append(0.0)
                continue
            w.append(through * (1 - math.exp(-tau)))
            depth_before += tau
        middle = [((t_start[i] + t_end[i]) / 2).item() for i in range(at, at + count)]
        color = sum((wi * rgb[at + i] for i, wi in enumerate(w)), torch.zeros(rgb.shape[1], dtype=rgb.dtype))
        if background is not None:
            color = color + math.exp(-depth_before) * (background if background.dim() == 1 else background[r])
        pairs = sum(a * b * abs(m - n) for a, m in zip(w, middle, strict=True) for b, n in zip(w, middle, strict=True))
        own = sum(a * a * (t_end[at + i] - t_start[at + i]).item() for i, a in enumerate(w)) / 3
        rows.append(
            (color, sum(a * m for a, m in zip(w, middle, strict=True)), 1 - math.exp(-depth_before), pairs + own)
        )
        weights += w
    color, *rest = zip(*rows, strict=True)
    return torch.stack(color), *(torch.tensor(x, dtype=rgb.dtype) for x in (rest[0], rest[1], weights, rest[2]))


@pytest.mark.parametrize("counts", [[10, 4, 0, 6], [1], [2, 40]])
@pytest.mark.parametrize("early_stop", [0.0, 0.2])
@pytest.mark.parametrize("background", ["shared", "each", None])
def test_composite_equals_its_definition(counts, early_stop, background):
    torch.manual_seed(0)
    leaves, offsets, behind = batch(counts, 3, background=background)
    with torch.no_grad():
        expected = by_loops(*leaves, counts, behind, early_stop)
        torch.testing.assert_close(reference.composite(*leaves, offsets, behind, early_stop), expected)
        got = ops.composite(*leaves, offsets, background=behind, early_stop=early_stop, weights=True, distortion=True)
        torch.testing.assert_close(tuple(got), expected)


def make_upstream_gradients(outputs, kind):
    if kind == "random":
        return [torch.randn_like(x) for x in outputs]
    if kind == "expanded":
        return [torch.randn((), dtype=x.dtype).expand_as(x) for x in outputs]
    return [torch.randn(*x.shape, 2, dtype=x.dtype)[..., 0] for x in outputs]  # strided


def compare(leaves, offsets, behind, early_stop, kind="random"):
    """Outputs and gradients of the op and of the reference, from all outputs together."""
    wanted = [*leaves, *([] if behind is None else [behind])]
    got = ops.composite(*leaves, offsets, background=behind, early_stop=early_stop, weights=True, distortion=True)
    want = reference.composite(*leaves, offsets, behind, early_stop)
    torch.testing.assert_close(tuple(got), want, rtol=1e-9, atol=1e-12)
    grads = make_upstream_gradients(want, kind)
    torch.testing.assert_close(
        torch.autograd.grad(got, wanted, grads, allow_unused=True),
        tuple(
            torch.zeros_like(x) if g is None else g
            for x, g in zip(wanted, torch.autograd.grad(want, wanted, grads, allow_unused=True), strict=True)
        ),
        rtol=1e-8,
        atol=1e-10,
    )


@pytest.fixture
def fill_memory_with_nan():
    """Fresh memory holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("counts", RAGGED)
@pytest.mark.parametrize("kind", ["random", "expanded", "strided"])
@pytest.mark.parametrize("early_stop", [0.0, 0.3])
def test_packed_gradients_match_reference(fill_memory_with_nan, counts, kind, early_stop):
    torch.manual_seed(1)
    leaves, offsets, behind = batch(counts, 3, tail=7)
    compare(leaves, offsets, behind, early_stop, kind)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8, 17, 32])
@pytest.mark.parametrize("background", ["shared", "each", None])
def test_composite_channels_and_backgrounds_match_reference(fill_memory_with_nan, channels, background):
    torch.manual_seed(2)
    leaves, offsets, behind = batch([9, 0, 70], channels, background=background)
    compare(leaves, offsets, behind, 0.0)


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (0, 4), (4, 0), (2, 130)])
def test_composite_dense_rays_match_packed_rays(fill_memory_with_nan, shape):
    torch.manual_seed(3)
    leaves, _, behind = batch([shape[1]] * shape[0], 3, dense=shape[0] > 0)
    if shape[0] == 0:
        leaves = [x.detach().new_empty(0, 4, *x.shape[1:]).requires_grad_() for x in leaves]
    compare(leaves, None, behind, 0.0)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(1, 6), st.integers(0, 5), st.integers(0, 2**31)
)
@pytest.mark.slow
def test_any_ragged_batch(counts, channels, tail, seed):
    torch.manual_seed(seed)
    leaves, offsets, behind = batch(counts, channels, tail=tail)
    compare(leaves, offsets, behind, [0.0, 0.1, 0.7][seed % 3])


def test_inputs_need_not_be_contiguous():
    torch.manual_seed(4)
    (sigma, rgb, t_start, t_end), _, behind = batch([6] * 5, 3, dense=True)
    strided = [
        sigma.detach().t().contiguous().t().requires_grad_(),
        rgb.detach().transpose(0, 2).contiguous().transpose(0, 2),
    ]
    assert not strided[0].is_contiguous()
    compare([strided[0], strided[1].requires_grad_(), t_start, t_end], None, behind, 0.0)
    grown = sigma.detach()[:1].expand(5, 6).requires_grad_()
    compare([grown, rgb, t_start, t_end], None, behind.detach()[:1].expand(3).requires_grad_(), 0.0)


@pytest.mark.parametrize("packed", [True, False])
def test_gradcheck(packed):
    torch.manual_seed(5)
    leaves, offsets, behind = batch([4, 4, 4] if not packed else [3, 0, 5], 2, dense=not packed)
    leaves[0].data.clamp_(min=0.1)
    run = lambda *x: ops.composite(*x[:4], offsets, background=x[4], weights=True, distortion=True)  # noqa: E731
    assert torch.autograd.gradcheck(run, (*leaves, behind))
    assert torch.autograd.gradcheck(lambda *x: reference.composite(*x[:4], offsets, x[4], 0.0), (*leaves, behind))


@pytest.mark.parametrize("extras", [True, False])
@pytest.mark.slow
def test_opcheck(extras):
    torch.manual_seed(6)
    leaves, offsets, behind = batch([3, 0, 5], 3, torch.float32)
    torch.library.opcheck(torch.ops.factorkit.composite, (*leaves, offsets, behind, 0.1, extras, extras))
    dense, _, _ = batch([4, 4], 3, torch.float32, dense=True)
    torch.library.opcheck(torch.ops.factorkit.composite, (*dense, None, None, 0.0, extras, extras))


def test_unused_outputs_and_inputs_without_gradient():
    torch.manual_seed(7)
    leaves, offsets, behind = batch([5, 2], 3)
    for index in range(5):
        out = ops.composite(*leaves, offsets, background=behind, weights=True, distortion=True)[index]
        want = reference.composite(*leaves, offsets, behind, 0.0)[index]
        g = torch.randn_like(out)
        got = torch.autograd.grad(out, [*leaves, behind], g)
        expected = torch.autograd.grad(want, [*leaves, behind], g, allow_unused=True)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)
    sigma = leaves[0]
    out = ops.composite(sigma, *(x.detach() for x in leaves[1:]), offsets)
    assert out.weights is None and out.distortion is None
    (grad,) = torch.autograd.grad(out.color.sum(), [sigma])
    torch.testing.assert_close(
        grad, torch.autograd.grad(reference.composite(*leaves, offsets, None, 0.0)[0].sum(), sigma)[0]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_fp32(dtype):
    torch.manual_seed(8)
    leaves, offsets, behind = batch([60, 0, 100], 3, torch.float32)
    half = [x.detach().to(dtype).requires_grad_() for x in leaves[:2]] + leaves[2:]
    exact = [x.detach().double().requires_grad_() for x in half]
    out = ops.composite(*half, offsets, background=behind, weights=True)
    want = reference.composite(*exact, offsets, behind.double(), 0.0)
    assert out.color.dtype == torch.float32
    for got, expected in zip(out[:4], want[:4], strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)
    g = torch.randn_like(out.color)
    got = torch.autograd.grad(out.color, half, g)
    expected = torch.autograd.grad(want[0], exact, g.double())
    eps = torch.finfo(dtype).eps
    assert [x.dtype for x in got] == [dtype, dtype, torch.float32, torch.float32]
    for a, b, tolerance in zip(got, expected, (eps, eps, 1e-5, 1e-5), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * 0.1)


def test_gradients_in_the_far_half_keep_their_digits():
    """192 samples in fp32 against fp64 on the same inputs: the far half is where final-minus-prefix forms lose them."""
    torch.manual_seed(9)
    n, s = 256, 192
    edges = torch.rand(n, s + 1).cumsum(1) * (4 / s) + 2
    t = [edges[:, :-1].contiguous(), edges[:, 1:].contiguous()]
    leaves = [
        (torch.rand(n, s) * 4).requires_grad_(),
        torch.rand(n, s, 3).requires_grad_(),
        *(x.requires_grad_() for x in t),
    ]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    out = ops.composite(*leaves, weights=True)[:4]
    want = reference.composite(*exact, None, None, 0.0)[:4]
    grads = [torch.randn_like(x) for x in out]
    got = torch.autograd.grad(out, leaves, grads)
    expected = torch.autograd.grad(want, exact, [g.double() for g in grads])
    for a, b in zip(got, expected, strict=True):
        error = ((a.double() - b).abs() / b.abs())[:, s // 2 :].flatten()
        assert error.median() <= 1e-6 and error.quantile(0.99) <= 1e-4, (error.median(), error.quantile(0.99))


def test_closed_forms():
    edges = torch.linspace(1, 3, 65, dtype=torch.float64).expand(1, -1)
    t = edges[:, :-1], edges[:, 1:]
    ones = torch.ones(1, 64, dtype=torch.float64)
    constant = ops.composite(0.7 * ones, 2 * ones[..., None], *t, background=torch.tensor([5.0]))
    passed = math.exp(-0.7 * 2)
    assert constant.opacity.item() == pytest.approx(1 - passed, rel=1e-14)
    assert constant.color.item() == pytest.approx(2 * (1 - passed) + 5 * passed, rel=1e-14)
    fine = torch.linspace(1, 3, 4097, dtype=torch.float64).expand(1, -1)
    middle = (fine[:, 1:] + fine[:, :-1]) / 2
    fading = ops.composite(torch.exp(-middle), torch.ones(1, 4096, 1).double(), fine[:, :-1], fine[:, 1:])
    assert fading.opacity.item() == pytest.approx(1 - math.exp(math.exp(-3) - math.exp(-1)), rel=1e-6)  # density e^-t
    # exactly: integral of t 0.7 e^{-0.7 (t - 1)} from 1 to 3
    expected = 1 + 1 / 0.7 - passed * (3 + 1 / 0.7)
    thin = ops.composite(
        torch.full((1, 4096), 0.7).double(), torch.ones(1, 4096, 1).double(), fine[:, :-1], fine[:, 1:]
    )
    assert thin.depth.item() == pytest.approx(expected, rel=1e-6)
    wall = ops.composite(1e30 * (edges[:, :-1] >= 2), edges[:, :-1, None], *t, weights=True, distortion=True)
    assert wall.opacity.item() == 1 and wall.depth.item() == 2 + 1 / 64 and wall.color.item() == 2
    assert wall.weights.argmax() == 32 and wall.distortion.item() == pytest.approx(1 / 96, rel=1e-12)
    nothing = ops.composite(0 * ones, ones[..., None], *t, background=torch.tensor([0.25]))
    assert nothing.opacity.item() == nothing.depth.item() == 0 and nothing.color.item() == 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.0, 1e-30, 50.0, 1e6, 1e38, math.inf])
def test_extreme_densities_give_finite_gradients(dtype, density):
    torch.manual_seed(10)
    leaves, offsets, behind = batch([10, 4, 0, 6], 3, dtype)
    leaves[0].data[leaves[0].data > 1] = density
    out = ops.composite(*leaves, offsets, background=behind, weights=True, distortion=True)
    grads = torch.autograd.grad(out, [*leaves, behind], [torch.randn_like(x) for x in out])
    assert all(x.isfinite().all() for x in (*out, *grads))
    assert (out.opacity >= 0).all() and (out.opacity <= 1).all()
    assert out.weights.sum().item() == pytest.approx(out.opacity.sum().item(), rel=1e-5)


def test_small_densities_keep_their_digits():
    """Opacity of a thin gas is its optical depth, to the last digits of fp32."""
    sigma = torch.full((1, 8), 1e-6)
    edges = torch.arange(9.0)[None]
    out = ops.composite(sigma, torch.ones(1, 8, 1), edges[:, :-1], edges[:, 1:], weights=True)
    assert out.opacity.item() == pytest.approx(-math.expm1(-8e-6), rel=3e-7)
    torch.testing.assert_close(out.weights, torch.full((1, 8), 1e-6), rtol=1e-5, atol=0)


def test_early_stop_skips_the_same_samples_forward_and_backward():
    torch.manual_seed(11)
    leaves, _, behind = batch([80] * 6, 3, dense=True)
    out = ops.composite(*leaves, background=behind, early_stop=0.05, weights=True)
    used = (out.weights != 0).long().cumsum(1).argmax(1) + 1
    assert (used < 80).all()
    grads = torch.autograd.grad(out.color.square().sum() + out.depth.sum(), leaves)
    for ray, k in enumerate(used.tolist()):
        cut = [x.detach()[ray : ray + 1, :k].clone().requires_grad_() for x in leaves]
        alone = ops.composite(*cut, background=behind)
        torch.testing.assert_close(alone.color[0], out.color[ray])
        expected = torch.autograd.grad(alone.color.square().sum() + alone.depth.sum(), cut)
        for whole, part in zip(grads, expected, strict=True):
            torch.testing.assert_close(whole[ray, :k], part[0])
            assert (whole[ray, k:] == 0).all()


@pytest.mark.slow
def test_composite_million_rays_equal_for_any_thread_count():
    torch.manual_seed(12)
    counts = torch.randint(0, 4, (1_000_000,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    m = int(offsets[-1])
    t_start = torch.rand(m)
    given = [torch.rand(m), torch.rand(m, 1), t_start, t_start + 0.1]
    sigma = given[0].requires_grad_()
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        out = ops.composite(*given, offsets)
        results.append((out.color, out.depth, *torch.autograd.grad(out.color.sum(), sigma)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    want = reference.composite(*(x.detach().double() for x in given), offsets, None, 0.0)
    torch.testing.assert_close(results[0][0].double(), want[0], rtol=1e-5, atol=1e-6)


def test_reference_can_be_forced(monkeypatch):
    torch.manual_seed(13)
    leaves, offsets, behind = batch([3, 2], 3)
    want = ops.composite(*leaves, offsets, background=behind, weights=True, distortion=True)
    monkeypatch.setenv("FACTORKIT_REFERENCE", "1")
    monkeypatch.setattr(torch.ops.factorkit, "composite", None)
    got = ops.composite(*leaves, offsets, background=behind, weights=True, distortion=True)
    torch.testing.assert_close(tuple(got), tuple(want))


@pytest.mark.slow
@pytest.mark.filterwarnings("error", "ignore:Guards may run slower on Python 3.13.0")  # that one is torch's of Python
def test_compiles_into_one_graph():
    torch.manual_seed(14)
    leaves, offsets, behind = batch([3, 0, 5], 3)
    run = lambda *x: ops.composite(*x[:4], offsets, background=x[4], distortion=True)  # noqa: E731
    outs = [f(*leaves, behind) for f in (run, torch.compile(run, fullgraph=True, backend="aot_eager"))]
    outs = [[x for x in out if x is not None] for out in outs]
    grads = [torch.randn_like(x) for x in outs[0]]
    got = [(*out, *torch.autograd.grad(out, (*leaves, behind), grads)) for out in outs]
    torch.testing.assert_close(*got)


def make_invalid_inputs(**changes):
    made = dict(sigma=torch.rand(6), rgb=torch.rand(6, 3), t_start=torch.rand(6), t_end=torch.rand(6) + 1)
    return {**made, "ray_offsets": torch.tensor([0, 2, 6]), **changes}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sigma": torch.ones(6, dtype=torch.int32)}, "sigma must be float32"),
        ({"sigma": torch.rand(2, 3)}, r"sigma must be \[samples\]"),
        ({"ray_offsets": None}, r"sigma must be \[rays, samples\]"),
        ({"rgb": torch.rand(5, 3)}, "rgb must be sigma's"),
        ({"rgb": torch.rand(6, 33)}, "1 to 32 channels"),
        ({"rgb": torch.rand(6, 0)}, "1 to 32 channels"),
        ({"t_end": torch.rand(5)}, "t_end must be shaped like sigma"),
        ({"t_end": torch.rand(6).double()}, "t_end is torch.float64"),
        ({"t_end": torch.rand(6, device="meta")}, "t_end is on meta"),
        ({"ray_offsets": torch.tensor([0, 4, 2])}, "never fall"),
        ({"ray_offsets": torch.tensor([0, 4, 7])}, "end at 6 or before"),
        ({"ray_offsets": torch.tensor([1, 4, 6])}, "start at 0"),
        ({"ray_offsets": torch.tensor([0, -4, 6])}, "never fall"),
        ({"ray_offsets": torch.tensor([0, 4, 6], dtype=torch.int32)}, "must be int64"),
        ({"early_stop": 1.0}, "early_stop=1.0"),
        ({"early_stop": -0.1}, "early_stop=-0.1"),
        ({"background": torch.rand(4)}, "background must be"),
    ],
)
def test_wrong_input_is_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        ops.composite(**make_invalid_inputs(**changes))
