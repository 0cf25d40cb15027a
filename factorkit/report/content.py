"""What a model hands to the report of its runs: its verdict, headline numbers, curves and alarm limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from factorkit.utils.files import is_number, timeline

Record = dict[str, Any]  # an event of the log, or the scores
Log = list[Record]


@dataclass(frozen=True)
class Verdict:
    """Whether a run succeeded.

    Attributes:
        status: "good"; "mixed" where the alarms and the scores disagree; "bad"; "open" while nothing that was checked
            can tell right from wrong.
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


CheckStatus = Literal["passed", "failed", "measured", "not run"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at to judge a run, or that was not, and why.

    Attributes:
        name: what is measured.
        value: the number; None if the check did not run.
        low: smallest value that passes.
        high: largest value that passes.
        failures: a sentence for each failure; empty if the check passed or did not run.
        not_run: the reason why there is no value.
        decisive: whether the check is known to separate right from wrong runs.
    """

    name: str
    value: float | None = None
    low: float = -math.inf
    high: float = math.inf
    failures: tuple[str, ...] = ()
    not_run: str = ""
    decisive: bool = False

    @property
    def status(self) -> CheckStatus:
        """Whether it passed, failed, was only measured for lack of a limit, or did not run."""
        if self.value is None:
            return "not run"
        if math.isinf(self.low) and math.isinf(self.high):
            return "measured"
        return "failed" if self.failures else "passed"

    def to_dict(self) -> Record:
        """Return the record for the log: name, status, decisive, and value and limits, or the reason."""
        record: Record = {"name": self.name, "status": self.status, "decisive": self.decisive}
        if self.value is None:
            return record | {"reason": self.not_run}
        limits = {"low": self.low, "high": self.high}
        return record | {"value": self.value} | {name: x for name, x in limits.items() if math.isfinite(x)}


def all_failures(checks: Iterable[Check]) -> list[str]:
    """Return the failures of checks, in their order."""
    return [failure for check in checks for failure in check.failures]


def log_checks(checks: Iterable[Check]) -> Record:
    """Return the fields "checks" and "failures" of an "alarms" event."""
    checks = list(checks)
    return {"checks": [check.to_dict() for check in checks], "failures": all_failures(checks)}


def read_checks(log: Log) -> list[Record]:
    """Return the checks of the newest "alarms" event; an empty list if it lists none."""
    alarms, _ = judged_alarms(log)
    checks = (alarms or {}).get("checks")
    return [check for check in checks if isinstance(check, dict)] if isinstance(checks, list) else []


def describe_check(check: Record) -> str:
    """Return one line on a check of the log: its status, value and limits, or why it did not run."""
    name, status = check.get("name"), check.get("status")
    if status == "not run":
        return f"{name}: not run, {check.get('reason')}"
    low, high = check.get("low"), check.get("high")
    limits = [f"at least {low:g}"] if is_number(low) else []
    limits += [f"at most {high:g}"] if is_number(high) else []
    limit = f" ({' and '.join(limits)})" if limits else " (no limit)"
    return f"{name}: {status}, {format_number(check.get('value'))}{limit}"


def summarise_checks(log: Log) -> list[str]:
    """Return sentences on the newest checks of a run: which ran with what result, and which did not and why."""
    checks, (alarms, failures) = read_checks(log), judged_alarms(log)
    if not checks:
        return ["The log does not say which checks ran." + (f" Alarms: {'; '.join(failures)}." if failures else "")]
    step = f" at step {alarms['step']:g}" if alarms is not None and is_number(alarms.get("step")) else ""
    undecided = "no check that separates right from wrong runs has run"
    result = "; ".join(failures) or ("no alarm went off" if passed_decisively(log) else undecided)
    return [f"Without labels{step}: {result}.", *(f"{describe_check(check)}." for check in checks)]


def passed_decisively(log: Log) -> bool:
    """Return whether a check that is known to separate right from wrong runs has run and passed, and none failed."""
    checks, (_, failures) = read_checks(log), judged_alarms(log)
    return not failures and any(check.get("decisive") and check.get("status") == "passed" for check in checks)


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
