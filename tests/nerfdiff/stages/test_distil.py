from __future__ import annotations

import torch

from factorkit.nerfdiff.stages.distil import robust_error


def test_robust_error_pulls_at_small_errors_and_grows_with_the_root_of_large_ones():
    angles = torch.tensor([1e-4, 1e-3, 0.1, 0.2], requires_grad=True)  # radians; their squares are the errors
    loss = robust_error(angles.square())
    slopes = torch.autograd.grad(loss.sum(), angles)[0]
    assert torch.allclose(slopes[:2], 20 * angles[:2], rtol=1e-2), "ten times the slope of the squared error"
    assert 1.9 < loss[3] / loss[2] < 2.4 and slopes[3] < 1.1 * slopes[2]
    assert robust_error(torch.zeros(1)).item() == 0
