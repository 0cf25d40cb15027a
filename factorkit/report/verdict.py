"""Whether a run did what it is for, in words and in a few numbers, from its log and scores alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from factorkit.report.curves import ALARM_LIMITS, is_number, timeline

CAMERAS_FOUND = 0.9  # share of cameras under 10 degrees from which a scene counts as found
Tile = tuple[str, str, str]  # label, value, note


@dataclass(frozen=True)
class Verdict:
    """Whether the run converged, in words.

    status: "good"; "mixed" where the alarms and the scores disagree; "bad"; "open" while there is nothing to judge by.
    headline: one sentence. details: the sentences behind it, with their figures.
    """

    status: Literal["good", "mixed", "bad", "open"]
    headline: str
    details: list[str]


def judge(config: dict[str, Any], log: list[dict[str, Any]], scores: dict[str, Any]) -> Verdict:
    """The verdict on a run, from its settings, log and scores as far as there are any."""
    return _judge_cameras(log, scores) if config.get("model") == "nerfdiff" else _judge_regions(log, scores)


def headline_tiles(config: dict[str, Any], log: list[dict[str, Any]], scores: dict[str, Any]) -> list[Tile]:
    """The numbers a model is judged by; those without a value are empty."""
    alarms = timeline(log, "alarms")
    alarm = alarms[-1] if alarms else {}
    if config.get("model") == "nerfdiff":
        return [
            ("rotation, median", number(scores.get("rotation_median_deg"), 2), "degrees, training cameras"),
            ("under 10 degrees", number(scores.get("under_10_deg"), 2), "share of the training cameras"),
            ("PSNR", number(scores.get("psnr"), 2), "dB, at true cameras"),
            ("PSNR, encoder", number(scores.get("psnr_encoder"), 2), "dB, at the encoder's cameras"),
            ("azimuth spread", number(alarm.get("azimuth_spread"), 2), "0: one side, 1: all around"),
        ]
    best = _best_baseline(scores)
    return [
        ("IoU", number(scores.get("iou")), f"best baseline {best[1]:.3f}" if best else ""),
        ("IoU, per-image oracle", number(scores.get("oracle_iou")), "an upper bound"),
        ("eta gap", number(alarm.get("eta_gap")), f"alarm below {ALARM_LIMITS['eta_gap'].low}"),
    ]


def _judge_cameras(log: list[dict[str, Any]], scores: dict[str, Any]) -> Verdict:
    alarms = [event for event in timeline(log, "alarms") if isinstance(event.get("failures"), list)]
    failures = [str(failure) for failure in alarms[-1]["failures"]] if alarms else []
    median: Any = scores.get("rotation_median_deg")
    share: Any = scores.get("under_10_deg")
    details = []
    if alarms:
        details.append("Without true poses: " + ("; ".join(failures) if failures else "no alarm went off") + ".")
    scored = is_number(median) and is_number(share)
    if scored:
        details.append(f"Cameras {median:.2f} degrees off in the median, {share:.0%} of them under 10.")
    if failures:
        return Verdict("bad", "Failed: " + failures[0].split(":")[0], details)
    if scored and share < CAMERAS_FOUND and scores.get("mirrored"):
        return Verdict("bad", "Failed: the scene is a mirror image", details)
    if scored and share < CAMERAS_FOUND:
        return Verdict("bad", "Failed: cameras found wrongly, though no alarm went off", details)
    if scored:
        return Verdict("good", "The cameras were found", details)
    return Verdict("open", "No true poses to judge by", details or ["There are neither alarms nor scores."])


def _judge_regions(log: list[dict[str, Any]], scores: dict[str, Any]) -> Verdict:
    # A model without masks logs the event without failures: nothing was judged.
    alarms = [event for event in timeline(log, "alarms") if isinstance(event.get("failures"), list)]
    failures = [str(failure) for failure in alarms[-1]["failures"]] if alarms else []
    iou, best = scores.get("iou"), _best_baseline(scores)
    details = []
    if alarms:
        when = f"Without labels, at step {alarms[-1]['step']:g}: "
        details.append(when + ("; ".join(failures) if failures else "no alarm went off") + ".")
    beaten = None
    if is_number(iou):
        scored = scores.get("scored")
        sentence = f"IoU {iou:.3f}" + (f" on {scored:g} labelled images" if is_number(scored) else "")
        if best is None:
            sentence += "; no baseline stands beside it yet"
        else:
            beaten = iou > best[1]
            sentence += f"; the best baseline, {best[0]}, has {best[1]:.3f}"
        details.append(sentence + ".")
    elif isinstance(levels := scores.get("accuracy"), list):
        found = ", ".join(f"{value:.3f} at level {n}" for n, value in enumerate(levels, start=1))
        details.append(f"Accuracy {found}, on {scores.get('scored')} labelled images.")
    elif alarms:
        details.append("No labelled images were scored yet; the alarms certify content, not objects.")

    if not alarms and beaten is None:
        return Verdict("open", "No verdict yet", details or ["There are neither alarms nor scores."])
    if failures:
        if beaten:
            return Verdict("mixed", "The masks beat every baseline, although an alarm went off", details)
        return Verdict("bad", "Failed: " + failures[0].split(":")[0], details)
    if beaten is False:
        follow = "The masks follow content, but" if alarms else "The masks"
        return Verdict("mixed" if alarms else "bad", f"{follow} do not beat the best baseline", details)
    return Verdict("good", "The masks follow content" if alarms else "The masks beat every baseline", details)


def baselines_of(scores: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The baselines, best IoU first, those without a score last."""
    baselines = scores.get("baselines")
    items = baselines.items() if isinstance(baselines, dict) else ()
    found = [(str(name).replace("_", " "), values) for name, values in items if isinstance(values, dict)]
    return sorted(found, key=lambda item: -item[1]["iou"] if is_number(item[1].get("iou")) else 1)


def _best_baseline(scores: dict[str, Any]) -> tuple[str, float] | None:
    best = next(iter(baselines_of(scores)), None)
    return (best[0], best[1]["iou"]) if best is not None and is_number(best[1].get("iou")) else None


def number(value: object, digits: int = 3) -> str:
    """A number with so many decimals; an empty text for anything else."""
    return f"{value:,.{digits}f}" if is_number(value) else ""
