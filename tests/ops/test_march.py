"""Marching against the brute-force walk: every step asked for, none leapt over."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from factorkit import ops
from factorkit.ops import march, reference

BOX = ([-1.0, -1.5, -1.0], [1.0, 1.5, 2.0])


def pack(cells: torch.Tensor) -> torch.Tensor:
    """bool [levels, R, R, R] as the bitfield."""
    bits = cells.reshape(cells.shape[0], -1, 8).long()
    return (bits * 2 ** torch.arange(8)).sum(-1).to(torch.uint8)


def grid(levels, resolution, share, blocks=False):
    """Random cells; with ``blocks``, most 8^3 blocks empty, so that leaps are long."""
    cells = torch.rand(levels, resolution, resolution, resolution) < share
    if blocks:
        side = resolution // 8
        some = (torch.rand(levels, side, side, side) < 0.2).repeat_interleave(8, 1).repeat_interleave(8, 2)
        cells &= some.repeat_interleave(8, 3)
    return pack(cells)


def rays(count, dtype=torch.float64):
    """Origins inside and outside, most aimed at the box, some along an axis or a face."""
    origins, target = torch.randn(count, 3, dtype=dtype) * 2, torch.rand(count, 3, dtype=dtype) * 2 - 1
    directions = (target - origins) * (0.1 + torch.rand(count, 1, dtype=dtype))
    directions[: count // 4] *= (torch.rand(count // 4, 3) > 0.5).to(dtype)
    directions[directions.abs().sum(1) == 0] = 1.0
    near = torch.rand(count, dtype=dtype)
    far = near + torch.rand(count, dtype=dtype) * 16
    far[::5], far[1::7] = math.inf, near[1::7]
    return origins, directions, near, far


def both(given, step, **settings):
    got = ops.march_rays(*given, *BOX, step=step, **settings)
    plain = {"max_step": math.inf, "cone_angle": 0.0, "seed": None, **settings}
    want = reference.march_rays(*given, *BOX, step, plain["max_step"], plain["cone_angle"], plain["seed"])
    return got, want


def assert_same(got, want):
    assert torch.equal(got.ray_offsets, want[2]) and torch.equal(got.ray, want[3])
    torch.testing.assert_close((got.t_start, got.t_end), want[:2], rtol=1e-12, atol=1e-12)
    assert got.wanted == got.ray_offsets[-1] == len(got.t_start)


@pytest.mark.parametrize(("levels", "resolution"), [(1, 8), (1, 32), (2, 16), (3, 32), (4, 8), (1, 128)])
@pytest.mark.parametrize("growth", [{}, {"cone_angle": 0.03}, {"cone_angle": 0.2, "max_step": 0.4}])
@pytest.mark.parametrize("seed", [None, 0, 2**62 + 5])
def test_marching_matches_brute_force(levels, resolution, growth, seed):
    torch.manual_seed(levels + resolution)
    for blocks in (False, True):
        given = (*rays(100), grid(levels, resolution, 0.6 if blocks else 0.1, blocks and resolution >= 32))
        got, want = both(given, 0.02, seed=seed, **growth)
        assert len(got.t_start) > 20
        assert_same(got, want)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.005, 3), st.floats(0, 0.5), st.floats(1, 40), st.integers(1, 5))
@example(409, 2.9921875, 0.0, 1.0, 4)  # the last step starts beyond the grid before jitter, and its midpoint is inside
@pytest.mark.slow
def test_marching_with_any_step_matches_reference(seed, step, cone, longest, levels):
    torch.manual_seed(seed)
    given = (*rays(30), grid(levels, [8, 16, 32][seed % 3], 0.1, blocks=seed % 2 == 0))
    assert_same(*both(given, step, cone_angle=cone, max_step=step * longest, seed=seed))


def test_fp32_differs_at_most_where_a_midpoint_lies_on_a_face():
    torch.manual_seed(1)
    exact = (*rays(1000), grid(2, 64, 0.1))
    single = (*(x.float() for x in exact[:4]), exact[4])
    exact = (*(x.double() for x in single[:4]), exact[4])
    got = ops.march_rays(*single, *BOX, step=0.01, seed=3)
    want = ops.march_rays(*exact, *BOX, step=0.01, seed=3)
    keys = [
        set(zip(s.ray.tolist(), ((s.t_start + s.t_end) / 2).mul(1e3).round().tolist(), strict=True))
        for s in (got, want)
    ]
    assert len(keys[0] ^ keys[1]) < 0.01 * len(keys[1])


@pytest.mark.parametrize("seed", [None, 4])
@pytest.mark.parametrize("cone", [0.0, 0.05])
def test_steps_tile_the_ray_where_all_is_occupied(seed, cone):
    torch.manual_seed(2)
    o, d = torch.zeros(50, 3, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64)
    d = d / d.norm(dim=1, keepdim=True)
    near, far = torch.rand(50).double() * 0.2, 0.3 + torch.rand(50).double() * 0.6
    full = torch.full((1, 8**3 // 8), 255, dtype=torch.uint8)
    s = ops.march_rays(o, d, near, far, full, [-1] * 3, [1] * 3, step=0.03, cone_angle=cone, seed=seed)
    first, last = s.ray_offsets[:-1], s.ray_offsets[1:] - 1
    assert torch.equal(s.t_start[first], near) and torch.equal(s.t_end[last], far)
    inner = torch.ones(len(s.t_start), dtype=torch.bool)
    inner[first] = False
    assert torch.equal(s.t_start[inner], s.t_end[:-1][inner[1:]])
    if cone == 0:
        assert (s.t_end - s.t_start).max() <= (0.06 if seed is not None else 0.0300001)


def test_jitter_is_uniform_and_depends_on_seed_ray_and_step():
    ray, step = torch.arange(300)[:, None], torch.arange(1, 200)
    u = march.counter_uniform(12345678901234567, ray, step)
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u.float(), 50, 0, 1)
    expected = u.numel() / 50
    assert ((counts - expected) ** 2 / expected).sum() < 100  # chi squared of 49 degrees: 85 is one in a thousand
    for other in (u[1:, :] * u[:-1, :], u[:, 1:] * u[:, :-1]):
        assert abs(other.mean().item() - 0.25) < 0.005  # neighbours are independent
    assert u.flatten().unique().numel() > 0.99 * u.numel()
    for changed in (
        march.counter_uniform(12345678901234568, ray, step),
        march.counter_uniform(12345678901234567 + 2**32, ray, step),
    ):
        assert (changed != u).float().mean() > 0.99


def test_capacity_truncates_rays_and_pads_with_empty_samples():
    torch.manual_seed(3)
    given = (*rays(60), grid(1, 16, 0.3))
    whole = ops.march_rays(*given, *BOX, step=0.05, seed=torch.tensor(1))  # the same as an integer
    m = len(whole.t_start)
    for capacity in (0, 1, m // 2, m, m + 100):
        torch.use_deterministic_algorithms(True)  # unwritten memory would hold NaN
        part = ops.march_rays(*given, *BOX, step=0.05, seed=1, capacity=capacity)
        torch.use_deterministic_algorithms(False)
        k = min(capacity, m)
        assert part.wanted == m and torch.equal(part.ray_offsets, whole.ray_offsets.clamp_max(capacity))
        for a, b in zip(part[:2] + part[3:4], whole[:2] + whole[3:4], strict=True):
            assert a.shape == (capacity,) and torch.equal(a[:k], b[:k]) and (a[k:] == 0).all()
        later = ops.march_rays(*given, *BOX, step=0.05, seed=1, capacity=capacity, first_ray=5)
        assert len(later.ray) == capacity and not (later.ray < 0).any()


def test_levels_are_boxes_scaled_about_their_centre():
    """One occupied cell a level, at the corner of the grid nearest (low, low, low); a diagonal ray finds each in
    turn."""
    r = 32
    cells = torch.zeros(3, r, r, r, dtype=torch.bool)
    cells[:, 0, 0, 0] = True
    d = torch.ones(1, 3, dtype=torch.float64)
    o = torch.full((1, 3), -5.0, dtype=torch.float64)
    s = ops.march_rays(
        o, d, torch.zeros(1).double(), torch.full((1,), 9.0).double(), pack(cells), [-1] * 3, [1] * 3, step=0.01
    )
    place = -5 + (s.t_start + s.t_end) / 2
    for level in range(3):
        low, size = -(2.0**level), 2.0**level * 2 / r
        inside = (place > low) & (place < low + size)
        assert inside.sum() == pytest.approx(size / 0.01, abs=1.5)
        place = place[~inside]
    assert len(place) == 0
    x, y, z = 3, 1, 6  # x is the slowest
    cells = torch.zeros(1, 8, 8, 8, dtype=torch.bool)
    cells[0, x, y, z] = True
    assert pack(cells)[0].nonzero().item() == ((x * 8 + y) * 8 + z) // 8
    o = (torch.tensor([[x + 0.5, y + 0.5, -4.0]]) / 4 - 1).double()
    s = ops.march_rays(
        o,
        torch.tensor([[0.0, 0, 1]]).double(),
        *torch.tensor([[0.0], [9.0]]).double(),
        pack(cells),
        [-1] * 3,
        [1] * 3,
        step=0.25,
    )
    assert (o[0, 2] + s.t_start).tolist() == [z / 4 - 1] and s.ray.tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [1, 2])
def test_rays_along_outer_faces_are_sampled_on_every_side(dtype, levels):
    torch.manual_seed(5)
    full = torch.full((levels, 16**3 // 8), 255, dtype=torch.uint8)
    for _ in range(10):
        low = torch.randn(3).mul(10).tolist()
        high = [a + size for a, size in zip(low, (torch.rand(3) + 0.5).tolist(), strict=True)]
        corners = torch.tensor([low, high], dtype=torch.float64)
        centre, half = corners.mean(0), corners.diff(dim=0)[0] / 2 * 2 ** (levels - 1)
        for axis in range(3):
            sides = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 3).double()
            sides = sides[sides[:, axis] == -1]
            origins, directions = (centre + half * sides).to(dtype), torch.zeros(len(sides), 3, dtype=dtype)
            origins[:, axis] -= 1
            directions[:, axis] = 1
            near, far = torch.zeros(len(sides), dtype=dtype), torch.full((len(sides),), 1e3, dtype=dtype)
            rays = (origins, directions, near, far)
            for offsets in (
                ops.march_rays(*rays, full, low, high, step=0.05).ray_offsets,
                reference.march_rays(*rays, full, low, high, 0.05, math.inf, 0.0, None)[2],
            ):
                steps = offsets.diff()
                assert steps.min() >= 2 * half[axis] / 0.05 - 2 and steps.max() <= 2 * half[axis] / 0.05 + 2


def test_steps_below_the_precision_of_t_are_refused():
    full, box = torch.full((1, 8**3 // 8), 255, dtype=torch.uint8), ([-1] * 3, [1] * 3)
    origins, directions = torch.tensor([[0.0, 0, 5], [0, 0, 1e6]]), torch.tensor([[0.0, 0, -1]]).expand(2, 3)
    near, far = torch.zeros(2), torch.full((2,), math.inf)
    with pytest.raises(ValueError, match="ray 1 enters the box at t = 999999, where steps of 0.01 are below"):
        ops.march_rays(origins, directions, near, far, full, *box, step=0.01)
    away = directions * torch.tensor([[1.0], [-1.0]])  # never meets the box
    assert ops.march_rays(origins, away, near, far, full, *box, step=0.01).wanted > 0
    exact = [x.double() for x in (origins, directions, near, far)]
    assert ops.march_rays(*exact, full, *box, step=0.01).ray_offsets.diff().tolist() == [200, 200]


def test_empty_batches_grids_and_intervals():
    given = (*rays(20), grid(1, 8, 0.5))
    none = ops.march_rays(*(x[:0] for x in given[:4]), given[4], *BOX, step=0.1)
    assert none.t_start.shape == (0,) and none.ray_offsets.tolist() == [0]
    empty = ops.march_rays(*given[:4], torch.zeros_like(given[4]), *BOX, step=0.1)
    assert empty.t_start.shape == (0,) and (empty.ray_offsets == 0).all()
    backwards = ops.march_rays(*given[:2], given[3].nan_to_num(posinf=1.0) + 1, given[2], given[4], *BOX, step=0.1)
    assert backwards.wanted == 0


def test_marching_equal_for_any_threads_dtype_and_layout():
    torch.manual_seed(4)
    given = (*rays(500, torch.float32), grid(2, 32, 0.05))
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(ops.march_rays(*given, *BOX, step=0.01, seed=9))
    torch.set_num_threads(before)
    strided = [x.t().contiguous().t() for x in given[:2]]
    found.append(ops.march_rays(*strided, *given[2:], *BOX, step=0.01, seed=9))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    assert found[0].t_start.dtype == torch.float32


@pytest.mark.slow
def test_opcheck_and_forced_reference(monkeypatch):
    torch.manual_seed(5)
    given = (*rays(10), grid(1, 8, 0.3))
    blocks = torch.empty(0, dtype=torch.uint8)
    rest = (*BOX, 0.1, 1.0, 0.0, torch.tensor(3))
    torch.library.opcheck(torch.ops.factorkit.march_count, (*given, blocks, *rest))
    s = ops.march_rays(*given, *BOX, step=0.1, max_step=1.0, seed=3)
    torch.library.opcheck(torch.ops.factorkit.march_write, (*given, blocks, *rest, s.ray_offsets, len(s.t_start)))
    monkeypatch.setenv("FACTORKIT_REFERENCE", "1")
    monkeypatch.setattr(torch.ops.factorkit, "march_count", None)
    for capacity in (None, 3, 10_000):
        got = ops.march_rays(*given, *BOX, step=0.1, max_step=1.0, seed=3, capacity=capacity)
        k = min(len(s.t_start), len(got.t_start))
        torch.testing.assert_close(got.t_start[:k], s.t_start[:k])
        assert got.wanted == len(s.t_start) and len(got.t_start) == (capacity or len(s.t_start))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"origins": torch.full((4, 3), math.nan)}, "origins holds NaN"),
        ({"near": torch.full((4,), math.inf)}, "near holds NaN or infinity"),
        ({"far": torch.full((4,), math.nan)}, "far holds NaN"),
        ({"near": torch.zeros(3)}, "near must be"),
        ({"far": torch.ones(4).double()}, "far is torch.float64"),
        ({"occupancy": torch.zeros(1, 60, dtype=torch.uint8)}, "is not 1 to 16 levels"),
        ({"occupancy": torch.zeros(1, 8, dtype=torch.uint8)}, "is not 1 to 16 levels"),
        ({"occupancy": torch.zeros(0, 64, dtype=torch.uint8)}, "is not 1 to 16 levels"),
        ({"occupancy": torch.zeros(1, 12**3 // 8, dtype=torch.uint8)}, "is not 1 to 16 levels"),
        ({"occupancy": torch.zeros(1, 64)}, "occupancy must be uint8"),
        ({"occupancy": torch.zeros(1, 64, dtype=torch.uint8, device="meta")}, "on meta"),
        ({"upper": [1, 1, -1]}, "a box needs"),
        ({"step": 0.0}, "0 < step <= max_step"),
        ({"step": math.nan}, "0 < step <= max_step"),
        ({"max_step": 0.01}, "0 < step <= max_step"),
        ({"cone_angle": -0.1}, "cone_angle >= 0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**63}, "seed="),
        ({"seed": torch.tensor(1.0)}, "seed is torch.float32"),
        ({"seed": torch.tensor([1, 2])}, r"seed is torch.int64 \(2,\)"),
        ({"capacity": -1}, "capacity=-1"),
    ],
)
def test_wrong_input_is_refused(changes, sentence):
    made = dict(origins=torch.zeros(4, 3), directions=torch.ones(4, 3), near=torch.zeros(4), far=torch.ones(4))
    made |= dict(occupancy=torch.zeros(1, 64, dtype=torch.uint8), lower=[-1] * 3, upper=[1] * 3, step=0.1)
    with pytest.raises(ValueError, match=sentence):
        ops.march_rays(**{**made, **changes})
