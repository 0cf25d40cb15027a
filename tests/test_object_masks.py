"""Masks of views by a segdiff model that is trained on them."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import factorkit
from factorkit import object_masks
from factorkit.cli.main import main
from factorkit.data.procedural.scene import make_procedural_views
from factorkit.engine.run_folder import read_object, write_json
from factorkit.engine.run_log import RunLog
from factorkit.nerfdiff.mask_checks import HELP
from factorkit.nerfdiff.search import judge_run
from factorkit.report.content import Check
from factorkit.segdiff.alarms import MEAN_MASK, OWN_MEAN
from factorkit.segdiff.task import SegdiffTask
from factorkit.utils.errors import ConfigError, DataError
from factorkit.utils.files import read_log, timeline
from factorkit.utils.images import images_to_pixels
from tests.nerfdiff.conftest import TINY as SCENE
from tests.nerfdiff.textured import make_intrinsics_of, orbit, render_photo

TINY = {"resolution": 16, "model_channels": 8, "channel_mult": (1, 2), "mixture_steps": 3, "distil_steps": 3}


@pytest.fixture(autouse=True)
def tiny_segdiff(monkeypatch):
    monkeypatch.setattr(object_masks, "SETTINGS", object_masks.SETTINGS | TINY | {"preset": "demo", "threads": 1})
    monkeypatch.setattr(SegdiffTask, "inspect", lambda *arguments: {"failures": []})


@pytest.fixture
def photos(tmp_path):
    """A folder of 10 photos of the procedural scene, 20 x 16 pixels."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, pixels in enumerate(images_to_pixels(make_procedural_views(10, 16, seed=1).images)):
        Image.fromarray(np.pad(pixels, ((0, 0), (2, 2), (0, 0)), "edge")).save(folder / f"{i}.jpg")
    return folder


@pytest.mark.slow
def test_train_nerfdiff_segdiff_masks_become_the_masks_of_the_views(tmp_path, photos, capsys):
    run = factorkit.train_nerfdiff(photos, out=tmp_path / "run", masks="segdiff", **{**SCENE, "progress": True})
    folder = tmp_path / "run_masks/masks"
    assert sorted(path.name for path in folder.iterdir()) == [f"{i}.png" for i in range(10)]  # of held-out views too
    mask = np.asarray(Image.open(folder / "1.png"))
    assert mask.shape == (16, 20) and set(np.unique(mask)) <= {0, 255}
    stored = run.views.masks[run.views.names.index("1.jpg"), 0]
    assert abs(float(stored.mean()) - mask.mean() / 255) < 0.02
    assert (tmp_path / "run/samples/000000_masks.png").is_file()
    text = capsys.readouterr().err
    assert "10 masks in" in text and "trained on these views" in text and "region 0, the object" in text
    log = read_log(run.folder)
    names = [check["name"] for check in timeline(log, "alarms")[-1]["checks"]]
    assert "object masks: views whose mask reaches the border" in names and "agreement with the visual hull" in names
    times = [path.stat().st_mtime_ns for path in sorted(folder.iterdir())]
    again = factorkit.train_nerfdiff(photos, out=tmp_path / "run", masks="segdiff", **SCENE)
    assert torch.equal(again.poses, run.poses) and len(read_log(run.folder)) == len(log)
    assert [path.stat().st_mtime_ns for path in sorted(folder.iterdir())] == times


@pytest.mark.slow
def test_make_object_masks_interrupted_while_writing_resumes_to_the_same_files(tmp_path, photos, monkeypatch):
    object_masks.add_object_masks(photos, tmp_path / "whole", {}, progress=False)
    save, count = object_masks.save_image, []

    def stop(image, path):
        count.append(path)
        if len(count) == 4:
            raise KeyboardInterrupt
        save(image, path)

    monkeypatch.setattr(object_masks, "save_image", stop)
    with pytest.raises(KeyboardInterrupt):
        object_masks.add_object_masks(photos, tmp_path / "resumed", {}, progress=False)
    monkeypatch.setattr(object_masks, "save_image", save)
    object_masks.add_object_masks(photos, tmp_path / "resumed", {}, progress=False)
    for i in range(10):
        name = f"masks/{i}.png"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


@pytest.mark.slow
def test_add_object_masks_views_in_memory_are_cut_out_over_white(tmp_path):
    views = make_procedural_views(8, 16, seed=1)
    cut, masks = object_masks.add_object_masks(views, tmp_path / "masks", {}, progress=False)
    assert masks is None and cut.masks.shape == (8, 1, 16, 16) and cut.background.tolist() == [1, 1, 1]
    outside = (cut.masks == 0).expand_as(cut.images)
    assert outside.any() and (cut.images[outside] == 1).all()
    assert torch.equal(cut.images[~outside], views.images[~outside])


@pytest.mark.slow
def test_make_object_masks_without_an_object_are_refused(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(object_masks, "OBJECT_SHARES", (1.1, 2.0))
    with pytest.raises(DataError, match='masks="segdiff": no view has an object: the masks cover'):
        object_masks.add_object_masks(photos, tmp_path / "masks", {}, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("follows", [True, False])
def test_make_object_masks_that_follow_the_background_are_replaced_and_judged_again(
    tmp_path, photos, monkeypatch, follows
):
    """Only masks that fail the check of shared colours; the alarms of the model are of masks that are not used."""
    first = Check("colours", 0.8, low=0.94, failures=("masks follow the background: 0.80",) if follows else ())
    check = Mock(side_effect=[[first, Check("border", 0.1)], [Check("colours", 1.0, low=0.94), Check("border", 0.2)]])
    objects = torch.zeros(10, 64, 64)
    objects[:, 16:48, 16:48] = 1
    monkeypatch.setattr(object_masks, "check_object_masks", check)
    monkeypatch.setattr(object_masks, "cosegment", replace := Mock(return_value=objects))
    monkeypatch.setattr(SegdiffTask, "inspect", lambda *arguments: {"failures": ["of the model"], "checks": []})
    _, masks = object_masks.add_object_masks(photos, tmp_path / "masks", {}, progress=False)
    judged, stored = object_masks.judge_masks(tmp_path / "masks"), np.asarray(Image.open(Path(masks) / "3.png"))
    if follows:
        assert replace.call_args.args[0].shape == (10, 3, 64, 64) and replace.call_args.args[1].shape == (10, 64, 64)
        assert stored.shape == (16, 20) and stored.mean() / 255 == pytest.approx(0.25, abs=0.05)
        colors, border = judged["checks"]
        assert judged["failures"] == [] and border["value"] == 0.2
        assert colors["status"] == "not run" and "made by the colours" in colors["reason"]
        note = read_object(tmp_path / "masks" / object_masks.RECORD)["note"]
        assert "(shared colours 0.80 < 0.94), so the object was separated by the colours" in note
    else:
        assert not replace.called and check.call_count == 1
        assert judged["failures"] == ["of the model"]


MADE = {"checks": [{"name": "border", "status": "failed", "decisive": False, "value": 1.0}], "failures": ["cut"]}


@pytest.fixture
def write_log(tmp_path):
    """Function that writes an "alarms" event into the log of a folder, and returns the folder."""

    def write(name: str, **event) -> Path:
        with RunLog(tmp_path / name) as log:
            log.event("alarms", step=1, **event)
        return tmp_path / name

    return write


def test_make_object_masks_failed_alarms_are_printed_without_progress(write_log, monkeypatch, capsys):
    failure = "masks without objects: 0.10 < 0.25"
    folder = write_log("masks", failures=[failure, f"split by position: 0.92 > 0.9 with {OWN_MEAN}"])
    write_json(folder / object_masks.RECORD, MADE)
    monkeypatch.setattr(object_masks.segdiff, "train_segdiff", Mock())
    monkeypatch.setattr(object_masks, "_write_masks", Mock(return_value="3 masks"))
    pixels = np.zeros((8, 8, 3), np.uint8)
    object_masks.make_object_masks([lambda: pixels], ["0.png"], folder, progress=False)
    text = capsys.readouterr().err
    assert text == f"masks: probably not of one object: cut; {failure}. {HELP}\n"


def test_make_object_masks_without_failures_names_what_was_checked(write_log, monkeypatch, capsys):
    folder = write_log("masks", failures=[], checks=[{"name": "place gain", "status": "passed", "decisive": True}])
    checks = [{"name": "border", "status": "passed"}, {"name": "colours", "status": "not run"}]
    write_json(folder / object_masks.RECORD, {"checks": checks, "failures": []})
    monkeypatch.setattr(object_masks.segdiff, "train_segdiff", Mock())
    monkeypatch.setattr(object_masks, "_write_masks", Mock(return_value="3 masks"))
    object_masks.make_object_masks([lambda: np.zeros((8, 8, 3), np.uint8)], ["0.png"], folder, progress=True)
    assert "masks: no alarm went off, of: border, place gain\n" in capsys.readouterr().err


def test_judge_masks_leaves_out_agreement_with_the_mean_mask_and_decides_nothing(write_log):
    checks = [Check(MEAN_MASK, 0.95, high=0.9), Check("place gain", 0.3, low=0.05, decisive=True)]
    folder = write_log("masks", failures=[], checks=[check.to_dict() for check in checks])
    write_json(folder / object_masks.RECORD, MADE)
    judged = object_masks.judge_masks(folder)["checks"]
    assert [check["name"] for check in judged] == ["border", "place gain"]
    assert not any(check["decisive"] for check in judged)


def test_add_mask_checks_are_in_log_and_report_once_and_reject_no_search(write_log):
    folder = write_log("run", failures=[], checks=[], held_out_cross=0.1)
    for _ in range(2):
        object_masks.add_mask_checks(folder, MADE)
    alarms = read_log(folder)
    assert len(alarms) == 2 and alarms[-1]["failures"] == ["object masks, cut"] and alarms[-1]["held_out_cross"] == 0.1
    assert [check["name"] for check in alarms[-1]["checks"]] == ["object masks: border"]
    assert not judge_run(folder, "dictionary").problem
    assert "Failed: object masks, cut" in (folder / "report.html").read_text()


def test_train_nerfdiff_segdiff_masks_of_an_iterator_are_refused(tmp_path):
    with pytest.raises(DataError, match="can be read only once: give a list"):
        factorkit.train_nerfdiff(iter([]), out=tmp_path / "run", masks="segdiff")


def test_train_nerfdiff_segdiff_masks_impossible_settings_are_refused_first(tmp_path, photos):
    with pytest.raises(ConfigError, match="resolution"):
        factorkit.train_nerfdiff(photos, out=tmp_path / "run", masks="segdiff", resolution=1)
    assert not (tmp_path / "run_masks").exists()


def test_remove_still_background_of_a_turntable_leaves_the_object():
    size, poses = (48, 64), orbit(np.arange(0, 360, 30.0))
    photos = [render_photo(pose, make_intrinsics_of(size), size, still=True) for pose in poses]
    painted, is_still = object_masks.remove_still_background([Image.fromarray(pixels) for pixels, _ in photos])
    assert is_still
    for image, (_, mask) in zip(painted, photos, strict=True):
        left = np.ptp(np.asarray(image).astype(int), axis=-1) > 0
        assert left[mask].mean() > 0.9 and left[~mask].mean() < 0.2


@pytest.mark.parametrize("kind", ["the camera moves", "one colour", "two sizes", "few"])
def test_remove_still_background_other_captures_stay_as_they_are(kind):
    size, poses = (48, 64), orbit(np.arange(0, 360, 30.0))
    pixels = [render_photo(pose, make_intrinsics_of(size), size, still=kind != "the camera moves") for pose in poses]
    images = [Image.fromarray(np.where(m[..., None] | (kind != "one colour"), p, np.uint8(200))) for p, m in pixels]
    images = images[:4] if kind == "few" else images
    if kind == "two sizes":
        images[0] = images[0].resize((32, 24))
    unchanged, is_still = object_masks.remove_still_background(images)
    assert not is_still and all(a is b for a, b in zip(unchanged, images, strict=True))


def test_train_command_masks_segdiff_are_made_first(tmp_path, photos, monkeypatch, capsys):
    make = Mock(side_effect=DataError("the masks come first"))
    monkeypatch.setattr(object_masks, "add_object_masks", make)
    words = ["train", "nerfdiff", "--data", str(photos), "--out", str(tmp_path / "run"), "--masks", "segdiff"]
    assert main(words) != 0 and "the masks come first" in capsys.readouterr().err
    assert make.call_args.args[1] == tmp_path / "run_masks"


def test_train_nerfdiff_array_of_masks_is_passed_on(monkeypatch):
    train, masks = Mock(), np.ones((3, 8, 8), np.uint8)
    monkeypatch.setattr(object_masks.nerfdiff, "train_nerfdiff", train)
    factorkit.train_nerfdiff(np.zeros((3, 8, 8, 3), np.uint8), masks=masks)
    assert train.call_args.kwargs["masks"] is masks


def test_estimate_segdiff_masks_count_their_training(photos, monkeypatch):
    timed = Mock(return_value={"notes": ["read"], "seconds": 10.0})
    monkeypatch.setattr(object_masks.nerfdiff, "estimate", timed)
    monkeypatch.setattr(object_masks.segdiff, "estimate", lambda data, **settings: {"stage_seconds": 50.0})
    result = object_masks.estimate(photos, masks="segdiff")
    assert result["seconds"] == 60 and "is trained on the views first, for about 50 seconds" in result["notes"][0]
    assert timed.call_args.kwargs["masks"] == "none"
