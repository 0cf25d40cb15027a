"""Cameras found wrongly are named, and those found rightly are not; limits on both sides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from factorkit.data.procedural.scene import make_scene_field
from factorkit.nerfdiff.alarms import (
    azimuth_spread,
    effective_use,
    inverted_share,
    neighbour_degrees,
    pose_alarms,
    scene_alarms,
    sector_use,
    silhouette_check,
    silhouette_offset,
    unexplained_variance,
)
from factorkit.nerfdiff.box import Foreground
from factorkit.nerfdiff.cameras.poses import (
    direction_grid,
    direction_vectors,
    orbit_poses,
    rotate_about_z,
    rotate_poses_about_z,
)
from factorkit.nerfdiff.config import preset_config
from factorkit.nerfdiff.fields.base import Appearance
from factorkit.nerfdiff.rays import CameraModel, render_views
from factorkit.nerfdiff.run import NerfdiffRun
from factorkit.nerfdiff.scene import Scene
from factorkit.nerfdiff.stages import joint
from factorkit.nerfdiff.train import train_nerfdiff
from factorkit.utils.errors import FactorkitError
from factorkit.utils.files import read_log, timeline

DISTANCE = 3.6


def around(azimuth: torch.Tensor, elevation: float = 30.0) -> torch.Tensor:
    return orbit_poses(direction_vectors(azimuth, torch.full_like(azimuth, elevation)), DISTANCE)


def evenly(count: int, arc: float) -> torch.Tensor:
    return around(torch.arange(count) * (arc / count))


def names(result: dict) -> list[str]:
    return [failure.split(":")[0] for failure in result["failures"]]


@pytest.fixture(scope="module")
def field():
    return make_scene_field()


@pytest.fixture(scope="module")
def scene(field):
    """Forty views from all around, 16 pixels a side, with their true poses."""
    camera_model = CameraModel(torch.tensor([[1.6, 0, 0.5], [0, 1.6, 0.5], [0, 0, 1]]), torch.ones(3))
    draw = torch.Generator().manual_seed(0)
    azimuth = torch.arange(40) * 9.0 + 4 * torch.rand(40, generator=draw)
    poses = orbit_poses(direction_vectors(azimuth, 10 + 40 * torch.rand(40, generator=draw)), DISTANCE)
    images = render_views(field, poses, camera_model, (16, 16), 32).color.movedim(-1, 1)
    return Scene(images, [str(i) for i in range(40)], camera_model, "object", DISTANCE, poses)


CONFIG = preset_config("demo", samples_per_ray=32)


def test_pose_alarms_cameras_on_a_part_of_a_turn_are_no_collapse():
    """Where the search found a part of a turn."""
    result = pose_alarms(evenly(40, 180), turns=0.5)
    spread, sectors = result["checks"][:2]
    assert not result["failures"] and result["azimuth_spread"] < 0.5
    assert [check["reason"] for check in (spread, sectors)] == ["since the views were taken on 0.5 of a turn"] * 2


def test_pose_alarms_cameras_on_one_side_are_a_collapse():
    assert azimuth_spread(evenly(40, 360)) > 0.99 and azimuth_spread(evenly(40, 10)) < 0.05
    assert names(pose_alarms(evenly(40, 360))) == names(pose_alarms(evenly(40, 250))) == []
    assert "one side" in pose_alarms(evenly(40, 180))["failures"][0]
    # as joint training without balance left Lego's: an arc of 142 degrees, some cameras beyond it
    squeezed = torch.cat([torch.linspace(0, 142, 90), torch.linspace(142, 360, 10)])
    assert "one side" in pose_alarms(around(squeezed))["failures"][0]


def test_pose_alarms_two_opposite_clusters_are_a_collapse():
    crowds = around(torch.cat([torch.rand(30) * 30, 180 + torch.rand(30) * 30]))
    assert azimuth_spread(crowds) > 0.9
    assert "few places" in pose_alarms(crowds)["failures"][0]
    torch.manual_seed(0)
    for count in (40, 80):  # views anywhere on the circle crowd by chance, and that is no failure
        assert all(names(pose_alarms(around(360 * torch.rand(count)))) == [] for _ in range(20)), count
    assert abs(sector_use(evenly(48, 360)) - 1) < 1e-5


def test_pose_alarms_registered_cameras_on_one_side_are_none_unless_they_collapsed():
    arc, opposite = evenly(40, 60), around(torch.cat([torch.linspace(0, 20, 20), torch.linspace(180, 200, 20)]))
    closer = evenly(40, 30)
    for start in (arc, opposite):  # moved by a refinement
        result = pose_alarms(rotate_poses_about_z(start, 0.5), start=start)
        assert names(result) == [] and result["checks"][0]["status"] == "passed"
    assert [check["status"] for check in pose_alarms(arc, start=arc)["checks"][:2]] == ["measured"] * 2  # given
    assert "one side" in pose_alarms(closer, start=arc)["failures"][0]
    assert "one side" in pose_alarms(arc, start=evenly(40, 360))["failures"][0]
    assert (
        "few places" in pose_alarms(around(torch.tensor([0.0, 180]).repeat(20)), start=evenly(40, 360))["failures"][0]
    )


@pytest.mark.parametrize(("poses", "search"), [("known", "dictionary"), ("predicted", "sfm")])
def test_scene_alarms_given_or_registered_cameras_on_one_side_raise_none(scene, field, poses, search):
    rows = slice(0, 10)  # 90 degrees
    part = replace(scene, images=scene.images[rows], poses=scene.poses[rows], initial_poses=scene.poses[rows])
    result = scene_alarms(replace(CONFIG, poses=poses, search=search), part, field, part.poses)
    assert names(result) == [] and result["azimuth_spread"] < 0.2
    assert names(scene_alarms(CONFIG, part, field, part.poses)) == ["collapse"]


def test_pose_alarms_few_used_candidates_are_a_collapse():
    one = torch.zeros(20, dtype=torch.int64)
    assert abs(effective_use(one, 10) - 0.1) < 1e-6 and effective_use(torch.arange(20) % 10, 10) > 0.999
    assert "few candidates" in pose_alarms(evenly(20, 360), one, 10)["failures"][0]
    assert names(pose_alarms(evenly(20, 360), torch.arange(20) % 10, 10)) == []


def test_pose_alarms_share_of_rotated_views_is_a_duplication():
    assert "duplication: 30%" in pose_alarms(evenly(20, 360), duplication=0.3)["failures"][0]
    assert names(pose_alarms(evenly(20, 360), duplication=0.0)) == []


def test_neighbour_degrees_between_similar_views():
    images = torch.zeros(4, 3, 8, 8)
    images[1], images[2], images[3] = 0.1, 0.7, 0.75
    difference = neighbour_degrees(around(torch.tensor([350.0, 20, 100, 260])), images)
    assert torch.allclose(difference, torch.tensor([30.0, 30, 160, 160]), atol=1e-2)


def test_pose_alarms_few_cameras_far_below_the_search_are_strays():
    poses = evenly(20, 360)
    down = torch.nn.functional.normalize(torch.tensor([1.0, 0.0, -0.4]), dim=0)  # 22 degrees below
    for strays, failures in ((1, []), (2, ["stray cameras"])):
        moved = poses.clone()
        moved[:strays] = orbit_poses(down.expand(strays, 3), poses[0, :3, 3].norm())
        assert names(pose_alarms(moved, min_elevation=5.0)) == failures
        assert names(pose_alarms(moved, min_elevation=-10.0)) == []


def test_pose_alarms_most_cameras_inverted_strays_are_not_run():
    upside_down = evenly(20, 360) @ torch.diag(torch.tensor([-1.0, -1, 1, 1]))
    alarms = pose_alarms(upside_down, min_elevation=5.0)
    assert names(alarms) == ["mirror"]
    (stray,) = [check for check in alarms["checks"] if check["name"] == "stray cameras"]
    assert stray["status"] == "not run" and stray["reason"] == "since most cameras are inverted"


def test_scene_alarms_true_cameras_raise_none(scene, field):
    result = scene_alarms(CONFIG, scene, field, scene.poses)
    assert result["failures"] == [] and not result["mirrored"] and result["inverted"] == 0
    assert result["error"] < 0.05 and result["offset_median"] < 15 and result["offset_opposite"] == 0


def test_scene_alarms_random_cameras_are_scattered_and_unexplained(scene, field):
    torch.manual_seed(0)
    wrong = scene.poses[torch.randperm(40)]
    result = scene_alarms(CONFIG, scene, field, wrong)
    assert names(result) == ["scatter", "unexplained"] and result["error"] > 0.8 and result["offset_quartile"] > 30
    early = scene_alarms(CONFIG, scene, field, wrong, settled=False)
    assert early["failures"] == [] and early["error"] == result["error"], "an early search is no failure, but is logged"
    assert names(scene_alarms(CONFIG, scene, field, wrong, exact=False)) == ["scatter"]


def test_scene_alarms_few_misplaced_views_raise_none(scene, field):
    some = scene.poses.clone()
    directions = torch.nn.functional.normalize(some[:4, :3, 3], dim=1)
    some[:4] = orbit_poses(rotate_about_z(directions, 20.0), scene.distance)
    assert names(scene_alarms(CONFIG, scene, field, some)) == []


def test_unexplained_variance_is_a_share_of_the_views_variance(scene, field):
    assert unexplained_variance(field, scene, scene.poses, 32) < 0.05
    same = scene.poses[:1].expand(40, 4, 4)
    assert 0.8 < unexplained_variance(field, scene, same, 32) < 3
    faint = replace(scene, images=1 - (1 - scene.images) * 0.1)
    assert unexplained_variance(field, faint, scene.poses, 32) > 5, "in units of what is there to explain"


def test_unexplained_variance_views_of_other_exposure_are_rendered_with_their_appearance(scene):
    field = make_scene_field()
    field.background, field.appearance = None, Appearance(len(scene.poses), 2)
    torch.nn.init.normal_(field.appearance.codes, std=0.3)
    with torch.no_grad():
        rows = torch.arange(len(scene.poses))
        images = render_views(field, scene.poses, scene.camera, scene.size, 32, views=rows).color.movedim(-1, 1)
    assert unexplained_variance(field, replace(scene, images=images), scene.poses, 32) < 0.01


def test_pose_alarms_inverted_depth_is_a_mirror(scene):
    """Two ways it shows: cameras at minus their elevation, as upright ones take it, or upside down."""
    directions = torch.nn.functional.normalize(scene.poses[:, :3, 3], dim=1)
    below = orbit_poses(directions * torch.tensor([1.0, -1, -1]), scene.distance)
    rolled = scene.poses * torch.tensor([-1.0, -1, 1, 1])
    for mirror in (below, rolled):
        assert inverted_share(mirror, 5.0) > 0.9 and inverted_share(scene.poses, 5.0) == 0
        assert names(pose_alarms(mirror, min_elevation=5.0)) == ["mirror"]
        assert pose_alarms(mirror, true=scene.poses)["mirrored"]
    # with both signs of elevation allowed the poses alone do not tell
    assert names(pose_alarms(below, min_elevation=-70.0)) == []
    assert names(pose_alarms(scene.poses, true=scene.poses, min_elevation=5.0)) == []
    # the circle run through the other way round is another mistake than depth turned inside out
    assert not pose_alarms(orbit_poses(directions * torch.tensor([1.0, -1, 1]), scene.distance), true=scene.poses)[
        "mirrored"
    ]


def collapsing(tiny, monkeypatch, after: int) -> dict:
    """Settings of a joint training whose cameras all run to one place after so many inspections."""
    plain, count = joint.scene_alarms, [0]

    def alarms(config, scene, field, poses, **rest):
        count[0] += 1
        poses = evenly(len(poses), 10) if count[0] > after else orbit_poses(direction_grid(len(poses), [30]), DISTANCE)
        return plain(config, scene, field, poses, **rest | {"settled": False, "count": 1})

    monkeypatch.setattr(joint, "scene_alarms", alarms)
    monkeypatch.setattr(joint, "save_model_previews", lambda *args, **options: None)  # which takes most of the time
    for module in ("verdict", "stages.stage_training"):
        monkeypatch.setattr(f"factorkit.nerfdiff.{module}.write_report", lambda folder: None)
    return tiny | {"search": "joint", "sample_every": 1, "checkpoint_every": 1, "keep_checkpoints": 1, "steps": 6}


@pytest.mark.slow
def test_train_collapse_is_logged_and_best_checkpoint_remains(tiny, scene_views, tmp_path, monkeypatch, capsys):
    settings = collapsing(tiny, monkeypatch, after=3)
    run = train_nerfdiff(scene_views, out=tmp_path / "run", **settings)
    assert "step 4: collapse" in capsys.readouterr().err
    alarms = timeline(read_log(run.folder), "alarms")
    assert [bool(e["failures"]) for e in alarms] == [False] * 3 + [True] * 3
    best = min(alarms[:3], key=lambda e: e["error"])["step"]
    stored = sorted(p.name for p in (run.folder / "checkpoints").glob("step_*"))
    assert stored == [f"step_{best:08d}.safetensors", "step_00000006.safetensors"]
    before = NerfdiffRun.load(run.folder / "checkpoints" / stored[0], device="cpu")
    assert before.step == best and before.predict_pose(scene_views).poses.isfinite().all()


@pytest.mark.slow
def test_train_collapse_stops_with_stop_on_failure(tiny, scene_views, tmp_path, monkeypatch):
    settings = collapsing(tiny, monkeypatch, after=3)
    with pytest.raises(FactorkitError, match="stopped at step 4: collapse.*Earlier checkpoints are.*the best of"):
        train_nerfdiff(scene_views, out=tmp_path / "run", stop_on_failure=True, **settings)
    alarms = [e for e in read_log(tmp_path / "run") if e["event"] == "alarms"]
    assert alarms[-1]["step"] == 4 and alarms[-1]["failures"], "what it stopped for stands in the log"
    assert NerfdiffRun.load(tmp_path / "run", device="cpu").step == 3
    assert train_nerfdiff(scene_views, out=tmp_path / "run", stop_on_failure=False, **settings).step == 6


def test_silhouette_offset_of_centred_cameras_names_shifted_views(field, scene):
    foreground = Foreground(
        (scene.images - 1).abs().amax(1) > 0.1,
        torch.ones(40, 16, 16, dtype=torch.bool),
        scene.camera.pixel_intrinsics(16, 16).expand(40, 3, 3),
    )
    right = replace(scene, foreground=foreground)
    shifted = replace(right, foreground=replace(foreground, masks=foreground.masks.roll(2, dims=2)))
    offsets = [silhouette_offset(field, s, scene.poses, 32) for s in (right, shifted, scene)]
    assert offsets[0] < 0.02 and offsets[1] == pytest.approx(2 / 16, abs=0.03) and offsets[2] is None
    assert [silhouette_check(offset).status for offset in offsets] == ["passed", "failed", "not run"]
    empty = replace(right, foreground=replace(foreground, masks=foreground.masks & False))
    assert silhouette_offset(field, empty, scene.poses, 32) is None
