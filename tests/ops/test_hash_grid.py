"""The hash grid against a loop over vertices, its gradients of first and second order, and what it refuses."""

from __future__ import annotations

import math
import sys
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from factorkit import ops
from factorkit.ops import dispatch, encodings, reference

RESOLUTIONS = [1, 3, 6, 40]  # with 64 rows: dense and hashed levels in 2, 3 and 4 dimensions


@pytest.fixture(autouse=True)
def fill_memory_with_nan():
    """torch fills what it allocates without a value with NaN, so that an unwritten element shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(dims, features=2, points=37, dtype=torch.float64, rows=64, seed=0):
    """Points in and out of the cube and on its faces, a table, weights of which one is zero."""
    torch.manual_seed(seed)
    x = torch.rand(points, dims, dtype=dtype) * 1.4 - 0.2
    if points > 4:
        x[0], x[1], x[2, 0], x[3, -1] = 0, 1, 1, 1 / 3
    table = torch.randn(len(RESOLUTIONS), rows, features, dtype=dtype)
    weights = torch.tensor([1.0, -0.5, 0.0, 2.0], dtype=dtype)
    return x.requires_grad_(), table.requires_grad_(), weights.requires_grad_()


def hash_grid_by_loops(x, table, weights, resolutions, quintic):
    """The definition, one vertex at a time, in Python's own numbers."""
    levels, rows, features = table.shape
    out = torch.zeros(len(x), levels, features, dtype=x.dtype)
    for n, point in enumerate(x.tolist()):
        for level, resolution in enumerate(resolutions):
            cells, shares = [], []
            for value in point:
                position = min(max(value, 0.0), 1.0) * resolution
                cell = min(math.floor(position), resolution - 1)
                t = position - cell
                cells.append(cell)
                shares.append(6 * t**5 - 15 * t**4 + 10 * t**3 if quintic else t)
            for corner in product((0, 1), repeat=len(point)):
                vertex = [c + up for c, up in zip(cells, corner, strict=True)]
                share = math.prod(s if up else 1 - s for s, up in zip(shares, corner, strict=True))
                if (resolution + 1) ** len(point) <= rows:
                    row = sum(v * (resolution + 1) ** d for d, v in enumerate(vertex))
                else:
                    row = 0
                    for v, prime in zip(vertex, (1, 2654435761, 805459861, 3674653429), strict=False):
                        row ^= v * prime % 2**32
                    row %= rows
                out[n, level] += weights[level] * share * table[level, row]
    return out.flatten(1)


@pytest.mark.parametrize("dims", [2, 3, 4])
@pytest.mark.parametrize("quintic", [False, True])
def test_equals_its_definition(dims, quintic):
    x, table, weights = problem(dims)
    interpolation = "quintic" if quintic else "linear"
    with torch.no_grad():
        expected = hash_grid_by_loops(x, table, weights, RESOLUTIONS, quintic)
        torch.testing.assert_close(reference.hash_grid(x, table, weights, RESOLUTIONS, quintic), expected)
        got = ops.hash_grid(x, table, RESOLUTIONS, weights, interpolation=interpolation)
        torch.testing.assert_close(got, expected)
        plain = hash_grid_by_loops(x, table, torch.ones(4, dtype=x.dtype), RESOLUTIONS, quintic)
        torch.testing.assert_close(ops.hash_grid(x, table, RESOLUTIONS, interpolation=interpolation), plain)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # of a loaded machine
@given(
    dims=st.sampled_from([2, 3, 4]),
    features=st.sampled_from([1, 2, 4, 8]),
    points=st.sampled_from([0, 1, 63, 64, 65, 2049]),
    threads=st.sampled_from([1, 2, 7]),
    quintic=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_compiled_hash_grid_matches_reference(dims, features, points, threads, quintic, dtype, seed):
    """Values and all gradients, around the sizes of blocks and chunks, with fewer and more threads than levels."""
    given_ = problem(dims, features, points, dtype, seed=seed)
    exact = [v.detach().double().requires_grad_() for v in given_]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        got = torch.ops.factorkit.hash_grid(*given_, RESOLUTIONS, quintic)
        want = reference.hash_grid(*exact, RESOLUTIONS, quintic)
        close(got, want)
        upstreams = [torch.randn_like(got), torch.randn(got.shape[1], 1, dtype=dtype).expand(-1, points).T]
        for upstream in (*upstreams, torch.ones((), dtype=dtype).expand_as(got)):
            found = torch.autograd.grad(got, given_, upstream, retain_graph=True)
            wanted = torch.autograd.grad(want, exact, upstream.double(), retain_graph=True)
            for f, w, scale in zip(found, wanted, [max(RESOLUTIONS), 1, 1], strict=True):
                close(f, w, scale)


def close(got, want, scale=1):
    """Every element to within rounding of the largest one, or of summands of this size where the sum nearly cancels."""
    assert got.shape == want.shape and not got.isnan().any()
    if got.numel():
        error = (got.double() - want).abs().max() / want.abs().max().clamp(min=scale)
        assert error < (3e-5 if got.dtype == torch.float32 else 1e-12), error


def test_hash_grid_equal_for_any_thread_count(monkeypatch):
    x, table, weights = problem(3, points=5000, dtype=torch.float32)
    upstream = torch.randn(5000, 8)

    def gradients(threads):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        out = torch.ops.factorkit.hash_grid(x, table, weights, RESOLUTIONS, True)
        return out, *torch.autograd.grad(out, (x, table), upstream)

    first = gradients(1)
    for threads in (2, 3, 4, 9):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(threads), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("dims", "features", "quintic"), [(2, 2, False), (3, 1, True), (4, 1, False)])
def test_gradcheck_of_first_and_second_order(dims, features, quintic):
    x, table, weights = problem(dims, features, points=2, rows=8)
    x = (x.detach() * 0.6 + 0.21).requires_grad_()  # away from the cells' faces, where the linear form has kinks
    run = lambda *v: torch.ops.factorkit.hash_grid(*v, RESOLUTIONS, quintic)  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, table, weights))
    assert torch.autograd.gradgradcheck(run, (x, table, weights))


def test_gradient_of_a_normal_reaches_the_table():
    """The eikonal loss of a field: through d out / d x, then by the table, against the reference's double backward."""
    x, table, weights = problem(3)
    losses = []
    for run in (torch.ops.factorkit.hash_grid, reference.hash_grid):
        out = run(x, table, weights, RESOLUTIONS, True)
        (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        losses.append(torch.autograd.grad((slope.square().sum(1) - 1).square().sum(), (x, table, weights)))
    for got, want in zip(*losses, strict=True):
        close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_opcheck(dims, dtype):
    x, table, weights = (v.detach().to(dtype).requires_grad_() for v in problem(dims))
    x = x.detach().T.contiguous().T.requires_grad_()  # not contiguous
    torch.library.opcheck(torch.ops.factorkit.hash_grid, (x, table, weights, RESOLUTIONS, True))
    torch.library.opcheck(torch.ops.factorkit.hash_grid, (x[:0].detach(), table, weights, RESOLUTIONS, False))


def test_only_needed_gradients_are_computed(monkeypatch):
    x, table, weights = problem(3)
    asked = []

    def spy(name, like, *arguments):
        if name == "hash_grid_backward":
            asked.append([gradient is not None for gradient in arguments[-1][1:]])
        dispatch.call_extension(name, like, *arguments)

    monkeypatch.setattr(encodings, "call_extension", spy)
    torch.ops.factorkit.hash_grid(x, table.detach(), weights.detach(), RESOLUTIONS, False).sum().backward()
    torch.ops.factorkit.hash_grid(x.detach(), table, weights.detach(), RESOLUTIONS, False).sum().backward()
    assert asked == [[True, False], [False, True]]


def test_nan_point_affects_no_other_point():
    x, table, _ = problem(3)
    x = x.detach().clone()
    x[5, 1] = math.nan
    out = ops.hash_grid(x, table, RESOLUTIONS)
    assert out[5].isnan().all() and not out[torch.arange(37) != 5].isnan().any()
    assert reference.hash_grid(x, table, torch.ones(4, dtype=x.dtype), RESOLUTIONS, False)[5].isnan().all()


def test_missing_module_warns_once_and_falls_back(monkeypatch):
    x, table, _ = problem(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "factorkit._C", None)
        patch.delattr("factorkit._C", raising=False)
        module, missing = dispatch.import_extension()
    assert module is None and set(missing) == {"cpu", "cuda"}
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "MISSING_KERNELS", missing)
        with pytest.warns(UserWarning, match="factorkit._C cannot be imported.*factorkit doctor") as caught:
            first, second = (ops.hash_grid(x, table, RESOLUTIONS) for _ in range(2))
        assert len(caught) == 1
    torch.testing.assert_close(first, ops.hash_grid(x, table, RESOLUTIONS))
    assert torch.equal(first, second)


def test_growing_resolutions_and_annealing():
    assert ops.growing_resolutions(16, 512, 6) == [16, 32, 64, 128, 256, 512]
    assert ops.growing_resolutions(8, 99, 1) == [8]
    assert ops.annealing_weights(4, 0.0).tolist() == [0] * 4 and ops.annealing_weights(4, 1.0).tolist() == [1] * 4
    torch.testing.assert_close(ops.annealing_weights(4, 0.375), torch.tensor([1, 0.5, 0, 0]))


def test_reference_can_be_forced(monkeypatch):
    x, table, _ = problem(2)
    expected = ops.hash_grid(x, table, RESOLUTIONS)
    monkeypatch.setattr(encodings, "call_extension", None)
    monkeypatch.setenv("FACTORKIT_REFERENCE", "1")
    torch.testing.assert_close(ops.hash_grid(x, table, RESOLUTIONS), expected)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": torch.zeros(3, 5)}, r"\(3, 5\); hash_grid takes points \[N, D\] with D = 2, 3 or 4"),
        ({"x": torch.zeros(3, 2).half()}, "float16; hash_grid computes in float32 or float64"),
        ({"x": torch.zeros(3, 2).double()}, "table is torch.float32 on cpu, but x is torch.float64"),
        ({"table": torch.zeros(4, 63, 2)}, "63 rows a level; give a power of two"),
        ({"table": torch.zeros(3, 64, 2)}, r"4 resolutions need \[4, T, F\]"),
        ({"table": torch.zeros(4, 64, 3)}, r"F in \(1, 2, 4, 8\)"),
        ({"resolutions": [1, 2, 0, 4]}, "each 1 to"),
        ({"resolutions": []}, "give 1 to 32 numbers"),
        ({"level_weights": torch.ones(3)}, r"level_weights has shape \(3,\); 4 resolutions"),
        ({"level_weights": torch.ones(4, device="meta")}, "level_weights is torch.float32 on meta"),
        ({"interpolation": "cubic"}, "choose one of linear, quintic"),
    ],
)
def test_wrong_input_is_refused(change, sentence):
    good = {"x": torch.zeros(3, 2), "table": torch.zeros(4, 64, 2), "resolutions": RESOLUTIONS}
    with pytest.raises(ValueError, match=sentence):
        ops.hash_grid(**(good | change))


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_on_a_side_stream_matches_reference(dims, dtype):
    if not (torch.cuda.is_available() and dispatch.has_extension("cuda")):
        pytest.skip("needs a CUDA device and factorkit._C built with CUDA")
    torch.use_deterministic_algorithms(False)  # which would choose the reference
    given_ = [v.detach().cuda().requires_grad_() for v in problem(dims, points=1000, dtype=dtype)]
    exact = [v.detach().cpu().double().requires_grad_() for v in given_]
    upstream = torch.randn(1000, 8, dtype=dtype)
    with torch.cuda.stream(torch.cuda.Stream()):
        out = torch.ops.factorkit.hash_grid(*given_, RESOLUTIONS, True)
        found = torch.autograd.grad(out, given_, upstream.cuda())
    torch.cuda.synchronize()
    want = reference.hash_grid(*exact, RESOLUTIONS, True)
    close(out.cpu(), want)
    for f, w in zip(found, torch.autograd.grad(want, exact, upstream.double()), strict=True):
        close(f.cpu(), w)
