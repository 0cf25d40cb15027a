"""What a model hands to the report of its runs: its verdict, headline numbers, curves and alarm limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from factorkit.utils.jsonl import is_number, timeline

Record = dict[str, Any]  # an event of the log, or the scores
Log = list[Record]


@dataclass(frozen=True)
class Verdict:
    """Whether a run succeeded.

    Attributes:
        status: "good"; "mixed" where the alarms and the scores disagree; "bad"; "open" while there is nothing to judge.
        headline: one sentence.
        details: the sentences behind it, with their figures.
    """

    status: Literal["good", "mixed", "bad", "open"]
    headline: str
    details: list[str]


class Tile(NamedTuple):
    """A headline number of the report. Tiles with an empty value are left out."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class AlarmLimits:
    """The range in which a label-free alarm stays silent, and its title in the report."""

    title: str
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Curve:
    """A figure of a value that the "step" events hold.

    Attributes:
        title: heading of the figure.
        note: what to look for, in one sentence.
        name: key of the value in the event.
        band: None draws the value as a line. Otherwise the value is a list of shares, drawn as stacked bands, and this
            is the word before the number of each band in the legend.
    """

    title: str
    note: str
    name: str
    band: str | None = None


def judge_nothing(log: Log, scores: Record) -> Verdict:
    """Return the verdict on a model that defines none."""
    return Verdict("open", "No verdict yet", ["There are neither alarms nor scores."])


@dataclass(frozen=True)
class ReportContent:
    """The model's part of a report.

    Attributes:
        judge: computes the verdict from the log and the scores; either may be empty.
        tiles: computes the headline numbers from the newest "alarms" event and the scores.
        curves: figures of the model's own values.
        alarm_limits: limits of the label-free alarms by their key in the "alarms" events.
        first_grids: kinds of sample grids that are shown before the others.
    """

    judge: Callable[[Log, Record], Verdict] = judge_nothing
    tiles: Callable[[Record, Record], list[Tile]] = lambda alarms, scores: []
    curves: tuple[Curve, ...] = ()
    alarm_limits: Mapping[str, AlarmLimits] = field(default_factory=dict)
    first_grids: tuple[str, ...] = ()


def judged_alarms(log: Log) -> tuple[Record | None, list[str]]:
    """Return the newest "alarms" event that lists failures (an empty list counts), and these failures."""
    events = [event for event in timeline(log, "alarms") if isinstance(event.get("failures"), list)]
    return (events[-1], [str(failure) for failure in events[-1]["failures"]]) if events else (None, [])


def sorted_baselines(scores: Record) -> list[tuple[str, Record]]:
    """Return the baselines in the scores, best IoU first, those without a score last."""
    baselines = scores.get("baselines")
    items = baselines.items() if isinstance(baselines, dict) else ()
    named = [(str(name).replace("_", " "), values) for name, values in items if isinstance(values, dict)]
    return sorted(named, key=lambda item: -item[1]["iou"] if is_number(item[1].get("iou")) else 1)


def best_baseline(scores: Record) -> tuple[str, float] | None:
    """Return the name and the IoU of the best baseline; None without one."""
    best = next(iter(sorted_baselines(scores)), None)
    return (best[0], best[1]["iou"]) if best is not None and is_number(best[1].get("iou")) else None


def format_number(value: object, digits: int = 3) -> str:
    """Return a number with ``digits`` decimals; an empty string for anything else."""
    return f"{value:,.{digits}f}" if is_number(value) else ""
