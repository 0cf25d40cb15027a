"""Cells, tables and errors, with an experiment that only returns numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from factorkit.engine.run_log import RunLog
from factorkit.report.content import Check, log_checks
from factorkit.reproduce import experiments, reproduce
from factorkit.reproduce.experiment import CellResult, CellUnavailableError, Citation, Column, Experiment, Row, percent
from factorkit.utils.errors import CheckpointError, ConfigError, DataError


@pytest.fixture
def numbers(monkeypatch):
    """An experiment whose rows count their computations; `numbers.fail` names a cell that is killed."""

    class Numbers:
        worked: list
        fail = None

    state = Numbers()
    state.worked = []

    def work(name, value):
        def cell(seed):
            if state.fail == (name, seed):
                raise KeyboardInterrupt
            state.worked.append((name, seed))
            return CellResult({"share": value + seed / 10, "odd": 2.0}, {"squares": np.full(2, seed)})

        return cell

    def raise_unavailable(seed):
        raise CellUnavailableError("put weights.pth there")

    rows = [
        Row("still", work("still", 0.5), max_seeds=1),
        Row("ours, new", work("ours, new", 0.3)),
        Row("weights", raise_unavailable),
    ]
    drawn = []
    experiment = Experiment(
        name="table9.1",
        title="numbers",
        data="none",
        duration={"small": "no time"},
        columns=(percent("share", "Share"), Column("odd", "Odd", lower=True)),
        rows=lambda setup: rows,
        citations=(Citation("theirs", "a paper", {"share": 0.123}),),
        figures=("fig9.2",),
        seeds=2,
        notes=("A note.",),
        draw=lambda setup, arrays: drawn.append(arrays.get("ours, new")) or ["images/x.png"],
    )
    state.drawn = drawn
    monkeypatch.setattr(experiments, "list_experiments", lambda: {"table9.1": experiment})
    return state


def test_table_has_mean_spread_citations_and_missing_cells(numbers, tmp_path):
    with pytest.warns(UserWarning, match="put weights.pth there"):
        report = reproduce("fig9.2", out=tmp_path, seeds=3, progress=False)
    result = json.loads((report.folder / "table.json").read_text())
    assert result == report.data and report.folder == tmp_path / "table9.1"
    still, ours, weights = result["rows"]
    assert ours["mean"]["share"] == pytest.approx(0.4) and ours["spread"]["share"] == pytest.approx(0.1)
    assert [cell["seed"] for cell in ours["cells"]] == [0, 1, 2]
    assert len(still["cells"]) == 1 and still["spread"]["share"] is None, "a deterministic row has one seed"
    assert weights["cells"] == [] and set(weights["not_run"].values()) == {"put weights.pth there"}
    page = (report.folder / "table.md").read_text()
    assert "| ours, new | 3 | 40.0 ± 10.0 | 2.00 ± 0.00 |" in page
    assert "| weights | 0 of 3 | not run | not run |" in page
    assert "| theirs (cited: a paper) |  | 12.3 | - |" in page
    assert "not run: weights, seed 0, 1, 2: put weights.pth there" in page and "A note." in page
    assert numbers.drawn[0]["squares"].tolist() == [0, 0] and "![images/x.png](images/x.png)" in page


@pytest.mark.filterwarnings("ignore:weights")
def test_finished_cells_are_not_computed_again_after_kill(numbers, tmp_path):
    numbers.fail = ("ours, new", 1)
    with pytest.raises(KeyboardInterrupt):
        reproduce("table9.1", out=tmp_path, progress=False)
    page = (tmp_path / "table9.1" / "table.md").read_text()
    assert "1 of 2" in page and "not run: ours, new, seed 1: not run yet" in page
    assert numbers.worked == [("still", 0), ("ours, new", 0)]
    numbers.fail = None
    report = reproduce("table9.1", out=tmp_path, progress=False)
    assert numbers.worked == [("still", 0), ("ours, new", 0), ("ours, new", 1)]
    assert report.data["rows"][1]["mean"]["share"] == pytest.approx(0.35)
    reproduce("table9.1", out=tmp_path, progress=False)
    assert len(numbers.worked) == 3


def test_rows_not_requested_are_marked(numbers, tmp_path):
    report = reproduce("table9.1", out=tmp_path, rows=["ours, new"], progress=False)
    assert numbers.worked == [("ours, new", 0), ("ours, new", 1)]
    assert report.data["rows"][0]["not_run"] == {"0": "not requested"} and "still, seed 0: not requested" in report.text


def test_reproduce_bad_arguments_are_refused(numbers, tmp_path):
    with pytest.raises(ConfigError, match="'table9.7'.*table9.1"):
        reproduce("table9.7", out=tmp_path)
    with pytest.raises(ConfigError, match="'tiny'.*small, gpu, full"):
        reproduce("table9.1", out=tmp_path, scale="tiny")
    with pytest.raises(ConfigError, match="seeds=0"):
        reproduce("table9.1", out=tmp_path, seeds=0)
    with pytest.raises(ConfigError, match="no row 'hers'.*'ours, new'"):
        reproduce("table9.1", out=tmp_path, rows=["hers"])
    reproduce("table9.1", out=tmp_path, rows=["still"], progress=False)
    with pytest.raises(CheckpointError, match="steps: None there, 7 requested"):
        reproduce("table9.1", out=tmp_path, rows=["still"], steps=7)
    with pytest.raises(DataError, match="x: no such file or folder"):
        reproduce("table9.1", tmp_path / "x", out=tmp_path, rows=["still"])


def test_table_lists_trainings_with_alarms_and_without_decisive_checks(monkeypatch, tmp_path):
    checks = {
        "right": Check("held-out error", 0.1, high=0.2, decisive=True),
        "wrong": Check("held-out error", 0.5, high=0.2, failures=("held-out views are not explained",), decisive=True),
        "short": Check("held-out error", not_run="since 2 steps are too few"),
    }

    def train(setup, name):
        def cell(seed):
            folder = setup.run_folder(name, seed)
            folder.mkdir(parents=True)
            with RunLog(folder) as log:
                log.event("alarms", step=2, **log_checks([checks[name]]))
            return CellResult({"odd": 2.0})

        return cell

    experiment = Experiment(
        name="table9.2",
        title="trainings",
        data="none",
        duration={"small": "no time"},
        columns=(Column("odd", "Odd"),),
        rows=lambda setup: [Row(name, train(setup, name)) for name in checks],
        seeds=1,
    )
    monkeypatch.setattr(experiments, "list_experiments", lambda: {"table9.2": experiment})
    report = reproduce("table9.2", out=tmp_path, progress=False)
    page = (report.folder / "table.md").read_text()
    for text in (page, report.text):
        assert "small-procedural-wrong-seed0: held-out views are not explained" in text
        assert "small-procedural-short-seed0: no check that separates right from wrong runs has run" in text
        assert "no alarm in 1 of 3 trainings" in text and "right-seed0" not in text
