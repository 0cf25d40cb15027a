"""Second derivatives of every op that has a hand-written backward pass, against finite differences in fp64."""

from __future__ import annotations

import pytest
import torch

from factorkit import ops
from factorkit.ops.dispatch import OPS


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def positive(*shape):
    return (torch.rand(*shape, dtype=torch.float64) + 0.2).requires_grad_()


def masks(b, k, h, w):
    return torch.randn(b, k, h, w, dtype=torch.float64).softmax(1).requires_grad_()


def edges(rays, samples):
    """t_start and t_end of touching intervals."""
    at = torch.cat([torch.rand(rays, 1), 0.1 + torch.rand(rays, samples)], dim=1).double().cumsum(1)
    return at[:, :-1].clone().requires_grad_(), at[:, 1:].clone().requires_grad_()


def composite_dense():
    start, end = edges(2, 3)

    def run(sigma, rgb, start, end, background):
        return ops.composite(sigma, rgb, start, end, background=background, weights=True, distortion=True)[:5]

    return run, (positive(2, 3), leaf(2, 3, 2), start, end, leaf(2))


def composite_packed():
    start, end = (x.detach().flatten().requires_grad_() for x in edges(2, 3))
    offsets = torch.tensor([0, 2, 2, 5])  # a ray without samples; the last sample belongs to none

    def run(sigma, rgb, start, end):
        return ops.composite(sigma, rgb, start, end, offsets, early_stop=0.1, weights=True)[:4]

    return run, (positive(6), leaf(6, 1), start, end)


def intersect():
    origins, directions = leaf(6, 3), leaf(6, 3)
    return lambda o, d: ops.intersect_box(o, d, [-1, -2, 0.5], [1, 1, 2]), (origins, directions)


def norm(kind):
    def run(x, weight, bias, scale, shift, m, input_bias):
        options = {"groups": 2, "norm": kind, "masks": m, "input_bias": input_bias}
        return ops.group_norm_silu(x, weight, bias, scale, shift, **options)

    return run, (leaf(2, 4, 2, 2), leaf(4), leaf(4), leaf(2, 4), leaf(2, 4), masks(1, 2, 2, 2), leaf(4))


def skip_norm():
    def run(u, skip, m, weight, bias):
        return ops.masked_skip_norm_silu(u, skip, m, weight, bias, groups=2, norm="masked_group")

    return run, (leaf(1, 2, 2, 2), leaf(1, 2, 2, 2), masks(1, 2, 2, 2), leaf(4), leaf(4))


def norm_and_inputs():
    def run(u, skip, m, weight, bias):
        out, u, skip = ops.norm_silu_with_inputs(u, skip, m, weight, bias, groups=2)
        return out, u.square(), skip.square()

    return run, skip_norm()[1]


def projection():
    return leaf(1, 2, 2, 2), leaf(1, 3, 2, 2), masks(1, 2, 2, 2), leaf(2, 5, 1, 1), leaf(2), leaf(2, 2, 2, 2)


def encoding():
    resolutions = [2, 3]

    def run(x, table, weights):
        return ops.hash_grid(x, table, resolutions, weights, interpolation="quintic")

    return run, ((torch.rand(3, 2).double() * 0.9 + 0.05).requires_grad_(), leaf(2, 8, 2), leaf(2))


CASES = {
    "composite, dense": ("composite", composite_dense),
    "composite, packed": ("composite", composite_packed),
    "intersect_box": ("intersect_box", intersect),
    "norm_silu, group": ("norm_silu", lambda: norm("group")),
    "norm_silu, masked_group": ("norm_silu", lambda: norm("masked_group")),
    "norm_silu, pixel": ("norm_silu", lambda: norm("pixel")),
    "norm_silu, skip": ("norm_silu", skip_norm),
    "norm_silu, with inputs": ("norm_silu", norm_and_inputs),
    "masked_skip_add": ("masked_skip_add", lambda: (ops.masked_skip_projection, projection())),
    "projection": ("masked_skip_projection", lambda: (torch.ops.factorkit.masked_skip_projection, projection())),
    "mask_pyramid": ("mask_pyramid", lambda: (lambda m: ops.mask_pyramid(m, 2)[1:], (masks(1, 2, 4, 4),))),
    "region_pool": ("region_pool", lambda: (ops.region_pool, (leaf(1, 2, 2, 2), masks(1, 2, 2, 2)))),
    "region_blend": ("region_blend", lambda: (ops.region_blend, (leaf(1, 2, 2, 2), leaf(2, 1, 2, 2)))),
    "hash_grid": ("hash_grid", encoding),
    "frequency": ("frequency", lambda: (lambda x: ops.frequency(x, 2), (leaf(2, 2),))),
}
NOT_DIFFERENTIABLE = {"march_count", "march_write", "sample_pdf", "count_tiles", "fill_tiles"}
IN_TEST_GAUSSIANS = {"project_gaussians", "rasterize_gaussians"}


def test_every_op_with_a_gradient_has_a_case():
    derivatives = {name for name in OPS if name.endswith("_backward")}
    assert {name for name, _ in CASES.values()} == OPS.keys() - derivatives - NOT_DIFFERENTIABLE - IN_TEST_GAUSSIANS


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_second_derivative_equals_finite_differences(case):
    torch.manual_seed(0)
    run, inputs = CASES[case][1]()
    assert torch.autograd.gradgradcheck(run, inputs, atol=1e-5, nondet_tol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_second_derivative_of_arguments_that_depend_on_each_other_equals_the_reference(case, monkeypatch):
    torch.manual_seed(0)
    run, inputs = CASES[case][1]()

    def run_chained(*tensors):
        chained = [tensors[0] * 1]
        for x in tensors[1:]:
            chained.append(x + 0.01 * chained[-1].mean())
        return run(*chained)

    found = _derivatives(run_chained, inputs, 2)
    monkeypatch.setenv("FACTORKIT_REFERENCE", "1")
    torch.testing.assert_close(found, _derivatives(run_chained, inputs, 2), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_third_derivative_equals_the_reference(case, monkeypatch):
    torch.manual_seed(0)
    run, inputs = CASES[case][1]()
    found = _derivatives(run, inputs, 3)
    monkeypatch.setenv("FACTORKIT_REFERENCE", "1")
    torch.testing.assert_close(found, _derivatives(run, inputs, 3), rtol=1e-6, atol=1e-8)


def _derivatives(run, inputs, order):
    """Return the gradient of a sum of squared gradients of a sum of cubes, and so on."""
    out = run(*inputs)
    loss = sum((x**3).sum() for x in (out if isinstance(out, (tuple, list)) else (out,)))
    for _ in range(order - 1):
        found = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
        loss = sum((g**2).sum() for g in found if g is not None)
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def test_gradients_as_a_graph_of_infinite_density_equal_those_of_the_kernel():
    sigma = torch.tensor([[0.5, torch.inf, 1.0]], dtype=torch.float64, requires_grad=True)
    rgb, (start, end) = leaf(1, 3, 1), edges(1, 3)
    out = ops.composite(sigma, rgb, start, end)
    loss = out.color.sum() + out.depth.sum()
    plain = torch.autograd.grad(loss, (sigma, rgb, start, end), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (sigma, rgb, start, end), create_graph=True), plain)
