"""What factorkit wrote is never read as data, in whatever form it is met, and one line says what was left out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from factorkit.data import make_procedural_views, open_dataset, open_views
from factorkit.data.open import open_source
from factorkit.data.procedural.scene import make_scene_field
from factorkit.data.video import open_video
from factorkit.data.views.open import _find_own_exports
from factorkit.nerfdiff.export import export
from factorkit.reproduce.runner import fingerprint
from factorkit.utils.errors import DataError
from factorkit.utils.output_record import RECORD_NAME, OutputRecord, mark_output_folder

NAMES = [f"{i}.png" for i in range(3)]


@pytest.fixture
def photos(tmp_path, save):
    """Three photos, with results beside and below them, and one result that the user corrected."""
    for i in range(3):
        save(tmp_path / "photos" / f"{i}.png", (40 * i, 90, 10))

    def write(path):
        save(path)

    with OutputRecord(tmp_path / "photos") as record:
        record.write({"0_labels.png": write, "1_labels.png": write, "overview.png": write}, "0.png")
    with OutputRecord(tmp_path / "photos" / "deep" / "segmented") as record:
        record.write({"0_labels.png": write, "a/0_labels.png": write}, "0.png")
    save(tmp_path / "photos" / "runs" / "a" / "samples" / "grid.png")
    mark_output_folder(tmp_path / "photos" / "runs" / "a")
    return tmp_path / "photos"


def test_folder_with_results_reads_photos_alone_and_says_so(photos):
    with pytest.warns(UserWarning, match=r"left out 2 folders \(deep.segmented, runs.a\) and 3 images \(0_labels.png"):
        assert open_source(photos).names == NAMES
    with pytest.warns(UserWarning, match="left out"):
        dataset = open_dataset(photos)
    assert dataset.train.names == NAMES


def test_fingerprints_ignore_results(photos, tmp_path, save):
    for i in range(3):
        save(tmp_path / "plain" / "photos" / f"{i}.png", (40 * i, 90, 10))
    with pytest.warns(UserWarning, match="left out"):
        before = open_source(photos).fingerprint()
    assert fingerprint(photos, {}, None) == fingerprint(tmp_path / "plain" / "photos", {}, None)
    save(photos / "runs" / "a" / "later.png")
    with pytest.warns(UserWarning, match="left out"):
        assert open_source(photos).fingerprint() == before


def test_result_that_the_user_changed_is_read(photos, save):
    save(photos / "1_labels.png", (1, 2, 3), size=(30, 31))
    with pytest.warns(UserWarning, match="2 images"):
        assert open_source(photos).names == [*NAMES[:2], "1_labels.png", NAMES[2]]


@pytest.mark.parametrize("name", ["deep/segmented", "runs/a"])
def test_output_folder_itself_is_refused_until_its_record_is_deleted(photos, name):
    for read in (open_source, open_dataset, open_views):
        with pytest.raises(DataError, match=r"factorkit wrote this folder .* delete"):
            read(photos / name)
    with pytest.raises(DataError, match="factorkit wrote"):
        next(open_video(photos / name).frames)
    (photos / name / RECORD_NAME).unlink()
    assert open_source(photos / name).names


def test_subfolder_of_results_is_recognised_by_the_record_above(photos, save):
    save(photos / "deep" / "segmented" / "a" / "mine.png")
    with pytest.warns(UserWarning, match="1 image "):
        assert open_source(photos / "deep" / "segmented" / "a").names == ["mine.png"]


def test_list_leaves_out_results_but_a_single_file_is_read(photos):
    with pytest.warns(UserWarning, match="left out 3 images"):
        assert sorted(open_source(sorted(photos.glob("*.png"))).names) == NAMES
    assert open_source(photos / "0_labels.png").names == ["0_labels.png"]
    with pytest.raises(DataError, match="factorkit wrote all of these"):
        open_source(sorted(photos.glob("*_labels.png")))


def test_zip_of_folder_with_results_reads_photos_alone(photos, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "all"), "zip", tmp_path, "photos")
    with pytest.warns(UserWarning, match="left out 6 images"):
        assert open_source(archive).names == [f"photos/{name}" for name in NAMES]


def test_views_and_video_frames_ignore_results(photos):
    with pytest.warns(UserWarning, match="left out"):
        assert open_views(photos).names == NAMES
    with pytest.warns(UserWarning, match="left out"):
        assert open_video(photos).length == 3


def test_image_and_mask_folders_ignore_results(tmp_path, save):
    for i in range(4):
        save(tmp_path / "set" / "images" / f"{i}.png")
        save(tmp_path / "set" / "masks" / f"{i}.png", 255 * (i % 2), mode="L")
    with OutputRecord(tmp_path / "set" / "images") as record:
        record.write({"0_labels.png": lambda path: save(path)}, "0.png")
    with pytest.warns(UserWarning, match="1 image "):
        dataset = open_dataset(tmp_path / "set", holdout="none")
    assert dataset.train.names == [f"{i}.png" for i in range(4)]


def test_exported_cameras_beside_photos_are_not_read_as_their_poses(tmp_path, save):
    poses = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 4], [0, 0, 0, 1]]
    frames = [{"file_path": f"{i}.png", "transform_matrix": poses} for i in range(3)]
    text = json.dumps({"camera_angle_x": 0.8, "frames": frames})
    for i in range(3):
        save(tmp_path / "photos" / f"{i}.png")
    with OutputRecord(tmp_path / "photos") as record:
        record.write({"transforms.json": lambda path: path.write_text(text)}, "export")
    with pytest.warns(UserWarning, match=r"left out transforms\.json, which factorkit wrote"):
        assert open_views(tmp_path / "photos").poses is None
    (tmp_path / "photos" / "transforms.json").write_text(text + "\n")  # the user's now
    assert not _find_own_exports(tmp_path / "photos")
    with OutputRecord(tmp_path / "exported") as record:
        record.write({"transforms.json": lambda path: path.write_text(text)}, "export")
    assert not _find_own_exports(tmp_path / "exported")


def test_cameras_of_the_user_beside_an_exported_model_are_read(tmp_path):
    views = make_procedural_views(4, 8, seed=1)
    theirs = tmp_path / "scene" / "transforms.json"
    export(tmp_path / "made" / "transforms.json", views, make_scene_field())
    shutil.copytree(tmp_path / "made", theirs.parent)
    (theirs.parent / RECORD_NAME).unlink()
    other = replace(views, poses=views.poses.flip(0))
    export(theirs.parent, other, make_scene_field(), kind="colmap", points=50)
    with pytest.warns(UserWarning, match=r"left out sparse/0/cameras\.bin, which factorkit wrote"):
        assert torch.allclose(open_views(theirs.parent).poses, views.poses, atol=1e-5)
