"""The search that finds the poses of a run: structure from motion to the end, and what follows where it is rejected."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.engine.run_folder import claimed, write_json
from factorkit.metrics.pose import pose_errors
from factorkit.nerfdiff import search, search_record, train, unregistered
from factorkit.nerfdiff.registered_views import LOCALISED, SFM_FOLDER, LocalisedViews
from factorkit.nerfdiff.run import NerfdiffRun
from factorkit.nerfdiff.search import Trial
from factorkit.nerfdiff.stages.sfm import MODEL, RESULT, SfmResult
from factorkit.nerfdiff.train import estimate, train_nerfdiff
from factorkit.utils.errors import CheckpointError, ConfigError, DataError
from tests.nerfdiff.textured import make_intrinsics_of, orbit, render_photo, render_turned

pytest.importorskip("pycolmap", reason="the extra `sfm`")
pytestmark = pytest.mark.usefixtures("short_flip_tests")
SIZE = (240, 320)
POSES = orbit(np.arange(0, 88, 11.0))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of textured photos without cameras."""
    folder = tmp_path_factory.mktemp("photos")
    for i, pose in enumerate(POSES):
        image = Image.fromarray(render_photo(pose, make_intrinsics_of(SIZE), SIZE)[0])
        image.save(folder / f"{i}.png")
        if i == 3:  # too blurred for features
            image.resize((16, 12), Image.Resampling.BOX).resize(image.size).save(folder / "3_blurred.png")
    return folder


@pytest.fixture
def settings(tiny):
    return {**tiny, "resolution": 16, "fov": 60.0}


@pytest.mark.slow
def test_train_auto_textured_photos_use_structure_from_motion_to_the_end(
    tmp_path, photos, settings, monkeypatch, capsys
):
    monkeypatch.setattr(search, "MAX_CROSS", dict.fromkeys(search.MAX_CROSS, np.inf))  # the field has a few steps only
    monkeypatch.setattr(unregistered, "MAX_ERROR_RATIO", np.inf)
    run = train_nerfdiff(photos, out=tmp_path / "run", **{**settings, "progress": True})
    assert run.config.search == "sfm"
    poses = torch.from_numpy(POSES[[int(name.removesuffix(".png")) for name in run.views.names]]).float()
    assert len(poses) >= 6 and pose_errors(run.poses, poses).rotation_degrees.max() < 3
    text = capsys.readouterr().err
    assert "Localised in the finished scene, not trained on: 1 of the 1 image" in text
    assert 'Tried search="sfm": held-out error' in text
    assert "left out of the training: 3_blurred.png." in (tmp_path / "run/report.html").read_text()
    assert run.localised.names == ("3_blurred.png",) and run.localised.poses.shape == (1, 4, 4)
    checked = {name for pair in run.check_epipolar().pairs for name in pair["views"]}
    assert checked <= set(run.views.names) and len(checked) >= 6  # 3_blurred.png has another kind of pose
    run.export(tmp_path / "transforms.json")
    frames = json.loads((tmp_path / "transforms.json").read_text())["frames"]
    assert len(frames) == len(poses) + 1
    assert [frame["file_path"] for frame in frames if frame.get("localised")] == ["images_factorkit/3_blurred.png"]
    torch.testing.assert_close(torch.tensor(frames[-1]["transform_matrix"]), run.localised.poses[0])
    monkeypatch.setattr(unregistered, "MAX_ERROR_RATIO", 0.0)
    (tmp_path / "run" / LOCALISED).unlink()
    again = train_nerfdiff(photos, out=tmp_path / "run", **settings)  # finished: it is loaded
    assert torch.equal(again.poses, run.poses)
    assert again.localised.names == () and again.localised.others == ("3_blurred.png",)
    pairs = again.check_epipolar().pairs
    search_record.exchange(tmp_path / "run", "dictionary", {"model": "nerfdiff", "search": "auto"})
    rejected = NerfdiffRun.load(tmp_path / "run/rejected/sfm", device="cpu")  # it still has its photos
    assert pairs and rejected.check_epipolar().pairs == pairs


@pytest.mark.slow
def test_train_auto_wrong_structure_from_motion_is_followed_by_the_dictionary(
    tmp_path, photos, settings, monkeypatch, capsys
):
    monkeypatch.setattr(search, "MAX_CROSS", dict.fromkeys(search.MAX_CROSS, 0.0))
    run = train_nerfdiff(photos, out=tmp_path / "run", **{**settings, "progress": True})
    assert run.config.search == "dictionary"
    text = capsys.readouterr().err
    assert "Rejected: a field fitted to half of the views" in text and 'Tried next: search="dictionary"' in text
    again = train_nerfdiff(photos, out=tmp_path / "run", **settings)
    assert torch.equal(again.poses, run.poses) and again.config.search == "dictionary"


@pytest.mark.slow
@pytest.mark.parametrize("is_accepted", [True, False])
def test_train_auto_rejected_dictionary_is_followed_by_structure_from_motion(
    tmp_path, photos, settings, monkeypatch, capsys, is_accepted
):
    monkeypatch.setattr(search, "MIN_SIDE", 1000)  # the dictionary is first
    monkeypatch.setattr(search, "MAX_CROSS", dict.fromkeys(search.MAX_CROSS, np.inf if is_accepted else 0.0))
    judge = lambda folder, name: Trial(name, 0.5, "not explained" if name == "dictionary" else "")  # noqa: E731
    monkeypatch.setattr(search, "judge_run", judge)
    train = partial(train_nerfdiff, photos, out=tmp_path / "run", **{**settings, "progress": True})
    if is_accepted:  # interrupted in the middle of the change from one to the other
        with monkeypatch.context() as patch:
            patch.setattr(search_record, "shutil", Mock(copyfile=Mock(side_effect=KeyboardInterrupt)))
            with pytest.raises(KeyboardInterrupt):
                train()
    run, text = train(), capsys.readouterr().err
    assert "images of 320 < 1000 pixels are too small" in text
    assert 'Tried search="dictionary": held-out error 0.500 of the variance; rejected: not explained.' in text
    if is_accepted:
        assert run.config.search == "sfm" and (tmp_path / "run/rejected/dictionary/checkpoints").is_dir()
        assert 'Tried search="sfm": held-out error 0.500 of the variance; not rejected.' in text
    else:
        assert run.config.search == "dictionary" and "of the variance; rejected: a field fitted to half" in text
    assert torch.equal(train().poses, run.poses)
    assert "sfm: features" not in capsys.readouterr().err  # nothing is repeated


@pytest.mark.slow
def test_train_auto_rejected_dictionary_of_small_images_says_why_nothing_follows(
    tmp_path, scene_views, tiny, monkeypatch, capsys
):
    monkeypatch.setattr(search, "judge_run", lambda folder, name: Trial(name, 0.5, "not explained"))
    train_nerfdiff(scene_views, out=tmp_path / "run", **{**tiny, "progress": True})
    text = capsys.readouterr().err
    assert 'search="sfm" was not tried: images of 8 < 128 pixels are too small' in text
    assert 'search="sfm" was not tried' in (tmp_path / "run/report.html").read_text().replace("&quot;", '"')
    (tmp_path / "run/search.json").unlink()  # as of an earlier version
    train_nerfdiff(scene_views, out=tmp_path / "run", **{**tiny, "progress": True})
    assert "was not tried" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("fov", [None, 48.9])
def test_train_sfm_photos_turned_on_the_spot_stop_before_the_training(tmp_path, settings, fov):
    (tmp_path / "photos").mkdir()
    for i, pixels in enumerate(render_turned(POSES[0], np.arange(-12, 20, 4.0), (120, 160))):
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    with pytest.raises(DataError, match=r"registered none of 7 images: the camera turned on the spot.* no parallax"):
        train_nerfdiff(tmp_path / "photos", out=tmp_path / "run", **{**settings, "search": "sfm", "fov": fov})
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize("obstacle", ["on the spot", "no pycolmap", "too few", "other settings"])
@pytest.mark.parametrize("name", ["auto", "dictionary", "sfm"])
def test_train_refused_sfm_leaves_the_folder_free_for_other_settings(
    tmp_path, photos, settings, monkeypatch, obstacle, name
):
    class StoppedError(Exception):
        pass

    def refuse(images, folder, ordered, progress):
        if obstacle == "no pycolmap":
            raise ConfigError("pycolmap is missing")
        return SfmResult((), tuple(image.name for image in images), None, "there is no parallax")

    few = tmp_path / "few"
    few.mkdir()
    Image.new("RGB", (32, 24)).save(few / "0.png")
    with monkeypatch.context() as patch:
        patch.setattr(search, "find_cameras", refuse)
        data = few if obstacle == "too few" else photos
        with pytest.raises((DataError, ConfigError)):
            train_nerfdiff(data, out=tmp_path / "run", **{**settings, "search": "sfm"})
    assert (tmp_path / "run" / "config.json").is_file()

    def stop(*args):
        raise StoppedError

    monkeypatch.setattr(search, "decide", lambda data, reading: ("sfm", "it is the first here"))
    monkeypatch.setattr(search, "find_cameras", stop)
    monkeypatch.setattr(train, "Training", stop)
    changes = {"resolution": 12} if obstacle == "other settings" else {}
    with pytest.raises(StoppedError):  # it began
        train_nerfdiff(photos, out=tmp_path / "run", **{**settings, "search": name, **changes})
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["search"] == name and stored["resolution"] == (12 if changes else 16)
    assert ("scene" in stored) == (name == "dictionary")
    with (
        pytest.raises(CheckpointError, match="not of segdiff"),
        claimed(tmp_path / "run", {"model": "segdiff"}, frozenset()),
    ):
        pass


@pytest.mark.parametrize(("ordered", "expected"), [("auto", False), ("no", False), ("yes", True)])
def test_train_sfm_ordered_compares_frames_in_order(tmp_path, photos, settings, monkeypatch, ordered, expected):
    def stop(images, folder, ordered, progress):
        raise RuntimeError(f"ordered is {ordered}")

    monkeypatch.setattr(search, "find_cameras", stop)
    with pytest.raises(RuntimeError, match=f"ordered is {expected}"):
        train_nerfdiff(photos, out=tmp_path / "run", **{**settings, "search": "sfm", "ordered": ordered})


@pytest.mark.parametrize("name", ["auto", "sfm", "dictionary"])
@pytest.mark.parametrize("as_array", [True, False])
def test_train_one_or_two_images_are_counted_before_the_split(tmp_path, settings, name, as_array):
    settings, images = {**settings, "search": name}, np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), np.uint8)
    for i, pixels in enumerate(images):
        (tmp_path / f"{i + 1}").mkdir()
        for k in range(i + 1):
            Image.fromarray(pixels).save(tmp_path / f"{i + 1}" / f"{k}.png")
    one, two = (images[:1], images) if as_array else (tmp_path / "1", tmp_path / "2")
    held_out = "000000" if as_array else "0.png"
    with pytest.raises(
        DataError, match=f": 1 view, 0 of them for training; {held_out} is held out .* give more images$"
    ):
        train_nerfdiff(one, out=tmp_path / "run", **settings)
    text = f": 2 views, 1 of them for training; {held_out} is held out for testing .*At least 2 .*open_views"
    with pytest.raises(DataError, match=text):
        train_nerfdiff(two, out=tmp_path / "run", **settings)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_report_registration_many_unregistered_are_all_in_the_report(tmp_path):
    names = tuple(f"{i}.png" for i in range(7))
    result = SfmResult(("a.png",), names, tmp_path / "model", plain=names[5:])
    assert "0.png, 1.png, 2.png, ..." in result.describe()[0]
    folder = tmp_path / SFM_FOLDER
    (folder / MODEL).mkdir(parents=True)
    (folder / MODEL / "images.bin").touch()
    write_json(folder / RESULT, {"result": asdict(result) | {"model": MODEL}})
    (tmp_path / "config.json").write_text("{}")
    for _ in range(2):
        unregistered.report_registration(tmp_path, LocalisedViews(names[:4], torch.zeros(4, 4, 4), names[4:]))
    text = (tmp_path / "report.html").read_text()
    assert "left out of the training: 0.png, 1.png, 2.png, 3.png, 4.png, 5.png, 6.png." in text
    assert "did not register: 0.png, 1.png, 2.png, 3.png." in text and "5.png, 6.png" in text
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_estimate_auto_says_which_search_would_run_and_why(photos, settings):
    with_sfm = estimate(photos, **{k: v for k, v in settings.items() if k != "progress"})
    assert with_sfm["notes"][0].startswith('search="sfm": ') and "images match another one" in with_sfm["notes"][0]
    assert "A dry run finds no cameras" in with_sfm["notes"][1]
    small = estimate(photos, **{k: v for k, v in settings.items() if k != "progress"}, poses="learned")
    assert not any("search=" in note for note in small["notes"])
