"""The curves of a run, drawn from its log as PNG."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from factorkit.report.image_grid import palette

if TYPE_CHECKING:  # takes as long to import as all else here, for who draws no report
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class AlarmLimits:
    """Between which values a label-free alarm stays silent, and how it is called."""

    title: str
    low: float = -math.inf
    high: float = math.inf


# What is drawn, not what decides: the model's own alarms do that and log their failures in words. A test holds the two
# sets of limits together, since the engine cannot import a model.
ALARM_LIMITS = {
    "eta_gap": AlarmLimits("eta gap", low=0.3),
    "position_share": AlarmLimits("position share", low=0.05, high=0.8),
    "boundary_length": AlarmLimits("boundary length", high=0.2),
    "flip_agreement": AlarmLimits("flip agreement", low=0.5),
}


@dataclass(frozen=True)
class Theme:
    """Colours of a figure whose ground is transparent."""

    ink: str
    faint: str
    accent: str
    alarm: str


LIGHT = Theme(ink="#3a3f45", faint="#d5d8db", accent="#0072b2", alarm="#c0392b")
DARK = Theme(ink="#c3c8cd", faint="#3d4248", accent="#56b4e9", alarm="#ff7b6b")

_DPI = 160
_QUARTERS = ("0 to \u00bc", "\u00bc to \u00bd", "\u00bd to \u00be", "\u00be to 1")


def timeline(log: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Events of one kind that have a step, with rising steps.

    Where a step comes again (a killed run lost some and ran them again, or a new heat began) the later line wins, and
    what was logged after that step the first time is dropped: it belongs to weights that are gone.
    """
    kept: list[dict[str, Any]] = []
    for event in log:
        if event.get("event") != kind or not is_number(event.get("step")):
            continue
        while kept and kept[-1]["step"] >= event["step"]:
            kept.pop()
        kept.append(event)
    return kept


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a number that a float can hold; booleans are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def draw_curves(log: Iterable[dict[str, Any]], theme: Theme) -> list[tuple[str, str, bytes]]:
    """The figures for which a log has numbers, as (title, what to look for, PNG with a transparent ground)."""
    from matplotlib.figure import Figure

    log = list(log)
    steps, alarms = timeline(log, "step"), timeline(log, "alarms")
    single = [
        ("Loss", "It falls in runs that succeed and in runs that fail: it does not judge the masks.", _loss, steps),
        (
            "Loss by quarter of t",
            "As a share of all time steps; the first quarter holds the least noise.",
            _quarters,
            steps,
        ),
        (
            "Area of each region",
            "A band that vanishes is a region that died; one that fills all is a collapse.",
            _areas,
            steps,
        ),
        ("Entropy of the masks", "Zero where every pixel is given to one region wholly.", _entropy, steps),
        (
            "Classifier",
            "Share of the views whose best score lies at the candidate that was to have it.",
            _classified,
            steps,
        ),
        (
            "Use of the candidates",
            "Bands that vanish are candidates nobody takes; one that fills all is a collapse.",
            _candidates,
            steps,
        ),
        ("Images per second", "", _speed, steps),
    ]
    figures = []
    for title, note, plot, events in single:
        figure = Figure(figsize=(5, 2.7), layout="constrained")
        axes = _axes(figure, theme)
        axes.set_xlabel("step", color=theme.ink, fontsize=8)
        if plot(axes, events, theme):
            figures.append((title, note, _png(figure)))
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    if _alarms(figure, alarms, theme):
        note = "Computed without labels. Inside the shaded range, past the dashed line, the masks are rejected."
        figures.insert(0, ("Alarms", note, _png(figure)))
    return figures


def _series(events: Sequence[dict[str, Any]], read: Callable[[dict[str, Any]], Any]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the events for which `read` yields a number."""
    points = [(event["step"], read(event)) for event in events]
    points = [point for point in points if is_number(point[1])]
    return np.array([p[0] for p in points], dtype=float), np.array([p[1] for p in points], dtype=float)


def _entry(name: str, i: int) -> Callable[[dict[str, Any]], Any]:
    """Reads entry i of the list under `name`; None where there is no such list or it is shorter."""

    def read(event: dict[str, Any]) -> Any:
        values = event.get(name)
        return values[i] if isinstance(values, list) and i < len(values) else None

    return read


def _width(events: Sequence[dict[str, Any]], name: str) -> int:
    return max((len(event[name]) for event in events if isinstance(event.get(name), list)), default=0)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over about a twentieth of the curve, each point over a window of its own at the ends."""
    half = len(values) // 40
    total = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    low, high = np.maximum(i - half, 0), np.minimum(i + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _loss(axes: Axes, events: Sequence[dict[str, Any]], theme: Theme) -> bool:
    x, y = _series(events, lambda event: event.get("loss"))
    if not len(x):
        return False
    axes.plot(x, y, color=theme.accent, alpha=0.35, linewidth=0.8, marker="." if len(x) < 3 else None)
    axes.plot(x, _smooth(y), color=theme.accent, linewidth=1.8)
    _log_scale(axes, y)
    return True


def _quarters(axes: Axes, events: Sequence[dict[str, Any]], theme: Theme) -> bool:
    drawn = []
    for i, label in enumerate(_QUARTERS[: _width(events, "loss_by_quarter")]):
        x, y = _series(events, _entry("loss_by_quarter", i))
        if len(x):
            color = tuple(palette(4)[i] / 255)
            axes.plot(x, _smooth(y), color=color, linewidth=1.5, marker="." if len(x) < 3 else None, label=label)
            drawn.append(y)
    if drawn:
        _log_scale(axes, np.concatenate(drawn))
        _legend(axes, theme)
    return bool(drawn)


def _areas(axes: Axes, events: Sequence[dict[str, Any]], theme: Theme) -> bool:
    return _stack(axes, events, "areas", "region", theme)


def _candidates(axes: Axes, events: Sequence[dict[str, Any]], theme: Theme) -> bool:
    return _stack(axes, events, "candidate_use", "", theme)


def _stack(axes: Axes, events: Sequence[dict[str, Any]], name: str, label: str, theme: Theme) -> bool:
    """Shares of one, a band for each entry of the list under ``name``."""
    k = _width(events, name)
    events = [event for event in events if isinstance(event.get(name), list)]
    if not k:
        return False
    x = [event["step"] for event in events]
    shares = [[v if is_number(v := _entry(name, i)(event)) else 0.0 for event in events] for i in range(k)]
    if len(x) == 1:  # a stack needs two points to have a width
        x, shares = [x[0] - 0.5, x[0] + 0.5], [row * 2 for row in shares]
    axes.stackplot(x, shares, colors=palette(k) / 255, labels=[f"{label} {i + 1}".strip() for i in range(k)], alpha=0.9)
    axes.set_ylim(0, 1)
    axes.margins(x=0)
    _legend(axes, theme)
    return True


def _entropy(axes: Axes, events: Sequence[dict[str, Any]], theme: Theme) -> bool:
    return _line(axes, events, "entropy", theme)


def _classified(axes: Axes, events: Sequence[dict[str, Any]], theme: Theme) -> bool:
    return _line(axes, events, "classified", theme)


def _speed(axes: Axes, events: Sequence[dict[str, Any]], theme: Theme) -> bool:
    return _line(axes, events, "images_per_second", theme)


def _line(axes: Axes, events: Sequence[dict[str, Any]], name: str, theme: Theme) -> bool:
    x, y = _series(events, lambda event: event.get(name))
    if not len(x):
        return False
    axes.plot(x, y, color=theme.accent, linewidth=1.5, marker="." if len(x) < 3 else None)
    axes.set_ylim(bottom=0, top=1.1 * max(y.max(), 1e-3))
    return True


def _alarms(figure: Figure, events: Sequence[dict[str, Any]], theme: Theme) -> bool:
    """Four small plots: each alarm with its dashed limits, the range beyond them shaded."""
    some = False
    for place, (name, limits) in enumerate(ALARM_LIMITS.items(), start=1):
        axes = _axes(figure, theme, (2, 2, place))
        axes.set_title(limits.title, color=theme.ink, fontsize=8, loc="left")
        x, y = _series(events, methodcaller("get", name))
        some |= bool(len(x))
        axes.plot(x, y, color=theme.accent, linewidth=1.5, marker=".", markersize=5)
        bottom, top = min(0.0, y.min(initial=0.0)) - 0.03, max(1.0, y.max(initial=0.0)) + 0.03
        for limit, beyond in ((limits.low, bottom), (limits.high, top)):
            if math.isfinite(limit):
                axes.axhline(limit, color=theme.alarm, linewidth=1, linestyle="--")
                axes.axhspan(limit, beyond, color=theme.alarm, alpha=0.1, linewidth=0)
        axes.set_ylim(bottom, top)
    return some


def _axes(figure: Figure, theme: Theme, place: tuple[int, int, int] = (1, 1, 1)) -> Axes:
    axes = figure.add_subplot(*place)
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.faint)
    axes.tick_params(colors=theme.ink, labelsize=8, length=3)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(axis="y", color=theme.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def _log_scale(axes: Axes, values: np.ndarray) -> None:
    """Logarithmic where the values span more than a factor of five: the beginning would hide the rest."""
    if values.min() > 0 and values.max() > 5 * values.min():
        axes.set_yscale("log")
        from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes, theme: Theme) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=4,
        fontsize=8,
        frameon=False,
        labelcolor=theme.ink,
        handlelength=1,
        borderpad=0,
        columnspacing=1.2,
    )


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, transparent=True)
    return buffer.getvalue()
