from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.captures import FAULTS, WALKS, make_capture
from factorkit.data.procedural.scene import make_procedural_views
from factorkit.engine.run_folder import claimed
from factorkit.nerfdiff.cameras.poses import azimuth_degrees, direction_vectors
from factorkit.nerfdiff.config import preset_config
from factorkit.nerfdiff.held_out import HeldOutErrors
from factorkit.nerfdiff.scene import open_scene
from factorkit.nerfdiff.stages import pose_search, stage_training
from factorkit.nerfdiff.stages.pose_search import RING_ELEVATIONS
from factorkit.nerfdiff.stages.walks import ring_directions
from factorkit.nerfdiff.train import estimate, train_nerfdiff
from factorkit.nerfdiff.training_views import complete_settings
from factorkit.utils.files import read_log

CPU = torch.device("cpu")


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


def choose_start(cross: dict[str, float], searched: torch.Tensor, monkeypatch, walk: torch.Tensor | None = None):
    """Choose among starts of these held-out errors, with this walk through their fields (None: an even one).

    Returns:
        The start, the training and what it logged.
    """

    def follow(field, poses, scene, samples, way, turns, even):
        assert way == "left" and even.tolist() == [0, 90, 180, 270]
        return walk

    monkeypatch.setattr(pose_search, "follow_walk", follow if walk is not None else lambda *given: None)
    if walk is None:
        monkeypatch.setattr(pose_search, "unevenness", lambda walk, even: 9.0)
    logged: dict = {}
    training = SimpleNamespace(
        config=preset_config("fast"),
        scene=open_scene(make_procedural_views(4, 4), 4, CPU, False),
        device=CPU,
        progress=True,
        fit_small=lambda name, poses, **options: SimpleNamespace(poses=poses, field=None, samples=4),
        cross_fit=lambda name, poses, scene: HeldOutErrors(cross[name.removeprefix("start ").split(" half")[0]], 0.0),
        log_once=lambda event, **values: logged.update(values),
    )
    return pose_search.DictionarySearch(training)._choose_start(lambda: searched), training, logged


@pytest.mark.parametrize(("wrong_way", "names"), [(0.8, 4), (0.3, 5)])
def test_choose_start_where_one_way_around_fits_leaves_out_the_search(wrong_way, names, monkeypatch):
    monkeypatch.setattr(pose_search, "other_turns", lambda scene: ())
    cross = {"left 25": 0.3, "right 25": wrong_way, "left 10": 0.4, "left 40": 0.2, "search": 0.1}
    searched = torch.eye(3)[[2, 2, 2, 2]] * 0.9
    start, training, logged = choose_start(cross, searched, monkeypatch)
    assert len(logged["held_out_cross"]) == names
    assert logged["best"] == ("search" if names == 5 else "left 40")
    assert torch.equal(start, searched) == (names == 5)
    assert training.scene.turns == 1


def test_choose_start_where_a_part_of_a_turn_fits_best_tries_it_both_ways(monkeypatch, capsys):
    monkeypatch.setattr(pose_search, "other_turns", lambda scene: (0.5, 0.75))
    cross = {"left 25": 0.35, "right 25": 0.3, "right 25 turns 0.5": 0.25, "right 25 turns 0.75": 0.26}
    cross |= {"left 25 turns 0.5": 0.1, "left 10 turns 0.5": 0.12, "left 40 turns 0.5": 0.11}
    start, training, logged = choose_start(cross, torch.zeros(4, 3), monkeypatch)
    assert logged["held_out_cross"] == cross and logged["best"] == "left 25 turns 0.5"
    torch.testing.assert_close(start, ring_directions(training.scene, "left", 25.0, 0.5))
    assert training.scene.turns == 0.5 and "about 0.5 turns around the object" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("first", "second", "best"), [(0.3, 0.1, "left 25"), (0.2, 0.25, "uneven 1"), (0.2, 0.1, "uneven 2")]
)
def test_choose_start_of_uneven_views_follows_them_while_the_error_falls(first, second, best, monkeypatch, capsys):
    monkeypatch.setattr(pose_search, "other_turns", lambda scene: ())
    cross = {"left 25": 0.25, "right 25": 0.9, "left 10": 0.4, "left 40": 0.4, "uneven 1": first, "uneven 2": second}
    walk = direction_vectors(torch.tensor([0.0, 10, 20, 200]), torch.full((4,), 25.0))
    start, _, logged = choose_start(cross, torch.zeros(4, 3), monkeypatch, walk)
    assert logged["best"] == best
    assert ("uneven 2" in logged["held_out_cross"]) == (best != "left 25")
    assert torch.equal(start, walk) == (best != "left 25")
    assert ("spaced unevenly on their walk: 5" in capsys.readouterr().err) == (best != "left 25")


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
    fixed = fault in ("light", "exposure", "clutter", "masks", "focal", "flat")
    assert torch.equal(plain.poses, views.poses) == fixed


def test_make_capture_close_cuts_most_views_and_flat_lowers_the_object():
    masks, poses = (getattr(make_capture(("close",), count=24, size=16), name) for name in ("masks", "poses"))
    border = torch.cat([masks[:, 0, [0, -1]], masks[:, 0, :, [0, -1]].mT], dim=1).amax((1, 2)) > 0.5
    assert 0.4 < border.float().mean() < 0.9
    distance = poses[:, :3, 3].norm(dim=1)
    elevation = (poses[:, 2, 3] / distance).asin().rad2deg()
    assert elevation.aminmax() == (pytest.approx(-7, abs=0.1), pytest.approx(57, abs=0.1))
    assert distance.max() / distance.min() == pytest.approx(0.87 / 0.47, abs=0.01)
    plain, flat = (make_capture(names, count=2, size=16).masks.sum() for names in ((), ("flat",)))
    assert 0.3 < flat / plain < 0.9


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
