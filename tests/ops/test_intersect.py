"""Near and far in boxes: known rays, points on the surface, gradients."""

from __future__ import annotations

import math

import pytest
import torch

from factorkit import ops
from factorkit.ops import reference

LOW, HIGH = [-1.0, -2.0, 0.5], [1.0, 1.0, 2.0]


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
def test_known_rays_meet_the_box(dtype, origin, direction, near, far):
    o, d = torch.tensor([origin], dtype=dtype), torch.tensor([direction], dtype=dtype)
    for found in (ops.intersect_box(o, d, LOW, HIGH), reference.intersect_box(o, d, LOW, HIGH)):
        assert [x.item() for x in found] == [near, far]


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
    torch.testing.assert_close((near, far), reference.intersect_box(o, d, LOW, HIGH), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("distance", [1e3, 1e6])
def test_single_precision_rays_from_far_away_meet_the_box_as_in_double_precision(distance):
    torch.manual_seed(3)
    target = torch.rand(4000, 3) * torch.tensor([2.2, 3.3, 1.7]) + torch.tensor([-1.1, -2.15, 0.4])
    directions = torch.nn.functional.normalize(torch.randn(4000, 3), dim=1)
    origins = (target.double() - distance * directions.double()).float()
    want = ops.intersect_box(origins.double(), directions.double(), LOW, HIGH)
    hit = want[1] > want[0]
    assert 50 < (~hit).sum() < 3900
    for run in (ops.intersect_box, reference.intersect_box):
        near, far = run(origins, directions, LOW, HIGH)
        assert torch.equal(near, want[0].float()) and torch.equal(far, want[1].float())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rays_along_every_face_and_edge_have_the_length_of_the_box(dtype):
    torch.manual_seed(4)
    for _ in range(20):
        low = torch.randn(3).mul(10).tolist()
        high = [a + size for a, size in zip(low, (torch.rand(3) + 0.1).tolist(), strict=True)]
        corners = torch.tensor([low, high], dtype=dtype)
        for axis in range(3):
            for b, c in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 1)):  # 2: between the faces
                origin = corners[0].clone()
                for other, side in zip([a for a in range(3) if a != axis], (b, c), strict=True):
                    origin[other] = corners.mean(0)[other] if side == 2 else corners[side, other]
                origin[axis] -= 1
                for sign in (1.0, -1.0):
                    direction = torch.zeros(3, dtype=dtype)
                    direction[axis] = sign
                    start = origin if sign > 0 else origin + direction.abs() * (2 + corners[1] - corners[0])
                    for run in (ops.intersect_box, reference.intersect_box):
                        near, far = run(start[None], direction[None], low, high)
                        size = (corners[1] - corners[0])[axis]
                        torch.testing.assert_close(far - near, size[None], rtol=1e-4, atol=1e-5)


def test_gradients():
    torch.manual_seed(1)
    o, d = (x.requires_grad_() for x in rays(60, spread=2.0))
    assert torch.autograd.gradcheck(lambda o, d: ops.intersect_box(o, d, LOW, HIGH), (o, d), atol=1e-4)
    found, want = ops.intersect_box(o, d, LOW, HIGH), reference.intersect_box(o, d, LOW, HIGH)
    grads = [torch.randn(()).double().expand(60), torch.randn(60, 2).double()[:, 0]]
    got = torch.autograd.grad(found, (o, d), grads)
    assert (got[0] != 0).any()
    torch.testing.assert_close(got, torch.autograd.grad(want, (o, d), grads), rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_opcheck_empty_and_strided():
    torch.manual_seed(2)
    o, d = (x.requires_grad_() for x in rays(5))
    torch.library.opcheck(torch.ops.factorkit.intersect_box, (o, d, LOW, HIGH))
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
