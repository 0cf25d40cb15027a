from __future__ import annotations

import pytest

from factorkit.engine.log import RunLog
from factorkit.segdiff.verdict import REPORT, judge_regions, read_verdict

SPLIT = "split by position: position alone explains 0.95 > 0.8 of the masks' variance"
BASELINES = {"centre_disc": {"iou": 0.571}, "2-means": {"iou": 0.866}, "GrabCut": {"unavailable": "no opencv"}}


def make_alarms_event(step: int, **fields) -> dict:
    return {"event": "alarms", "step": step, **fields}


@pytest.mark.parametrize(
    ("failures", "iou", "status", "words"),
    [
        ([], 0.874, "good", "The masks follow content"),
        ([], 0.5, "mixed", "do not beat the best baseline"),
        ([SPLIT], 0.874, "mixed", "although an alarm went off"),
        ([SPLIT], 0.5, "bad", "Failed: split by position"),
        ([SPLIT], None, "bad", "Failed: split by position"),
        ([], None, "good", "The masks follow content"),
    ],
)
def test_judge_regions_weighs_alarms_and_scores(failures, iou, status, words):
    scores = {} if iou is None else {"iou": iou, "scored": 55, "baselines": BASELINES}
    verdict = judge_regions([make_alarms_event(40, failures=failures)], scores)
    assert verdict.status == status and words in verdict.headline
    assert any((SPLIT if failures else "no alarm went off") in sentence for sentence in verdict.details)
    sentence = "No labelled images were scored" if iou is None else f"IoU {iou:.3f} on 55 labelled images"
    assert any(sentence in detail for detail in verdict.details)


def test_read_verdict_only_the_last_alarms_count(tmp_path):
    with RunLog(tmp_path) as log:
        log.event("alarms", step=10, failures=[SPLIT])
        log.event("alarms", step=20, failures=[])
    assert read_verdict(tmp_path).status == "good"


def test_judge_regions_model_without_masks_is_not_judged():
    verdict = judge_regions([{"event": "step", "step": 10, "loss": 0.2}, make_alarms_event(10)], {})
    assert verdict.status == "open" and verdict.headline == "No verdict yet"


def test_headline_tiles_name_the_best_baseline():
    tiles = REPORT.tiles({"eta_gap": 0.4}, {"iou": 0.874, "baselines": BASELINES})
    assert [tile.value for tile in tiles] == ["0.874", "", "0.400"] and tiles[0].note == "best baseline 0.866"
