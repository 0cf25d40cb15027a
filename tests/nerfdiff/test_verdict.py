from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from factorkit.engine.run_log import RunLog
from factorkit.nerfdiff.verdict import REPORT, write_report
from factorkit.report.html import read_verdict

SCORES = {"rotation_median_deg": 0.4, "under_10_deg": 1.0, "psnr": 28.1, "psnr_encoder": 25.0}


def run(folder: Path, failures: list[str] | None, scores: dict | None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model": "nerfdiff", "steps": 20}))
    with RunLog(folder) as log:
        watched = {"classified": 0.7, "candidate_use": [0.5, 0.3, 0.2]}
        log.event("step", step=20, loss=0.1, seconds=3.0, images_per_second=9.0, **watched)
        if failures is not None:
            log.event("alarms", step=20, azimuth_spread=0.9, failures=failures)
    if scores is not None:
        (folder / "scores.json").write_text(json.dumps(scores))
    return folder


@pytest.mark.parametrize(
    ("failures", "scores", "status", "words"),
    [
        ([], SCORES, "good", "cameras are correct"),
        (["collapse: one side"], SCORES, "mixed", "The cameras are correct, although an alarm went off"),
        (["collapse: one side"], SCORES | {"under_10_deg": 0.4}, "bad", "collapse"),
        ([], SCORES | {"poses": "predicted"}, "good", "cameras are correct"),
        ([], SCORES | {"poses": "known"}, "open", "No verdict: no check"),
        (["collapse: one side"], SCORES | {"poses": "known"}, "bad", "collapse"),
        ([], SCORES | {"under_10_deg": 0.4, "mirrored": False}, "bad", "wrong"),
        ([], SCORES | {"under_10_deg": 0.1, "mirrored": True}, "bad", "mirror"),
        ([], None, "open", "No verdict: no check"),
        (None, None, "open", "No verdict yet"),
    ],
)
def test_read_verdict_weighs_alarms_and_scores(tmp_path, failures, scores, status, words):
    verdict = read_verdict(run(tmp_path / "run", failures, scores), REPORT)
    assert verdict.status == status and words in verdict.headline


@pytest.mark.slow
@pytest.mark.usefixtures("reports_with_curves")
def test_write_report_shows_degrees_and_no_region_scores(tmp_path):
    page = re.sub("base64,[^']*", "", write_report(run(tmp_path / "run", [], SCORES)).read_text())
    for words in ("rotation, median", "28.10", "Classifier", "Use of the candidates"):
        assert words in page
    assert "eta gap" not in page and "IoU" not in page
