"""Inverse-CDF resampling: known quantiles, the reference, the distribution that comes out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from factorkit import ops
from factorkit.ops import reference


def batch(counts, dtype=torch.float64):
    """Intervals with gaps, some of zero length, and weights of which many are zero; packed."""
    n = sum(counts)
    lengths = torch.rand(n, dtype=dtype) * (torch.rand(n) > 0.1)
    t_end = (lengths + torch.rand(n, dtype=dtype) * (torch.rand(n) > 0.5)).cumsum(0)
    weights = torch.rand(n, dtype=dtype) * (torch.rand(n) > 0.3)
    offsets = torch.tensor([0, *torch.tensor(counts, dtype=torch.int64).cumsum(0).tolist()])
    return t_end - lengths, t_end, weights, offsets


def test_known_quantiles():
    t_start, t_end = torch.tensor([[0.0, 1, 2, 5]]).double(), torch.tensor([[1.0, 2, 4, 6]]).double()
    even = ops.sample_pdf(t_start, t_end, torch.tensor([[1.0, 1, 2, 0]]).double(), 4)
    assert even.tolist() == [[0, 1, 2, 3, 4]]
    peak = ops.sample_pdf(t_start, t_end, torch.tensor([[0.0, 3, 0, 0]]).double(), 4)
    assert peak.tolist() == [[1, 1.25, 1.5, 1.75, 2]]
    gap = ops.sample_pdf(t_start, t_end, torch.tensor([[0.0, 0, 1, 1]]).double(), 4)
    assert gap.tolist() == [[2, 3, 4, 5.5, 6]]
    for none in (torch.zeros(1, 4), torch.full((1, 4), -1.0)):  # without weight: by length
        assert ops.sample_pdf(t_start, t_end, none.double(), 5).tolist() == [[0, 1, 2, 3, 4, 6]]
    assert ops.sample_pdf(t_start, t_start, torch.ones(1, 4).double(), 2).tolist() == [[0, 1, 5]]
    assert ops.sample_pdf(t_start, t_start, torch.zeros(1, 4).double(), 2).tolist() == [[0, 0, 0]]


def compare(t_start, t_end, weights, offsets, count, seed):
    got = ops.sample_pdf(t_start, t_end, weights, count, offsets, seed=seed)
    want = reference.sample_pdf(t_start, t_end, weights, offsets, count, seed)
    # Where the weights so far are a quantile exactly, it may be either end of a gap: such ones must lie in the gap.
    near = (got - want).abs() < 1e-8
    if not near.all():
        for ray, j in (~near).nonzero().tolist():
            lo, hi = sorted((got[ray, j].item(), want[ray, j].item()))
            own = slice(*offsets[ray : ray + 2].tolist()) if offsets is not None else (ray, slice(None))
            inside = (t_start[own] >= lo - 1e-9) & (t_end[own] <= hi + 1e-9)
            assert weights[own][inside].clamp_min(0).sum() == 0
            assert not ((t_start[own] < lo) & (t_end[own] > lo + 1e-9) & (weights[own] > 0) & (t_end[own] < hi)).any()
    return got


@pytest.mark.parametrize("counts", [[10, 4, 0, 6], [0, 0], [], [1], [64] * 5])
@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize("seed", [None, 0, 2**40 + 1])
def test_packed_and_dense_rays(counts, count, seed):
    torch.manual_seed(0)
    t_start, t_end, weights, offsets = batch(counts)
    torch.use_deterministic_algorithms(True)  # unwritten memory would hold NaN
    edges = compare(t_start, t_end, weights, offsets, count, None if seed is None else torch.tensor(seed))
    torch.use_deterministic_algorithms(False)
    assert edges.shape == (len(counts), count + 1) and edges.isfinite().all() and (edges.diff(dim=1) >= 0).all()
    for ray, samples in enumerate(counts):
        if samples == 0:
            assert (edges[ray] == 0).all()
    if counts and min(counts) == max(counts) > 0:
        dense = [x.reshape(len(counts), counts[0]) for x in (t_start, t_end, weights)]
        assert torch.equal(ops.sample_pdf(*dense, count, seed=seed), edges)
        strided = [x.t().contiguous().t() for x in dense]
        assert torch.equal(ops.sample_pdf(*strided, count, seed=seed), edges)
        compare(*dense, None, count, seed)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 20), st.integers(0, 2**31))
@pytest.mark.slow
def test_any_ragged_batch(counts, count, seed):
    torch.manual_seed(seed)
    compare(*batch(counts), count, seed if seed % 2 else None)


def test_edges_follow_the_weights():
    """Over many seeds the inner edges are spread as the weights are."""
    t = torch.linspace(0, 1, 9)
    weights = torch.tensor([1.0, 0, 3, 2, 0, 0, 1, 1])
    rays = 4000
    given = [x.expand(rays, -1) for x in (t[:-1], t[1:], weights)]
    edges = ops.sample_pdf(*given, 16, seed=5)[:, 1:-1]
    share = torch.histc(edges, 8, 0, 1) / edges.numel()
    # the inner quantiles are uniform on [1/32, 31/32]
    assert (share - weights / 8).abs().max() < 0.03 and (share[weights == 0] < 1e-4).all()
    shift = (edges - ops.sample_pdf(*given, 16)[:, 1:-1]).mean()
    assert abs(shift.item()) < 0.02  # not centred, it would be 0.03


def test_opcheck_thread_counts_and_forced_reference(monkeypatch):
    torch.manual_seed(1)
    t_start, t_end, weights, offsets = batch([5, 0, 300, 2] * 50, torch.float32)
    torch.library.opcheck(torch.ops.factorkit.sample_pdf, (t_start, t_end, weights, offsets, 4, torch.tensor(3)))
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(ops.sample_pdf(t_start, t_end, weights, 9, offsets, seed=3))
    torch.set_num_threads(before)
    assert torch.equal(*found)
    assert not ops.sample_pdf(t_start, t_end, weights.requires_grad_(), 9, offsets).requires_grad
    monkeypatch.setenv("FACTORKIT_REFERENCE", "1")
    monkeypatch.setattr(torch.ops.factorkit, "sample_pdf", None)
    plain = ops.sample_pdf(t_start, t_end, weights, 9, offsets, seed=3)
    assert ((plain - found[0]).abs() < 1e-2).float().mean() > 0.97


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"count": 0}, "count=0"),
        ({"seed": -3}, "seed=-3"),
        ({"t_start": torch.rand(2, 3).half()}, "t_start must be float32"),
        ({"t_start": torch.rand(6)}, r"\[rays, samples\]"),
        ({"t_end": torch.rand(2, 2)}, "t_end must be"),
        ({"weights": torch.rand(2, 3).double()}, "weights is torch.float64"),
        ({"ray_offsets": torch.tensor([0, 6])}, r"\[samples\], packed"),
    ],
)
def test_wrong_input_is_refused(changes, sentence):
    made = dict(t_start=torch.rand(2, 3), t_end=torch.rand(2, 3) + math.e, weights=torch.rand(2, 3), count=3)
    with pytest.raises(ValueError, match=sentence):
        ops.sample_pdf(**{**made, **changes})


def test_wrong_offsets_are_refused():
    x = torch.rand(6)
    with pytest.raises(ValueError, match="never fall"):
        ops.sample_pdf(x, x + 1, x, 2, torch.tensor([0, 5, 3]))


def test_gradient_of_an_op_without_one_is_an_error():
    t_start, t_end = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    weights = torch.ones(1, 2, requires_grad=True)
    edges = torch.ops.factorkit.sample_pdf(t_start, t_end, weights, None, 4, None)
    with pytest.raises(RuntimeError, match="factorkit::sample_pdf has no gradient: detach its inputs"):
        edges.sum().backward()
