"""The frequency encoding against a loop, its gradients of every order, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from factorkit import ops
from factorkit.ops import reference


def problem(points=5, dims=3, bands=4, annealed=True):
    torch.manual_seed(0)
    x = (torch.rand(points, dims, dtype=torch.float64) * 2 - 1).requires_grad_()
    annealing = torch.tensor([1.0, 0.7, 0.0, -0.2], dtype=torch.float64)[:bands].requires_grad_() if annealed else None
    return x, bands, annealing


@pytest.mark.parametrize("annealed", [True, False])
def test_equals_its_definition(annealed):
    x, bands, annealing = problem(annealed=annealed)
    expected = []
    for point in x.tolist():
        row = []
        for value in point:
            for wave in (math.sin, math.cos):
                for k in range(bands):
                    row.append(wave(2**k * math.pi * value) * (annealing[k].item() if annealed else 1))
        expected.append(row)
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(ops.frequency(x, bands, annealing), expected)
    torch.testing.assert_close(reference.frequency(x, bands, annealing), expected)


@pytest.mark.parametrize("annealed", [True, False])
def test_gradcheck_of_first_and_second_order(annealed):
    x, bands, annealing = problem(points=2, annealed=annealed)
    run = lambda *v: torch.ops.factorkit.frequency(v[0], bands, v[1] if annealed else None)  # noqa: E731
    inputs = (x, annealing) if annealed else (x,)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_gradients_for_expanded_and_transposed_upstreams_match_reference():
    x, bands, annealing = problem(points=7)
    outs = [run(x, bands, annealing) for run in (torch.ops.factorkit.frequency, reference.frequency)]
    width = outs[0].shape[1]
    for upstream in (torch.randn(width, 7).double().T, torch.randn(7, 1).double().expand(-1, width)):
        got, want = (torch.autograd.grad(out, (x, annealing), upstream, retain_graph=True) for out in outs)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)


@pytest.mark.slow
@pytest.mark.parametrize("annealed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(annealed, dtype):
    x, bands, annealing = problem(annealed=annealed)
    cast = lambda v: None if v is None else v.detach().to(dtype).requires_grad_()  # noqa: E731
    torch.library.opcheck(torch.ops.factorkit.frequency, (cast(x), bands, cast(annealing)))
    strided = (cast(x)[:, ::2], bands, cast(annealing))
    torch.library.opcheck(torch.ops.factorkit.frequency, strided, test_utils=("test_schema", "test_faketensor"))


def test_frequency_of_no_points_is_empty():
    assert ops.frequency(torch.zeros(0, 3), 4).shape == (0, 24)


def test_wrong_input_is_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"int64 of shape \(2, 3\); frequency takes points"):
        ops.frequency(x.long(), 4)
    with pytest.raises(ValueError, match="give at least 1"):
        ops.frequency(x, 0)
    with pytest.raises(ValueError, match=r"4 bands need \[4\]"):
        ops.frequency(x, 4, torch.ones(3))
    with pytest.raises(ValueError, match="annealing is torch.float64"):
        ops.frequency(x, 4, torch.ones(4).double())
