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
)
from factorkit.segdiff.alarms import (
    MAX_BOUNDARY_LENGTH,
    MAX_POSITION_SHARE,
    MIN_ETA_GAP,
    MIN_FLIP_AGREEMENT,
    MIN_POSITION_SHARE,
)
from factorkit.utils.jsonl import is_number


def judge_regions(log: Log, scores: Record) -> Verdict:
    """Judge a run by its newest label-free alarms and its scores against the baselines."""
    alarms, failures = judged_alarms(log)  # a model without masks logs the event without failures
    iou, best = scores.get("iou"), best_baseline(scores)
    details = []
    if alarms is not None:
        details.append(f"Without labels, at step {alarms['step']:g}: {'; '.join(failures) or 'no alarm went off'}.")
    above_baselines = None
    if is_number(iou):
        scored = scores.get("scored")
        sentence = f"IoU {iou:.3f}" + (f" on {scored:g} labelled images" if is_number(scored) else "")
        if best is None:
            sentence += "; no baseline was scored yet"
        else:
            above_baselines = iou > best[1]
            sentence += f"; the best baseline, {best[0]}, has {best[1]:.3f}"
        details.append(sentence + ".")
    elif isinstance(levels := scores.get("accuracy"), list):
        by_level = ", ".join(f"{value:.3f} at level {n}" for n, value in enumerate(levels, start=1))
        details.append(f"Accuracy {by_level}, on {scores.get('scored')} labelled images.")
    elif alarms is not None:
        details.append("No labelled images were scored yet; the alarms certify content, not objects.")

    if alarms is None and above_baselines is None:
        return Verdict("open", "No verdict yet", details or ["There are neither alarms nor scores."])
    if failures:
        if above_baselines:
            return Verdict("mixed", "The masks beat every baseline, although an alarm went off", details)
        return Verdict("bad", "Failed: " + failures[0].split(":")[0], details)
    if above_baselines is False:
        start = "The masks" if alarms is None else "The masks follow content, but"
        return Verdict("bad" if alarms is None else "mixed", f"{start} do not beat the best baseline", details)
    return Verdict("good", "The masks beat every baseline" if alarms is None else "The masks follow content", details)


def headline_tiles(alarms: Record, scores: Record) -> list[Tile]:
    """Return the numbers that segdiff is judged by."""
    best = best_baseline(scores)
    return [
        Tile("IoU", format_number(scores.get("iou")), f"best baseline {best[1]:.3f}" if best else ""),
        Tile("IoU, per-image oracle", format_number(scores.get("oracle_iou")), "an upper bound"),
        Tile("eta gap", format_number(alarms.get("eta_gap")), f"alarm below {MIN_ETA_GAP}"),
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
        "position_share": AlarmLimits("position share", low=MIN_POSITION_SHARE, high=MAX_POSITION_SHARE),
        "boundary_length": AlarmLimits("boundary length", high=MAX_BOUNDARY_LENGTH),
        "flip_agreement": AlarmLimits("flip agreement", low=MIN_FLIP_AGREEMENT),
    },
    first_grids=("segmentation",),
)


def read_verdict(folder: str | os.PathLike[str]) -> Verdict:
    """Judge the run in ``folder`` by its last alarms and its scores, as far as there are any."""
    return html.read_verdict(folder, REPORT)


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write ``folder/report.html``; see :func:`factorkit.report.html.write_report`."""
    return html.write_report(folder, REPORT)
