"""What follows where alarms reject the poses of a search, with a stand-in for structure from motion."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch

from factorkit.engine.run_folder import write_json
from factorkit.engine.run_log import RunLog
from factorkit.nerfdiff import search, search_record
from factorkit.nerfdiff.box import box_checks
from factorkit.nerfdiff.epipolar_check import EPIPOLAR_CHECK, record_check
from factorkit.nerfdiff.held_out import forward_direction_check
from factorkit.nerfdiff.hull import HULL_CHECK
from factorkit.nerfdiff.registered_views import LOCALISED, MODEL_FOLDER, load_localised
from factorkit.nerfdiff.run import NerfdiffRun
from factorkit.nerfdiff.search_record import (
    CAMERA_CHECKS,
    SPREAD_CHECKS,
    SearchRecord,
    Trial,
    exchange,
    judge_run,
    load_record,
)
from factorkit.nerfdiff.stages import stage_training
from factorkit.nerfdiff.stages.sfm import RESULT, load_result
from factorkit.nerfdiff.train import train_nerfdiff
from factorkit.report.content import Check, log_checks, read_checks
from factorkit.utils.errors import CheckpointError
from factorkit.utils.files import read_log
from tests.nerfdiff.registered import stand_in


@pytest.fixture
def train(monkeypatch, tmp_path, scene_views, tiny):
    """Return a training by search="auto"; arguments: the first search, what :func:`judge_run` returns, options."""

    def train(first, judge, accept=True, **changes):
        for name, value in stand_in(first, accept).items():
            monkeypatch.setattr(search, name, value)
        monkeypatch.setattr(search, "judge_run", lambda folder, name: judge[name])
        monkeypatch.setattr(stage_training, "HELD_OUT_STEPS", 4)
        return train_nerfdiff(scene_views, out=tmp_path / "run", **{**tiny, "progress": True, **changes})

    return train


def reject(**cross: float) -> dict[str, Trial]:
    return {name: Trial(name, value, "not explained") for name, value in cross.items()}


@pytest.mark.parametrize(
    ("name", "for_sfm", "for_dictionary"),
    [
        ("held-out error", True, True),
        ("azimuth spread", False, True),
        (HULL_CHECK, False, False),
        ("object masks: views whose mask reaches the border", False, False),
        ("opacity at the box's faces", False, False),
    ],
)
def test_judge_run_failed_checks_of_cameras_alone_reject(tmp_path, name, for_sfm, for_dictionary):
    with RunLog(tmp_path) as log:
        checks = [Check(name, 0.5, high=0.2, failures=("a long sentence",)), Check("duplication", 0.0, high=0.05)]
        log.event("alarms", step=1, held_out_cross=0.5, **log_checks(checks))
    problem = f"{name}: failed, 0.500 (at most 0.2)"
    assert judge_run(tmp_path, "sfm") == Trial("sfm", 0.5, problem if for_sfm else "")
    assert judge_run(tmp_path, "dictionary") == Trial("dictionary", 0.5, problem if for_dictionary else "")


def test_judge_run_all_checks_of_a_run_are_of_cameras_or_named_here(finished):
    names = {check["name"] for check in read_checks(read_log(finished.folder))}
    of_cameras = CAMERA_CHECKS | SPREAD_CHECKS
    assert {*names, forward_direction_check(finished.poses).name} >= of_cameras
    box = {check.name for check in box_checks(finished.model.field, None, finished.poses, "forward")}
    assert names - of_cameras == {*box, HULL_CHECK, "disparity noise"}


@pytest.mark.parametrize("share", [None, 0.5, 0.9])
def test_judge_run_checks_of_a_later_evaluation_do_not_count(tmp_path, share):
    def make_check(value):
        return Check(EPIPOLAR_CHECK, value, low=0.85, failures=("sentence",) if value < 0.85 else ())

    with RunLog(tmp_path) as log:
        log.event("alarms", step=1, **log_checks([] if share is None else [make_check(share)]))
    expected = judge_run(tmp_path, "sfm")
    assert bool(expected.problem) == (share == 0.5)
    for later in (0.4, 0.95, 0.3):
        record_check(tmp_path, 1, make_check(later), is_later=True)
        assert judge_run(tmp_path, "sfm") == expected
        assert read_checks(read_log(tmp_path))[-1]["value"] == later


@pytest.mark.parametrize(
    "text",
    [
        *("{", "{}", '{"trials": null, "next": ""}', '{"trials": [], "next": 3}', '{"trials": "sfm", "next": ""}'),
        *('{"trials": [{"search": "sfm", "score": 1}], "next": ""}', '{"trials": [{"search": 3}], "next": ""}'),
        *('{"trials": [{}], "next": ""}', '{"trials": [{"search": "sfm", "cross": "0.3"}], "next": ""}'),
    ],
)
def test_load_record_damaged_file_is_named(tmp_path, text):
    (tmp_path / "search.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"search\.json cannot be read"):
        load_record(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"poses": [[1]], "names": [], "others": []}'])
def test_load_localised_damaged_file_is_named(tmp_path, text):
    (tmp_path / LOCALISED).parent.mkdir(parents=True)
    (tmp_path / LOCALISED).write_text(text)
    with pytest.raises(CheckpointError, match=r"localised\.json cannot be read"):
        load_localised(tmp_path)


@pytest.mark.parametrize("result", ["{}", "[]", '{"model": null, "registered": 3}', '{"model": null, "score": 1}'])
def test_load_result_damaged_file_is_named(tmp_path, result):
    (tmp_path / RESULT).write_text(f'{{"result": {result}}}')
    with pytest.raises(CheckpointError, match=r"sfm\.json cannot be read"):
        load_result(tmp_path)


@pytest.mark.parametrize(
    ("kept", "other", "reason"),
    [
        (0.3, 0.5, "no search has a lower held-out error"),
        (0.3, None, "only one held-out error was measured"),
        (None, None, "no held-out error was measured"),
    ],
)
def test_search_record_both_rejected_exchanged_only_for_a_lower_error(tmp_path, kept, other, reason):
    trials = Trial("sfm", kept, "x"), Trial("dictionary", other, "x")
    assert trials[0].is_better_than(trials[1]) == (other is not None) and not trials[1].is_better_than(trials[0])
    assert SearchRecord(trials).store(tmp_path, "sfm")[-1] == (
        f'Kept search="sfm", although alarms rejected it: {reason}.'
    )


def test_exchange_rejected_structure_from_motion_keeps_a_copy_of_its_cameras(tmp_path, monkeypatch):
    def write_run(folder, name):
        write_json(folder / "config.json", {"search": name, "scene": {}})
        (folder / "views.npz").write_text(name)

    (tmp_path / MODEL_FOLDER).mkdir(parents=True)
    for name in ("cameras.bin", "images.bin"):
        (tmp_path / MODEL_FOLDER / name).write_text(name)
    write_run(tmp_path, "sfm")
    rejected = tmp_path / "rejected/sfm"

    def copy_one(source, target, **options):
        target.mkdir(parents=True)
        (target / "images.bin").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(search_record.shutil, "copytree", copy_one)
        with pytest.raises(KeyboardInterrupt):
            exchange(tmp_path, "dictionary", {"search": "auto"})
    exchange(tmp_path, "dictionary", {"search": "auto"})
    assert (rejected / "views.npz").read_text() == "sfm"
    for folder in (tmp_path, rejected):
        for name in ("cameras.bin", "images.bin"):
            assert (folder / MODEL_FOLDER / name).read_text() == name
    write_run(tmp_path, "dictionary")
    exchange(tmp_path, "sfm", {"search": "auto"})
    assert (tmp_path / "views.npz").read_text() == "sfm" and not rejected.exists()
    assert not (tmp_path / "rejected/dictionary/stages").exists()


def test_search_record_add_again_keeps_the_order():
    record = SearchRecord().add(Trial("sfm")).add(Trial("dictionary")).add(Trial("sfm", 0.5))
    assert [trial.search for trial in record.trials] == ["sfm", "dictionary"]
    assert record.find("sfm") == Trial("sfm", 0.5) and record.find("joint") is None


def test_search_record_add_unmeasured_keeps_the_earlier_error_and_rejection():
    record = SearchRecord((Trial("sfm", 1.9, "half of the views do not explain the others"),))
    assert record.add(Trial("sfm")).find("sfm") == record.trials[0]
    assert record.add(Trial("sfm", None, "duplication")).find("sfm") == Trial("sfm", 1.9, "duplication")
    assert record.add(Trial("sfm", 0.1)).find("sfm") == Trial("sfm", 0.1)


@pytest.mark.slow
def test_train_auto_rejected_structure_from_motion_is_followed_by_the_dictionary(tmp_path, train, monkeypatch, capsys):
    judge = reject(sfm=0.3) | {"dictionary": Trial("dictionary", 0.5)}
    with monkeypatch.context() as patch:  # interrupted in the middle of the change from one to the other
        patch.setattr(search_record, "shutil", Mock(copyfile=Mock(side_effect=KeyboardInterrupt)))
        with pytest.raises(KeyboardInterrupt):
            train("sfm", judge)
    run, text = train("sfm", judge), capsys.readouterr().err
    assert run.config.search == "dictionary" and len(run.views) == 10
    assert 'Tried search="sfm": held-out error 0.300 of the variance; rejected: not explained.' in text
    assert 'Tried search="dictionary": held-out error 0.500 of the variance; not rejected.' in text
    assert 'Kept search="dictionary".' in text and not run.localised.names + run.localised.others
    rejected = NerfdiffRun.load(tmp_path / "run/rejected/sfm", device="cpu")
    assert (
        rejected.config.search == "sfm"
        and len(rejected.views) == 8
        and len(rejected.localised.names + rejected.localised.others) == 2
    )
    assert torch.equal(train("sfm", judge).poses, run.poses)
    assert "sfm: features" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["sfm", "dictionary"])
@pytest.mark.parametrize("first", ["sfm", "dictionary"])
def test_train_auto_both_rejected_keeps_the_lower_held_out_error(tmp_path, train, capsys, first, kept):
    other = {"sfm": "dictionary", "dictionary": "sfm"}
    judge = reject(**{kept: 0.3, other[kept]: 0.5})
    run, text = train(first, judge), capsys.readouterr().err
    assert run.config.search == kept and len(run.views) == {"sfm": 8, "dictionary": 10}[kept]
    assert f'Kept search="{kept}", although alarms rejected it: no search has a lower held-out error.' in text
    assert f'Tried search="{other[kept]}": held-out error 0.500 of the variance; rejected: not explained.' in text
    assert [path.name for path in (tmp_path / "run/rejected").iterdir()] == [other[kept]]
    assert torch.equal(NerfdiffRun.load(tmp_path / "run", device="cpu").poses, run.poses)
    localised = run.localised.names + run.localised.others
    assert sorted(localised) == (["view_008", "view_009"] if kept == "sfm" else [])
    assert "Kept search=" in (tmp_path / "run/report.html").read_text()
    assert torch.equal(train(first, judge).poses, run.poses)
    assert "Tried next" not in capsys.readouterr().err


@pytest.mark.slow
def test_train_auto_structure_from_motion_rejected_before_its_training_is_trained_if_nothing_is_better(
    tmp_path, train, monkeypatch, capsys
):
    judge = reject(sfm=0.4, dictionary=1e9)
    run, text = train("sfm", judge, accept=False), capsys.readouterr().err
    assert run.config.search == "sfm" and (tmp_path / "run/rejected/dictionary/checkpoints").is_dir()
    assert 'Tried next: search="sfm", rejected too, but with a lower held-out error.' in text


@pytest.mark.slow
def test_train_auto_rejected_structure_from_motion_stays_where_the_dictionary_cannot_follow(tmp_path, train, capsys):
    run, text = train("sfm", reject(sfm=0.5), unbounded="yes", field="grid"), capsys.readouterr().err
    assert run.config.search == "sfm" and not (tmp_path / "run/rejected").exists()
    assert 'search="dictionary" was not tried: unbounded="yes": it needs known poses' in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sfm", "dictionary"])
def test_train_explicit_search_rejected_by_alarms_is_not_replaced(tmp_path, train, capsys, name):
    run = train(name, reject(sfm=0.5, dictionary=0.5), search=name)
    assert run.config.search == name and not (tmp_path / "run/rejected").exists()
    assert "Tried" not in capsys.readouterr().err
