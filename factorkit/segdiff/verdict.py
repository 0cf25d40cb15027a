"""Whether a segdiff run succeeded, and what its report shows."""

from __future__ import annotations

import os
from pathlib import Path

from factorkit.report import html
from factorkit.report.content import (
    AlarmLimits,
    Curve,
    Log,
    Record,
    ReportContent,
    Tile,
    Verdict,
    best_baseline,
    format_number,
    judged_alarms,
    passed_decisively,
    read_checks,
    sorted_baselines,
    summarise_checks,
)
from factorkit.segdiff.alarms import (
    MAX_MEAN_MASK_AGREEMENT,
    MAX_POSITION_SHARE,
    MIN_COLOR_SHARE,
    MIN_ETA_GAP,
    MIN_FLIP_AGREEMENT,
    MIN_PLACE_GAIN,
    MIN_POSITION_SHARE,
)
from factorkit.segdiff.drawn_images import DRAWN_IMAGES
from factorkit.utils.errors import format_count
from factorkit.utils.files import is_number

COLOR_AGREEMENT = 0.7  # with two colour clusters of each image (kappa), from which the regions are called colours


def judge_regions(log: Log, scores: Record) -> Verdict:
    """Judge a run by its newest checks without labels and its scores against the baselines.

    Only labels show whether regions are objects, so without scores above the baselines no verdict is "good".
    """
    alarms, failures = judged_alarms(log)  # a model without masks logs the event without failures
    iou, best = scores.get("iou"), best_baseline(scores)
    details = [] if alarms is None else summarise_checks(log)
    agreement = [check.get("value") for check in read_checks(log) if check.get("name") == "agreement with 2-means"]
    follows_color = any(is_number(value) and value >= COLOR_AGREEMENT for value in agreement)
    subject = "The regions follow colour" if follows_color else "The masks follow content"

    if is_number(iou):
        scored = scores.get("scored")
        sentence = f"IoU {iou:.3f}" + (
            f" on {format_count(int(scored), 'labelled image')}" if is_number(scored) else ""
        )
        others = [f"{name} {row['iou']:.3f}" for name, row in sorted_baselines(scores) if is_number(row.get("iou"))]
        details.append(f"{sentence}; baselines: {', '.join(others) or 'none was scored'}.")
    elif isinstance(levels := scores.get("accuracy"), list):
        by_level = ", ".join(f"{value:.3f} at level {n}" for n, value in enumerate(levels, start=1))
        details.append(f"Accuracy {by_level}, on {scores.get('scored')} labelled images; no baseline was scored.")
    elif alarms is not None:
        details.append("No labelled images were scored: the checks show content, not objects.")

    if is_number(iou) and best is not None:
        above = iou > best[1]
        if above and failures:
            return Verdict("mixed", "The masks beat every baseline, although an alarm went off", details)
        if above and not any(c.get("name") == DRAWN_IMAGES and "value" in c for c in read_checks(log)):
            details.append(
                "`factorkit evaluate RUN --generation --images PHOTOS` checks them, after 100 training steps."
            )
            return Verdict("mixed", "The masks beat every baseline, but drawn images were not checked", details)
        if above:
            return Verdict("good", "The masks beat every baseline", details)
        if not failures:
            checked = follows_color or passed_decisively(log)
            start = f"{subject}, but" if checked else "The masks"
            return Verdict("mixed" if checked else "bad", f"{start} do not beat the best baseline, {best[0]}", details)
    if failures:
        return Verdict("bad", "Failed: " + failures[0].split(":")[0], details)
    if follows_color or passed_decisively(log):
        return Verdict("open", f"{subject}; whether they are objects was not checked", details)
    if not details:
        return Verdict("open", "No verdict yet", ["There are neither alarms nor scores."])
    return Verdict("open", "No verdict: no check that separates right from wrong runs has run", details)


def headline_tiles(alarms: Record, scores: Record) -> list[Tile]:
    """Return the numbers that segdiff is judged by."""
    best = best_baseline(scores)
    lows = {check.get("name"): check.get("low") for check in read_checks([{"event": "alarms", "step": 0, **alarms}])}

    def describe(name: str, key: str, limit: float) -> Tile:
        low = lows.get(name, limit)
        return Tile(name, format_number(alarms.get(key)), "no limit" if low is None else f"alarm below {low:g}")

    if is_number(alarms.get("place_gain")):
        content = describe("place gain", "place_gain", MIN_PLACE_GAIN)
    else:
        content = describe("eta gap", "eta_gap", MIN_ETA_GAP)
    return [
        Tile("IoU", format_number(scores.get("iou")), f"best baseline {best[1]:.3f}" if best else ""),
        Tile("IoU, per-image oracle", format_number(scores.get("oracle_iou")), "an upper bound"),
        content,
        describe("explained colour", "color_share", MIN_COLOR_SHARE),
    ]


REPORT = ReportContent(
    judge=judge_regions,
    tiles=headline_tiles,
    curves=(
        Curve(
            "Area of each region",
            "A band that vanishes is a region that died; one that fills all is a collapse.",
            "areas",
            band="region",
        ),
        Curve("Entropy of the masks", "Zero where every pixel belongs entirely to one region.", "entropy"),
    ),
    alarm_limits={
        "eta_gap": AlarmLimits("eta gap", low=MIN_ETA_GAP),
        "place_gain": AlarmLimits("place gain", low=MIN_PLACE_GAIN),
        "position_share": AlarmLimits("position share", low=MIN_POSITION_SHARE, high=MAX_POSITION_SHARE),
        "color_share": AlarmLimits("explained colour", low=MIN_COLOR_SHARE),
        "flip_agreement": AlarmLimits("flip agreement", low=MIN_FLIP_AGREEMENT),
        "mean_mask_agreement": AlarmLimits("agreement with the mean mask", high=MAX_MEAN_MASK_AGREEMENT),
    },
    first_grids=("segmentation",),
)


def read_verdict(folder: str | os.PathLike[str]) -> Verdict:
    """Judge the run in ``folder`` by its last alarms and its scores, as far as there are any."""
    return html.read_verdict(folder, REPORT)


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write ``folder/report.html``; see :func:`factorkit.report.html.write_report`."""
    return html.write_report(folder, REPORT)
