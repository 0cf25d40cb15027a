"""factorkit reproduce on the command line."""

from __future__ import annotations

import json
from functools import partial

import pytest

from factorkit.reproduce import experiments
from factorkit.reproduce.experiment import CellResult, Citation, Experiment, Row, percent


@pytest.fixture
def setups(monkeypatch):
    """Register one experiment; return the list of setups it was run with."""
    recorded = []

    def work(setup, seed):
        recorded.append(setup)
        return CellResult({"iou": 0.25 * (seed + 1)})

    experiment = Experiment(
        name="table9.1",
        title="numbers",
        data="none",
        duration={"small": "no time", "gpu": "-", "full": "-"},
        columns=(percent("iou", "IoU"),),
        rows=lambda setup: [Row("ours", partial(work, setup))],
        citations=(Citation("theirs", "a paper", {"iou": 0.5}),),
    )
    monkeypatch.setattr(experiments, "list_experiments", lambda: {"table9.1": experiment})
    return recorded


def test_reproduce_list_shows_data_duration_and_citations(run_cli, run_json):
    result = {e["name"]: e for e in run_json("reproduce", "--list")["experiments"]}
    assert {"table2.1", "table2.3", "table2.5", "table3.1", "fig2.18", "fig3.11"} <= set(result)
    assert result["table2.6"]["citations"][-1] == "ours: IoU 56.1, FID 10.28 (dissertation, table 2.6, on CUB)"
    code, out, _ = run_cli("reproduce", "--list")
    assert code == 0 and "table2.1  unsupervised foreground on Flower  (draws fig2.3, fig2.19)" in out
    assert "small   5 minutes a seed for the default" in out and "prints  Acc, mIoU, 1 seed\n" in out


def test_reproduce_prints_table_and_path(setups, run_cli, run_json, tmp_path):
    words = ("reproduce", "table9.1", "--seeds", 2, "--out", tmp_path, "--ignore", 128, "--holdout", 40)
    code, out, err = run_cli(*words)
    assert code == 0 and "37.5 +- 17.7" in out and "theirs (cited: a paper)" in out
    assert "seed 1" in err and f"table  {tmp_path / 'table9.1' / 'table.md'}" in out
    assert setups[0].options == {"ignore": 128, "holdout": 40} and setups[0].device == "auto"
    assert setups[0].changes == {}
    run_json("reproduce", "table9.1", "--seeds", 1, "--out", tmp_path / "uvit", "--backbone", "uvit")
    assert setups.pop().changes == {"backbone": "uvit"}
    result = run_json(*words)
    assert result["folder"] == str(tmp_path / "table9.1") and len(setups) == 2
    assert result["rows"] == json.loads((tmp_path / "table9.1" / "table.json").read_text())["rows"]


def test_reproduce_bad_options_are_refused(setups, run_refused, tmp_path):
    assert "--list" in run_refused("reproduce") and "'table9.2'" in run_refused("reproduce", "table9.2")
    assert "'huge'" in run_refused("reproduce", "table9.1", "--scale", "huge")
    assert "no row 'hers'" in run_refused("reproduce", "table9.1", "--rows", "hers", "--out", tmp_path)
