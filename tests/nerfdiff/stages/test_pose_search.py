from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.captures import FAULTS, WALKS, make_capture
from factorkit.data.procedural.scene import make_procedural_views
from factorkit.engine.run_folder import claimed
from factorkit.nerfdiff.cameras.poses import azimuth_degrees
from factorkit.nerfdiff.config import preset_config
from factorkit.nerfdiff.held_out import HeldOutErrors
from factorkit.nerfdiff.scene import open_scene
from factorkit.nerfdiff.stages import pose_search, stage_training
from factorkit.nerfdiff.stages.pose_search import (
    PARTS_OF_TURN,
    RING_ELEVATIONS,
    find_order,
    other_turns,
    return_lag,
    ring_azimuths,
    ring_directions,
)
from factorkit.nerfdiff.train import choose_capture_settings, estimate, list_notes, train_nerfdiff
from factorkit.nerfdiff.training_views import complete_settings
from factorkit.utils.files import read_log

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


@pytest.mark.slow
def test_ordered_views_try_rings_and_log_the_choice_once(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(stage_training, "HELD_OUT_STEPS", 2)
    monkeypatch.setattr(pose_search, "START_FIT", pose_search.START_FIT | {"steps": 2})
    views = make_procedural_views(10, 8, seed=1)
    for _ in range(2):
        run = train_nerfdiff(views, out=tmp_path / "run", **tiny | {"ordered": "yes", "optimize_camera": ("aim",)})
    starts = [event for event in read_log(tmp_path / "run") if event["event"] == "starts"]
    assert len(starts) == 1 and len(starts[0]["held_out_cross"]) >= 2 + len(RING_ELEVATIONS)
    assert starts[0]["best"] == min(starts[0]["held_out_cross"], key=starts[0]["held_out_cross"].get)
    assert run.poses.isfinite().all()


def choose_start(cross: dict[str, float], searched: torch.Tensor):
    """Choose among starts of these held-out errors; return the start, the training and what it logged."""
    logged: dict = {}
    training = SimpleNamespace(
        config=preset_config("fast"),
        scene=open_scene(make_procedural_views(4, 4), 4, CPU, False),
        device=CPU,
        progress=True,
        fit_small=lambda name, poses, **options: SimpleNamespace(poses=poses),
        cross_fit=lambda name, poses, scene: HeldOutErrors(cross[name.removeprefix("start ").split(" half")[0]], 0.0),
        log_once=lambda event, **values: logged.update(values),
    )
    return pose_search.DictionarySearch(training)._choose_start(lambda: searched), training, logged


@pytest.mark.parametrize(("wrong_way", "names"), [(0.8, 4), (0.3, 5)])
def test_choose_start_where_one_way_around_fits_leaves_out_the_search(wrong_way, names, monkeypatch):
    monkeypatch.setattr(pose_search, "other_turns", lambda scene: ())
    cross = {"left 25": 0.3, "right 25": wrong_way, "left 10": 0.4, "left 40": 0.2, "search": 0.1}
    searched = torch.eye(3)[[2, 2, 2, 2]] * 0.9
    start, training, logged = choose_start(cross, searched)
    assert len(logged["held_out_cross"]) == names
    assert logged["best"] == ("search" if names == 5 else "left 40")
    assert torch.equal(start, searched) == (names == 5)
    assert training.scene.turns == 1


def test_choose_start_where_a_part_of_a_turn_fits_best_tries_it_both_ways(monkeypatch, capsys):
    monkeypatch.setattr(pose_search, "other_turns", lambda scene: (0.5, 0.75))
    cross = {"left 25": 0.35, "right 25": 0.3, "right 25 turns 0.5": 0.25, "right 25 turns 0.75": 0.26}
    cross |= {"left 25 turns 0.5": 0.1, "left 10 turns 0.5": 0.12, "left 40 turns 0.5": 0.11}
    start, training, logged = choose_start(cross, torch.zeros(4, 3))
    assert logged["held_out_cross"] == cross and logged["best"] == "left 25 turns 0.5"
    torch.testing.assert_close(start, ring_directions(training.scene, "left", 25.0, 0.5))
    assert training.scene.turns == 0.5 and "about 0.5 turns around the object" in capsys.readouterr().err


def test_complete_settings_of_an_earlier_version_are_not_ordered(tmp_path):
    stored = {"model": "nerfdiff", "scene": {"intrinsics": []}}
    with claimed(tmp_path / "run", stored, frozenset()):
        assert complete_settings(stored, tmp_path / "run", {})["ordered"] == "no"


@pytest.mark.parametrize("fault", [*FAULTS, "all"])
def test_make_capture_a_fault_changes_images_or_cameras_only_as_named(fault):
    count = 12 if fault == "stops" else 2
    plain, views = (make_capture(names, count=count, size=8, seed=3) for names in ((), (fault,)))
    changes_images = fault != "focal"
    assert torch.equal(plain.images, views.images) != changes_images
    assert torch.equal(plain.intrinsics, views.intrinsics) == (fault not in ("focal", "all"))
    fixed = fault in ("light", "exposure", "clutter", "masks", "focal")
    assert torch.equal(plain.poses, views.poses) == fixed


@pytest.mark.parametrize("walk", WALKS)
def test_make_capture_a_walk_has_its_turns_and_elevations(walk):
    poses = make_capture((walk,), count=12, size=8, seed=3).poses
    azimuth = azimuth_degrees(poses[:, :3, 3])
    turns, rise = WALKS[walk][1:]
    steps = (azimuth.diff() + 180) % 360 - 180
    torch.testing.assert_close(steps, torch.full((11,), 360 * turns / 12), atol=1e-2, rtol=0)
    elevation = (poses[:, 2, 3] / poses[:, :3, 3].norm(dim=1)).asin().rad2deg()
    change = rise(torch.arange(1, 13) / 12)
    torch.testing.assert_close(elevation - elevation[0], change - change[0], atol=1e-2, rtol=0)


@pytest.mark.slow
def test_estimate_of_ordered_views_counts_the_starts_and_writes_nothing(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {k: v for k, v in tiny.items() if k != "progress"} | {"ordered": "yes"}
    stages = [stage["name"] for stage in estimate(make_procedural_views(10, 8, seed=1), **settings)["stages"]]
    assert {"start search", "start left 25", "start right 25", "refine"} <= set(stages)
    assert not list(tmp_path.iterdir())
