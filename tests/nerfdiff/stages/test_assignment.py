from __future__ import annotations

import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog

from factorkit.nerfdiff.stages.assignment import balanced_assignment, sample_assignment, standardise_errors


def test_balanced_assignment_has_the_requested_marginals():
    plan = balanced_assignment(torch.rand(30, 5), 0.3).exp()
    assert torch.allclose(plan.sum(1), torch.ones(30), atol=1e-5)
    assert torch.allclose(plan.sum(0), torch.full((5,), 6.0), atol=1e-2)


def test_balanced_assignment_equal_views_are_shared_equally():
    errors = torch.tensor([0.1, 0.5, 0.9, 1.3]).expand(12, 4)
    assert torch.allclose(balanced_assignment(errors, 0.05).exp().sum(0), torch.full((4,), 3.0), atol=1e-3)
    assert (errors.argmin(1) == 0).all()


@pytest.mark.slow
def test_balanced_assignment_low_temperature_is_the_linear_optimum():
    torch.manual_seed(0)
    for views, candidates in ((8, 8), (12, 4), (15, 5)):
        errors = torch.rand(views, candidates, dtype=torch.float64)
        seats = errors.repeat_interleave(views // candidates, 1)  # a candidate's load, each place a column of its own
        rows, columns = linear_sum_assignment(seats.numpy())
        plan = balanced_assignment(errors, 0.002, rounds=5000).exp()
        assert torch.allclose((plan * errors).sum(), seats[rows, columns].sum(), atol=0.02)
        assert torch.equal(plan.argmax(1), torch.from_numpy(columns) // (views // candidates))


def test_standardise_errors_removes_the_scale_of_a_view():
    errors = torch.rand(6, 9)
    scaled = errors * torch.logspace(-4, 2, 6)[:, None]
    assert torch.allclose(standardise_errors(scaled), standardise_errors(errors), rtol=1e-3)


def test_sample_assignment_follows_the_probabilities():
    plan = torch.tensor([0.1, 0.0, 0.6, 0.3]).log().expand(4000, 4)
    counts = torch.bincount(
        sample_assignment(plan, torch.rand(4000, generator=torch.Generator().manual_seed(0))), minlength=4
    )
    assert counts[1] == 0 and torch.allclose(counts / 4000, torch.tensor([0.1, 0, 0.6, 0.3]), atol=0.03)
    assert sample_assignment(plan[:1], torch.tensor([0.9999999])).item() == 3
    assert sample_assignment(plan[:1], torch.tensor([0.0])).item() == 0


def test_balanced_assignment_uneven_loads_match_the_linear_programme():
    """Seven views to three candidates, each with a load of 7 / 3: no assignment, a transport."""
    torch.manual_seed(1)
    views, candidates = 7, 3
    errors = torch.rand(views, candidates, dtype=torch.float64)
    rows = torch.eye(views, dtype=torch.float64).repeat_interleave(candidates, 1)
    columns = torch.eye(candidates, dtype=torch.float64).repeat(1, views)
    loads = torch.tensor([1.0] * views + [views / candidates] * candidates, dtype=torch.float64)
    best = linprog(errors.flatten().numpy(), A_eq=torch.cat([rows, columns]).numpy(), b_eq=loads.numpy())
    plan = balanced_assignment(errors, 0.003, rounds=5000).exp()
    assert best.status == 0 and torch.allclose(plan, torch.from_numpy(best.x).reshape(views, candidates), atol=0.02)
