from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from benchmarks.captures import make_capture
from factorkit.data.procedural.scene import make_procedural_views
from factorkit.nerfdiff.cameras.poses import azimuth_degrees, camera_directions, direction_vectors, orbit_poses
from factorkit.nerfdiff.config import preset_config
from factorkit.nerfdiff.scene import open_scene
from factorkit.nerfdiff.stages import walks
from factorkit.nerfdiff.stages.walks import (
    MAX_PACE,
    OPEN_LENGTH,
    PACE_COST,
    PARTS_OF_TURN,
    cheapest_walk,
    find_order,
    follow_walk,
    other_turns,
    return_lag,
    ring_azimuths,
    ring_directions,
    unevenness,
)
from factorkit.nerfdiff.train import choose_capture_settings, list_notes

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("names", "turns"),
    [
        (["a1.png", "a2.png", "a3.png", "a5.png"], [0, 72, 144, 288]),
        (["x/b7_10.jpg", "x/b7_20.jpg", "x/b7_30.jpg"], [0, 120, 240]),
        (["front", "left", "right"], [0, 120, 240]),
        (["3.png", "2.png", "1.png"], [0, 120, 240]),
        (["20240101.png", "20240102.png", "20240103.png", "20240201.png"], [0, 90, 180, 270]),
    ],
)
def test_ring_azimuths_follow_the_numbers_of_the_names(names, turns):
    assert torch.allclose(ring_azimuths(names), torch.tensor(turns, dtype=torch.float32))


def test_ring_azimuths_with_times_follow_their_order():
    azimuths = ring_azimuths(["1.png", "2.png", "3.png", "4.png"], torch.tensor([7.0, 2.0, 9.0, 3.0]))
    assert azimuths.tolist() == [180, 0, 270, 90]


def test_order_of_names_without_leading_zeros_is_that_of_their_numbers():
    """Folders list 10.png before 2.png."""
    turn = open_scene(make_capture((), count=16, size=16), 16, CPU, False)
    names = [f"{i}.png" for i in range(16)]
    listed = torch.tensor(sorted(range(16), key=names.__getitem__))
    scene = replace(turn, images=turn.images[listed], foreground=None, names=[names[i] for i in listed])
    assert find_order(scene) == "names"
    torch.testing.assert_close(ring_azimuths(scene.names), listed * 22.5)


def test_ring_directions_go_both_ways():
    scene = open_scene(make_procedural_views(8, 4), 4, CPU, False)
    left, right = (ring_directions(scene, way, 25.0) for way in ("left", "right"))
    assert torch.allclose(azimuth_degrees(left), torch.arange(8) * 45.0, atol=1e-3)
    assert torch.allclose(left * torch.tensor([1.0, -1, 1]), right, atol=1e-6)
    assert torch.allclose(left[:, 2].asin().rad2deg(), torch.full((8,), 25.0), atol=1e-3)
    half = ring_directions(scene, "left", 25.0, 0.5)
    assert torch.allclose(azimuth_degrees(half), torch.arange(8) * 22.5, atol=1e-3)


def make_walk(turns: float, count: int = 40) -> torch.Tensor:
    """Return images [V, 3, 8, 8] that follow an azimuth, each brighter or darker than the others."""
    draw = torch.Generator().manual_seed(0)
    azimuth = torch.arange(count) * (2 * torch.pi * turns / count)
    waves = torch.cat([f(k * azimuth)[None] / k for k in (1, 2, 3) for f in (torch.cos, torch.sin)])
    images = torch.einsum("kv,kchw->vchw", waves, torch.randn(6, 3, 8, 8, generator=draw))
    return images + 0.5 * torch.randn(count, 1, 1, 1, generator=draw)


@pytest.mark.parametrize(("turns", "tried"), [(0.5, PARTS_OF_TURN), (0.75, PARTS_OF_TURN), (1, ()), (1.5, 1.5), (2, 2)])
def test_other_turns_follow_from_the_views_that_return(turns, tried):
    images = make_walk(turns)
    if isinstance(tried, (int, float)):
        tried = pytest.approx((tried,), rel=0.08)
    scene = open_scene(make_procedural_views(8, 4), 4, CPU, False)
    scene = replace(scene, images=images, foreground=None, names=[f"{i:02d}.png" for i in range(40)])
    assert other_turns(scene) == tried
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    mixed = replace(scene, images=images[order], times=order.double())
    assert other_turns(mixed) == tried, "in the order of the times"


def test_return_lag_of_more_turns_is_that_of_the_first_return():
    """The third turn is more like the first than the second is."""
    images = make_walk(3, 60)
    images[20:40] += 0.5 * torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert return_lag(images) in (19, 20, 21)


@pytest.mark.slow
def test_find_order_by_names_by_times_or_none():
    turn = open_scene(make_capture(("shift", "exposure"), count=16, size=16), 16, CPU, False)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    mixed = open_scene(make_capture(("shift", "exposure"), count=16, size=16).select(order), 16, CPU, False)
    timed = replace(mixed, times=order.double())
    assert [find_order(scene) for scene in (turn, mixed, timed)] == ["names", None, "times"]
    back = ring_directions(timed, "left", 25.0)[order.argsort()]
    torch.testing.assert_close(back, ring_directions(turn, "left", 25.0))
    config = preset_config("fast", ordered="auto")
    views = make_procedural_views(2, 4)
    notes = [list_notes(views, scene, replace(config, ordered="yes"))[-1] for scene in (turn, timed)]
    assert "order of their names" in notes[0] and "order of the times in their EXIF data" in notes[1]
    unused = ({"poses": "known"}, {"poses": "learned"}, {"search": "sfm"}, {"search": "joint"})
    for changes in unused:
        assert not any("a walk" in note for note in list_notes(views, turn, replace(config, ordered="yes", **changes)))
    forward = replace(turn, layout="forward")
    assert not any("a walk" in note for note in list_notes(views, forward, replace(config, ordered="yes")))
    assert [choose_capture_settings(config, scene).ordered for scene in (turn, mixed, timed)] == ["yes", "no", "yes"]
    assert choose_capture_settings(replace(config, poses="known"), turn).ordered == "no"


def cheapest_of_all(errors: torch.Tensor, steps: torch.Tensor, closed: bool) -> list[int]:
    """Return the cheapest walk, by trying all."""
    views, count = errors.shape
    length = count if closed else math.ceil(OPEN_LENGTH * float(steps.sum()))
    walks: dict[tuple[int, ...], float] = {}
    for first, moves in itertools.product(range(count), itertools.product(range(length + 1), repeat=views - 1)):
        taken = [*moves, length - sum(moves)][: views if closed else -1]
        if sum(moves) > length or any(n > max(1, MAX_PACE * step) for n, step in zip(taken, steps, strict=False)):
            continue
        places = [(first + sum(moves[:i])) % count for i in range(views)]
        pace = sum(abs(n / float(step) - 1) for n, step in zip(taken, steps, strict=False))
        cost = sum(float(errors[i, place]) for i, place in enumerate(places)) + PACE_COST * pace
        walks[tuple(places)] = min(cost, walks.get(tuple(places), math.inf))
    return list(min(walks, key=walks.__getitem__))


@pytest.mark.parametrize(
    ("steps", "closed"),
    [([1.75] * 4, True), ([1.2, 0.5, 2.0, 3.3], True), ([0.6, 0.2, 1.0, 1.7], False), ([0.3] * 4, False)],
)
def test_cheapest_walk_equals_the_best_of_all_walks(steps, closed):
    draw = torch.Generator().manual_seed(0)
    for scale in (0.03, 0.1, 0.3):
        errors = scale * torch.randn(4, 7, generator=draw)
        expected = cheapest_of_all(errors, torch.tensor(steps), closed)
        assert cheapest_walk(errors, torch.tensor(steps), closed).tolist() == expected


@pytest.mark.parametrize("way", walks.WAYS)
def test_follow_walk_uneven_pace_and_rise_are_found(way, monkeypatch):
    """Each view differs from a render as its camera from the render's; some are as from elsewhere."""
    scene = open_scene(make_procedural_views(24, 8), 8, CPU, False)
    scene = replace(scene, loss_masks=torch.ones(24, 1, 8, 8))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    even = ring_azimuths(scene.names, order)
    pace = torch.tensor([1.0] * 6 + [3.0] * 6 + [0.0] * 3 + [1.0] * 9)
    azimuth = 40 + 360 * pace.cumsum(0) / pace.sum()
    azimuth = (azimuth if way == "left" else -azimuth)[order]
    rise = torch.linspace(10, 40, 24)[order]
    true, lower = direction_vectors(azimuth, rise), order.argsort()[10:16]

    def errors(field, poses, camera, images, samples, views, masks, intrinsics):
        assert images is scene.images and masks is scene.loss_masks and views.tolist() == list(range(24))
        rendered, seen = camera_directions(poses), true.clone()
        seen[order.argsort()[5]] *= torch.tensor([-1.0, -1, 1])
        seen[lower] = direction_vectors(azimuth, rise - 30)[lower]
        return torch.cdist(seen, rendered).clamp_max(0.6)

    monkeypatch.setattr(walks, "candidate_errors", errors)
    wrong = rise + torch.where(order == 18, 55.0, 0.0)
    start = orbit_poses(direction_vectors(0 * azimuth, wrong), scene.distance)
    found = follow_walk(None, start, scene, 8, way, 1.0, even)
    apart = (azimuth_degrees(found) - azimuth + 180) % 360 - 180
    kept = torch.arange(24) != order.argsort()[5]
    assert apart[kept].abs().max() < 3.1
    assert apart.abs().max() < 20, "the view that is like its opposite stays between its neighbours"
    assert (found[:, 2].asin().rad2deg() - rise).abs().max() < 8, "each is compared near its own elevation"
    steps = found[order.argsort(), 2].asin().rad2deg().diff().abs()
    assert steps.max() < 4, "elevations are averaged over neighbours"
    assert unevenness(found, direction_vectors(even if way == "left" else -even, rise)) > 10


def test_unevenness_of_turned_directions_is_zero():
    scene = open_scene(make_procedural_views(8, 4), 4, CPU, False)
    even = ring_directions(scene, "left", 25.0)
    turned = direction_vectors(azimuth_degrees(even) + 200, torch.full((8,), 10.0))
    assert unevenness(turned, even) < 1e-3
    moved = direction_vectors(azimuth_degrees(even) + torch.tensor([8.0, -8] * 4), torch.full((8,), 10.0))
    assert unevenness(moved, even) == pytest.approx(8, abs=1e-3)
