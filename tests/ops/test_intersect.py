"""Near and far in boxes and spheres: known rays, points on the surface, gradients."""

from __future__ import annotations

import math

import pytest
import torch

from factorkit import ops
from factorkit.ops import reference_rendering as reference

LOW, HIGH = [-1.0, -2.0, 0.5], [1.0, 1.0, 2.0]
CENTRE, RADIUS = [0.5, -1.0, 2.0], 1.5


def rays(count, dtype=torch.float64, spread=3.0):
    return torch.randn(count, 3, dtype=dtype) * spread, torch.randn(count, 3, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("origin", "direction", "near", "far"),
    [
        ((0, 0, 0), (0, 0, 1), 0.5, 2.0),  # through
        ((0, 0, 0), (0, 0, 2), 0.25, 1.0),  # in units of the direction
        ((0, 0, 1), (0, 0, 1), 0.0, 1.0),  # from inside
        ((0, 0, 3), (0, 0, 1), 0.0, 0.0),  # behind it
        ((0, 0, 3), (0, 0, -1), 1.0, 2.5),
        ((3, 0, 1), (0, 0, 1), 0.0, 0.0),  # parallel, beside
        ((1, 0, 0), (0, 0, 1), 0.5, 2.0),  # along a face
        ((1, 1, 0), (0, 0, 1), 0.5, 2.0),  # along an edge
        ((1.0000002, 0, 0), (0, 0, 1), 0.0, 0.0),  # the next number beyond the face
        ((1, 0, 0), (0, -0.0, 1), 0.5, 2.0),  # the other zero
        ((-1, 0, 1), (1, 0, 0), 0.0, 2.0),  # from a face inwards
        ((1, 0, 1), (1, 0, 0), 0.0, 0.0),  # from a face outwards
        ((-2, -1, 1), (1, -1, 0), 1.0, 1.0),  # touches an edge
        ((0, 0, 1), (0, 0, 0), 0.0, 0.0),  # no direction
        ((0, 0, 0), (1e-30, 0, 1), 0.5, 2.0),
    ],
)
def test_known_rays_and_the_box(dtype, origin, direction, near, far):
    o, d = torch.tensor([origin], dtype=dtype), torch.tensor([direction], dtype=dtype)
    for found in (ops.intersect_box(o, d, LOW, HIGH), reference.intersect_box(o, d, LOW, HIGH)):
        assert [x.item() for x in found] == [near, far]


@pytest.mark.parametrize(
    ("origin", "direction", "near", "far"),
    [
        ((0, 0, -3), (0, 0, 1), 2.0, 4.0),
        ((0, 0, -3), (0, 0, 0.5), 4.0, 8.0),
        ((0, 0, 0), (1, 0, 0), 0.0, 1.0),
        ((0, 0, 3), (0, 0, 1), 0.0, 0.0),
        ((2, 0, -3), (0, 0, 1), 0.0, 0.0),
        ((1, 0, -3), (0, 0, 1), 3.0, 3.0),  # touches
        ((0, 0, -1), (0, 0, 1), 0.0, 2.0),  # from the surface inwards
        ((0, 0, 1), (0, 0, 1), 0.0, 0.0),  # and outwards
        ((0, 0, 0), (0, 0, 0), 0.0, 0.0),
    ],
)
def test_known_rays_and_the_unit_sphere(origin, direction, near, far):
    o, d = torch.tensor([origin]).double(), torch.tensor([direction]).double()
    for found in (ops.intersect_sphere(o, d, [0, 0, 0], 1), reference.intersect_sphere(o, d, [0.0, 0.0, 0.0], 1.0)):
        assert [x.item() for x in found] == [near, far]


def test_sphere_from_afar_keeps_its_digits():
    """The textbook discriminant b^2 - ac has none left here in fp32."""
    o = torch.tensor([[0.3, 0.4, -2000.0]])
    near, far = ops.intersect_sphere(o, torch.tensor([[0.0, 0.0, 1.0]]), [0, 0, 0], 1)
    half = math.sqrt(0.75)
    assert near.item() == pytest.approx(2000 - half, abs=2e-4) and far.item() == pytest.approx(2000 + half, abs=2e-4)
    near, far = ops.intersect_sphere(
        torch.tensor([[0.0, 0.0, 0.999999]]), torch.tensor([[0.0, 0.0, 1.0]]), [0, 0, 0], 1
    )
    assert near.item() == 0 and far.item() == pytest.approx(1 - torch.tensor(0.999999).item(), rel=1e-4)


def test_random_rays_meet_the_surfaces():
    torch.manual_seed(0)
    o, d = rays(4000)
    low, high = torch.tensor(LOW).double(), torch.tensor(HIGH).double()
    near, far = ops.intersect_box(o, d, LOW, HIGH)
    hit = far > near
    assert 100 < hit.sum() < 3900
    place = o[hit] + ((near + far) / 2)[hit, None] * d[hit]
    assert ((place > low) & (place < high)).all()
    on = (o + far[:, None] * d)[hit]
    assert (torch.minimum((on - low).abs(), (on - high).abs()).amin(1) < 1e-12).all()
    along = o[~hit][:, None] + torch.linspace(0, 20, 501)[:, None] * d[~hit][:, None]
    assert not ((along > low) & (along < high)).all(-1).any()
    for op, plain, shape in (
        (ops.intersect_box, reference.intersect_box, (LOW, HIGH)),
        (ops.intersect_sphere, reference.intersect_sphere, (CENTRE, RADIUS)),
    ):
        torch.testing.assert_close(op(o, d, *shape), plain(o, d, *shape), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("op", ["box", "sphere"])
def test_gradients(op):
    torch.manual_seed(1)
    o, d = (x.requires_grad_() for x in rays(60, spread=2.0))
    run, shape = (ops.intersect_box, (LOW, HIGH)) if op == "box" else (ops.intersect_sphere, (CENTRE, RADIUS))
    plain = reference.intersect_box if op == "box" else reference.intersect_sphere
    assert torch.autograd.gradcheck(lambda o, d: run(o, d, *shape), (o, d), atol=1e-4)
    found, want = run(o, d, *shape), plain(o, d, *shape)
    grads = [torch.randn(()).double().expand(60), torch.randn(60, 2).double()[:, 0]]
    got = torch.autograd.grad(found, (o, d), grads)
    assert (got[0] != 0).any()
    torch.testing.assert_close(got, torch.autograd.grad(want, (o, d), grads), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("op", [ops.intersect_sphere, reference.intersect_sphere])
def test_a_ray_that_only_touches_has_no_gradient(op):
    o = torch.tensor([[1.0, 0.0, -3.0]]).requires_grad_()
    near, far = op(o, torch.tensor([[0.0, 0.0, 1.0]]), [0, 0, 0], 1)
    assert near.item() == far.item() == 3
    assert (torch.autograd.grad(near.sum() + far.sum(), o)[0] == 0).all()


def test_opcheck_empty_and_strided():
    torch.manual_seed(2)
    o, d = (x.requires_grad_() for x in rays(5))
    torch.library.opcheck(torch.ops.factorkit.intersect, (o, d, 0, LOW, HIGH))
    torch.library.opcheck(torch.ops.factorkit.intersect, (o, d, 1, CENTRE, [RADIUS, 0.0, 0.0]))
    none = torch.empty(0, 3)
    assert [x.shape for x in ops.intersect_box(none, none, LOW, HIGH)] == [(0,), (0,)]
    columns = o.detach().t().contiguous().t(), d.detach().t().contiguous().t()
    torch.testing.assert_close(ops.intersect_box(*columns, LOW, HIGH), ops.intersect_box(o, d, LOW, HIGH))
    one = d.detach()[:1].expand(5, 3)
    torch.testing.assert_close(ops.intersect_box(o, one, LOW, HIGH), ops.intersect_box(o, one.clone(), LOW, HIGH))


def test_wrong_input_is_refused():
    o, d = rays(4)
    nan = o.clone()
    nan[2, 1] = math.nan
    for arguments, sentence in (
        ((nan, d), "origins holds NaN or infinity, first in row 2"),
        ((o, d / 0), "directions holds NaN or infinity"),
        ((o[:3], d), r"directions must be \(3, 3\) to fit"),
        ((o[:, :2], d), r"origins must be \[rays, 3\]"),
        ((o.half(), d.half()), "float32 or float64"),
        ((o.float(), d), "directions is torch.float64"),
        ((o, d.to("meta")), "directions is torch.float64 on meta"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ops.intersect_box(*arguments, LOW, HIGH)
    for box in (([0, 0, 0], [1, 0, 1]), ([0, 0], [1, 1]), ([0, 0, 0], [1, math.inf, 1]), ([0, 0, math.nan], [1, 1, 1])):
        with pytest.raises(ValueError, match="a box needs"):
            ops.intersect_box(o, d, *box)
    for sphere in (([0, 0, 0], 0), ([0, 0], 1), ([0, 0, 0], math.nan)):
        with pytest.raises(ValueError, match="a sphere needs"):
            ops.intersect_sphere(o, d, *sphere)
