from __future__ import annotations

import dataclasses

import pytest
import torch

from factorkit.engine.run_log import RunLog
from factorkit.report.content import Check, log_checks, summarise_checks
from factorkit.segdiff.alarms import Alarms, measure_alarms
from factorkit.segdiff.drawn_images import DRAWN_IMAGES
from factorkit.segdiff.verdict import REPORT, judge_regions, read_verdict, write_report

SPLIT = "split by position: position alone explains 0.95 > 0.8 of the masks' variance"
BASELINES = {"centre_disc": {"iou": 0.571}, "2-means": {"iou": 0.866}, "GrabCut": {"unavailable": "no opencv"}}
CONTENT = Alarms(0.45, 0.4, 0.05, 0.95, [0.4, 0.6], 0.9, 0.1, None, 0.5, 0.4, 0.9)
COLOUR = dataclasses.replace(CONTENT, two_means_agreement=0.99)
POSITIONAL = dataclasses.replace(CONTENT, position_share=0.95)
COLLAPSED = dataclasses.replace(CONTENT, areas=[0.0, 1.0])
MIXTURE = dataclasses.replace(CONTENT, error=0.2)
PALE = dataclasses.replace(CONTENT, error=0.2, color_share=0.5)
UNMEASURED = dataclasses.replace(CONTENT, error=0.2, color_share=None)


def logged(alarms: Alarms, steps: int | None = None) -> list[dict]:
    record = alarms.to_dict(steps)
    drawn = Check(DRAWN_IMAGES, 0.1, high=0.5).to_dict()
    return [{"event": "alarms", "step": 40, **record, "checks": [*record["checks"], drawn]}]


@pytest.mark.parametrize(
    ("alarms", "iou", "status", "words"),
    [
        (CONTENT, 0.874, "good", "The masks beat every baseline"),
        (CONTENT, 0.5, "mixed", "The masks follow content, but do not beat the best baseline, 2-means"),
        (COLOUR, 0.86, "mixed", "The regions follow colour, but do not beat the best baseline, 2-means"),
        (MIXTURE, 0.5, "mixed", "The masks follow content, but do not beat the best baseline, 2-means"),
        (UNMEASURED, 0.5, "bad", "The masks do not beat the best baseline"),
        (POSITIONAL, 0.874, "mixed", "although an alarm went off"),
        (POSITIONAL, 0.5, "bad", "Failed: split by position"),
        (POSITIONAL, None, "bad", "Failed: split by position"),
        (COLLAPSED, None, "bad", "Failed: collapsed to one region"),
        (CONTENT, None, "open", "The masks follow content; whether they are objects was not checked"),
        (COLOUR, None, "open", "The regions follow colour; whether they are objects was not checked"),
        (MIXTURE, None, "open", "The masks follow content; whether they are objects was not checked"),
        (PALE, None, "bad", "Failed: masks are not about content"),
        (UNMEASURED, None, "open", "No verdict: no check that separates right from wrong runs has run"),
    ],
)
def test_judge_regions_weighs_checks_and_scores(alarms, iou, status, words):
    scores = {} if iou is None else {"iou": iou, "scored": 55, "baselines": BASELINES}
    verdict = judge_regions(logged(alarms), scores)
    assert verdict.status == status and words in verdict.headline
    undecided = "no check that separates right from wrong runs has run"
    expected = "; ".join(alarms.failures()) or (undecided if alarms is UNMEASURED else "no alarm went off")
    assert f"Without labels at step 40: {expected}." in verdict.details
    sentence = "No labelled images were scored" if iou is None else f"IoU {iou:.3f} on 55 labelled images; baselines"
    assert any(sentence in detail for detail in verdict.details)


def test_every_check_is_one_sentence_with_value_and_limit_or_reason():
    lines = summarise_checks(logged(MIXTURE))
    assert "position share: passed, 0.400 (at least 0.05 and at most 0.8)." in lines
    assert any(line.startswith("eta gap: not run, since regions of a mixture have no colours") for line in lines)
    collapsed = summarise_checks(logged(COLLAPSED))
    assert "smallest area: failed, 0.000 (at least 0.01)." in collapsed
    assert sum("not run, since all pixels lie in one region" in line for line in collapsed) == 7


@pytest.mark.parametrize("alarms", [CONTENT, COLOUR, MIXTURE])
def test_a_training_of_few_steps_is_never_said_to_follow_content(alarms):
    verdict = judge_regions(logged(alarms, 25), {})
    assert verdict.status == "open" and verdict.headline.startswith("No verdict: no check")
    assert "explained colour: not run, since it takes 100 training steps, and there were 25." in verdict.details
    assert judge_regions(logged(alarms, 100), {}).headline.endswith("whether they are objects was not checked")
    failed = dataclasses.replace(alarms, color_share=0.1)
    assert judge_regions(logged(failed, 25), {}).headline == "Failed: masks are not about content"


def test_a_log_without_checks_is_never_green():
    for fields in ({"failures": []}, log_checks([])):
        verdict = judge_regions([{"event": "alarms", "step": 40, **fields}], {})
        assert verdict.status == "open" and "no check that separates right from wrong runs" in verdict.headline
        assert not any("no alarm went off" in line for line in verdict.details)


def test_masks_that_are_the_colour_clusters_or_their_own_mean_are_recognised():
    generator = torch.Generator().manual_seed(0)
    inside = torch.zeros(24, 16, 16, dtype=torch.bool)
    for image, (y, x) in zip(inside, torch.randint(1, 8, (24, 2), generator=generator).tolist(), strict=True):
        image[y : y + 7, x : x + 7] = True
    images = torch.where(inside[:, None], 0.7, -0.6) + 0.05 * torch.randn(24, 3, 16, 16, generator=generator)
    masks = torch.stack([inside, ~inside], 1).float()
    by_colour = measure_alarms(images, masks, masks.flip(3))
    assert by_colour.two_means_agreement == pytest.approx(1)
    assert judge_regions(logged(by_colour), {}).headline.startswith("The regions follow colour; whether")
    fixed = masks[:1].expand(24, -1, -1, -1)
    positional = measure_alarms(images, fixed, fixed)
    assert positional.mean_mask_agreement == pytest.approx(1) and abs(positional.two_means_agreement) < 0.7
    assert any("with their own mean over all images" in failure for failure in positional.failures())


def test_read_verdict_only_the_last_alarms_count(tmp_path):
    with RunLog(tmp_path) as log:
        log.event("alarms", step=10, **POSITIONAL.to_dict())
        log.event("alarms", step=20, **CONTENT.to_dict())
    assert read_verdict(tmp_path).status == "open"
    page = write_report(tmp_path).read_text()
    assert "Checks without labels" in page and "passed, 0.450 (at least 0.3)" in page


def test_judge_regions_model_without_masks_is_not_judged():
    verdict = judge_regions([{"event": "step", "step": 10, "loss": 0.2}, {"event": "alarms", "step": 10}], {})
    assert verdict.status == "open" and verdict.headline == "No verdict yet"


def test_headline_tiles_name_the_best_baseline():
    tiles = REPORT.tiles({"eta_gap": 0.4}, {"iou": 0.874, "baselines": BASELINES})
    assert [tile.value for tile in tiles] == ["0.874", "", "0.400", ""] and tiles[0].note == "best baseline 0.866"
    assert tiles[2].note == "alarm below 0.3"
    alarms = dataclasses.replace(CONTENT, error=0.2, place_gain=0.4, place_share=0.6).to_dict()
    assert [tile.note for tile in REPORT.tiles(alarms, {})[2:]] == ["alarm below 0.05", "no limit"]
    assert REPORT.tiles(alarms, {})[2].value == "0.400"
