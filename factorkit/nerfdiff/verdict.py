"""Whether a nerfdiff run succeeded, and what its report shows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from factorkit.engine.run_log import RunLog
from factorkit.report import html
from factorkit.report.content import (
    Curve,
    Log,
    Record,
    ReportContent,
    Tile,
    Verdict,
    format_number,
    judged_alarms,
    passed_decisively,
    summarise_checks,
)
from factorkit.utils.files import is_number, read_log

MASK_FAILURES = "mask_failures"  # of alarms: those failures that are of masks made for the run
MIN_SHARE_UNDER_10_DEG = 0.9  # share of cameras less than 10 degrees off from which a scene counts as solved


def judge_cameras(log: Log, scores: Record) -> Verdict:
    """Judge a run by its newest alarms and the errors of its cameras.

    Given cameras are compared with themselves, so their errors count only where the run found the cameras.
    """
    alarms, failures = judged_alarms(log)
    median: Any = scores.get("rotation_median_deg")
    share: Any = scores.get("under_10_deg")
    details = [line for name in ("search", "sfm") for line in _newest_lines(log, name)]
    if alarms is not None:
        details += summarise_checks(log)
    scored = is_number(median) and is_number(share)
    if scored and scores.get("poses") == "known":
        scored = False
        details.append("The cameras were given, not found: their errors prove nothing.")
    elif scored:
        details.append(f"The median rotation error is {median:.2f} degrees; {share:.0%} of the cameras are under 10.")
    if failures and scored and share >= MIN_SHARE_UNDER_10_DEG:
        return Verdict("mixed", "The cameras are correct, although an alarm went off", details)
    if failures:
        return Verdict("bad", "Failed: " + failures[0].split(":")[0], details)
    if scored and share < MIN_SHARE_UNDER_10_DEG:
        mirrored = "Failed: the scene is a mirror image"
        wrong = "Failed: the cameras are wrong" + (", though no alarm went off" if passed_decisively(log) else "")
        return Verdict("bad", mirrored if scores.get("mirrored") else wrong, details)
    if scored:
        return Verdict("good", "The cameras are correct", details)
    if passed_decisively(log):
        return Verdict("open", "Held-out views are explained; the cameras were not compared with true poses", details)
    if not details:
        return Verdict("open", "No verdict yet", ["There are neither alarms nor scores."])
    return Verdict("open", "No verdict: no check that separates right from wrong runs has run", details)


def headline_tiles(alarms: Record, scores: Record) -> list[Tile]:
    """Return the numbers that nerfdiff is judged by."""
    return [
        Tile("rotation, median", format_number(scores.get("rotation_median_deg"), 2), "degrees, training cameras"),
        Tile("under 10 degrees", format_number(scores.get("under_10_deg"), 2), "share of the training cameras"),
        Tile("PSNR", format_number(scores.get("psnr"), 2), "dB, at true cameras"),
        Tile("PSNR, encoder", format_number(scores.get("psnr_encoder"), 2), "dB, at the encoder's cameras"),
        Tile("held-out error", format_number(alarms.get("held_out_cross"), 2), "of the views' variance"),
        Tile("azimuth spread", format_number(alarms.get("azimuth_spread"), 2), "0: one side, 1: all around"),
    ]


REPORT = ReportContent(
    judge=judge_cameras,
    tiles=headline_tiles,
    curves=(
        Curve("Classifier", "Share of the views whose highest score is at their assigned candidate.", "classified"),
        Curve(
            "Use of the candidates",
            "Bands that vanish are unused candidates; one that fills all is a collapse.",
            "candidate_use",
            band="",
        ),
    ),
    first_grids=("views",),
)


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write ``folder/report.html``; see :func:`factorkit.report.html.write_report`."""
    return html.write_report(folder, REPORT)


def log_lines(folder: Path, event: str, lines: list[str]) -> None:
    """Write sentences for the report into the log of a run, unless its newest event of this name has them."""
    if lines != _newest_lines(read_log(folder), event):
        with RunLog(folder) as log:
            log.event(event, lines=lines)
        write_report(folder)


def _newest_lines(log: Log, name: str) -> list[str]:
    return next((event["lines"] for event in reversed(log) if event.get("event") == name), [])


def log_alarms(folder: Path, alarms: Record) -> None:
    """Log the newest alarms of a run again, with what was added to them, and write its report."""
    with RunLog(folder) as log:
        log.event("alarms", **{key: value for key, value in alarms.items() if key not in ("event", "time")})
    write_report(folder)
