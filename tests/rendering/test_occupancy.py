"""The occupancy grid: its bit layout, what it learns of a field, its memory, and that it resumes exactly."""

from __future__ import annotations

import pytest
import torch

from factorkit import ops
from factorkit.rendering import OccupancyGrid

LOWER, UPPER = (-1.0, -2.0, 0.0), (1.0, 2.0, 1.0)


def grid(**changes):
    settings = {"resolution": 8, "threshold": 0.0, "decay": 0.5, "warmup": 2} | changes
    return OccupancyGrid(LOWER, UPPER, **settings)


def half_space(points):
    return (points[:, 0] > 0).float()


def bit(occupancy, level, x, y, z):
    """As the layout is agreed upon: bit i of byte j is cell 8j+i, x slowest."""
    r = occupancy.resolution
    index = (x * r + y) * r + z
    return (occupancy.bits[level, index // 8].item() >> (index % 8)) & 1


def test_occupancy_before_first_update_is_full():
    fresh = grid(levels=2)
    assert (fresh.bits == 255).all() and fresh.share_occupied().tolist() == [1, 1]


def test_occupancy_bits_match_the_layout_of_march_rays():
    one = grid(levels=2)
    for level, cell in ((0, (1, 6, 3)), (0, (7, 0, 5)), (1, (0, 7, 7))):
        wanted = torch.tensor(cell)

        def only(points, level=level, wanted=wanted):
            lower, upper = torch.tensor(LOWER), torch.tensor(UPPER)
            place = ((points - (lower + upper) / 2) / (upper - lower) / 2**level + 0.5) * 8
            return (place.floor() == wanted).all(1).float()

        one.num_updates.zero_()
        one.density.zero_()
        one.update(only)
        found = [(x, y, z) for x in range(8) for y in range(8) for z in range(8) if bit(one, level, x, y, z)]
        assert found == [cell]
        # A ray through the middle of that cell and along z, asked by the op itself.
        lower, upper = torch.tensor(LOWER), torch.tensor(UPPER)
        middle = (lower + upper) / 2 + ((wanted + 0.5) / 8 - 0.5) * (upper - lower) * 2**level
        origin = torch.tensor([[middle[0], middle[1], -9.0]])
        near, far = torch.zeros(1), torch.full((1,), 99.0)
        direction = torch.tensor([[0.0, 0.0, 1.0]])
        samples = ops.march_rays(origin, direction, near, far, one.bits, one.lower, one.upper, step=0.02)
        height = -9 + (samples.t_start + samples.t_end) / 2
        side = 2**level / 8
        assert len(height) and (abs(height - middle[2]) < side / 2 + 1e-4).all()
        assert one.occupied(torch.stack([middle, middle + 2 * side])).tolist() == [True, False]


def test_occupancy_updates_learn_the_field():
    learned = grid(levels=2)
    learned.update(half_space)
    points = torch.rand(500, 3) * 2 - 1
    points = points[points[:, 0].abs() > 0.01] * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([0, 0, 0.5])
    assert torch.equal(learned.occupied(points), points[:, 0] > 0)
    torch.testing.assert_close(learned.share_occupied(), torch.tensor([0.5, 0.5]))
    assert not learned.occupied(torch.tensor([[50.0, 0, 0]])).item()


def test_occupancy_density_decays_but_not_below_current_density():
    faded = grid(levels=1)
    faded.update(lambda points: torch.full((len(points), 1), 8.0))
    faded.update(lambda points: torch.full((len(points),), 3.0))
    torch.testing.assert_close(faded.density, torch.full_like(faded.density, 4.0))
    faded.num_updates.fill_(1)
    faded.update(lambda points: torch.full((len(points),), 3.0))
    torch.testing.assert_close(faded.density, torch.full_like(faded.density, 3.0))


def test_occupancy_after_warmup_queries_half_of_the_cells():
    later = grid(resolution=16, warmup=1)
    looked = []
    later.update(lambda points: looked.append(len(points)) or half_space(points))
    later.update(lambda points: looked.append(points) or half_space(points))
    assert looked[0] == 16**3 and len(looked[1]) == 16**3 // 2
    evenly, occupied = looked[1].chunk(2)
    assert later.occupied(occupied).all()
    assert 0.4 < (evenly[:, 0] > 0).float().mean() < 0.6
    # Drawn among all occupied cells alike.
    assert len(set(((occupied[:, 0] * 8).int()).tolist())) == 8


def test_occupancy_faint_uniform_field_stays_occupied():
    faint = grid(threshold=0.5)
    faint.update(lambda points: torch.full((len(points),), 1e-6))
    assert faint.share_occupied().item() == 1
    empty = grid(threshold=0.5)
    empty.update(lambda points: torch.zeros(len(points)))
    assert empty.share_occupied().item() == 0
    # Shortest side 1/8: a density of 4 is an optical depth of 0.5, one of 3.9 is less.
    strong = grid(threshold=0.5)
    strong.update(lambda points: torch.where(points[:, 0] > 0.5, 100.0, torch.where(points[:, 0] > 0, 4.0, 3.9)))
    assert strong.share_occupied().item() == 0.5


def test_occupancy_saved_and_loaded_continues_identically(tmp_path):
    first = grid(warmup=1, seed=3)
    for _ in range(3):
        first.update(half_space)
    torch.save(first.state_dict(), tmp_path / "grid.pt")
    second = grid(warmup=1, seed=3)
    second.load_state_dict(torch.load(tmp_path / "grid.pt", weights_only=True))
    asked = []
    for each in (first, second):
        each.update(lambda points: asked.append(points) or points[:, 1].abs())
    assert torch.equal(*asked) and torch.equal(first.bits, second.bits) and torch.equal(first.density, second.density)
    with pytest.raises(ValueError, match="the saved grid covers the box"):
        OccupancyGrid((0, 0, 0), (1, 1, 1), resolution=8).load_state_dict(first.state_dict())


def test_occupancy_nan_density_counts_as_zero():
    broken = grid()
    broken.update(lambda points: torch.where(points[:, 0] > 0, torch.nan, 1.0))
    assert broken.share_occupied().item() == 0.5 and broken.density.isfinite().all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"resolution": 12}, "resolution=12; give a power of two"),
        ({"resolution": 4}, "resolution=4; give a power of two from 8 on"),
        ({"levels": 0}, "levels=0; give 1 to 16"),
        ({"decay": 0.0}, "0 < decay <= 1"),
    ],
)
def test_occupancy_invalid_arguments_raise(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        grid(**change)
    with pytest.raises(ValueError, match=r"returned \(1,\); it must return \[512\]"):
        grid().update(lambda points: points[:1, 0])


def test_occupancy_faces_belong_to_the_box():
    corners = torch.tensor([LOWER, UPPER])
    beyond = corners + torch.tensor([[-1e-3], [1e-3]])
    full = OccupancyGrid(LOWER, UPPER, resolution=8, levels=2)
    outer = OccupancyGrid(LOWER, UPPER, resolution=8)
    assert full.occupied(beyond).all() and outer.occupied(corners).all() and not outer.occupied(beyond).any()
