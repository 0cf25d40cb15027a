"""The curves of a run, drawn from its log as PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from factorkit.report.content import AlarmLimits, Curve, Log, ReportContent, read_checks
from factorkit.report.image_grid import palette
from factorkit.utils.files import is_number, timeline

if TYPE_CHECKING:  # importing matplotlib takes long, and most commands draw no report
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of a figure with a transparent background."""

    ink: str
    faint: str
    accent: str
    alarm: str


LIGHT = Theme(ink="#3a3f45", faint="#d5d8db", accent="#0072b2", alarm="#c0392b")
DARK = Theme(ink="#c3c8cd", faint="#3d4248", accent="#56b4e9", alarm="#ff7b6b")

_DPI = 160
_QUARTERS = ("0 to \u00bc", "\u00bc to \u00bd", "\u00bd to \u00be", "\u00be to 1")


class DrawnFigure(NamedTuple):
    """A figure of the report: its title, what to look for, and a PNG with a transparent background."""

    title: str
    note: str
    png: bytes


def draw_curves(log: Log, theme: Theme, content: ReportContent) -> list[DrawnFigure]:
    """Draw the figures for which the log has numbers."""
    from matplotlib.figure import Figure

    steps, alarms = timeline(log, "step"), timeline(log, "alarms")
    loss_note = "It falls in runs that succeed and in runs that fail: it does not measure success."
    quarter_note = "By time step, as a fraction of all; the first quarter has the least noise."
    plots: list[tuple[str, str, Callable[[Axes, Log, Theme], bool]]] = [
        ("Loss", loss_note, _plot_loss),
        ("Loss by quarter of t", quarter_note, _plot_quarters),
    ]
    curves = [*content.curves, Curve("Images per second", "", "images_per_second")]
    plots += [(curve.title, curve.note, partial(_plot_curve, curve=curve)) for curve in curves]
    figures = []
    for title, note, plot in plots:
        figure = Figure(figsize=(5, 2.7), layout="constrained")
        axes = _axes(figure, theme)
        axes.set_xlabel("step", color=theme.ink, fontsize=8)
        if plot(axes, steps, theme):
            figures.append(DrawnFigure(title, note, _png(figure)))
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    if _plot_alarms(figure, alarms, theme, content.alarm_limits):
        note = "Computed without labels. Inside the shaded range, past the dashed line, an alarm goes off."
        figures.insert(0, DrawnFigure("Alarms", note, _png(figure)))
    return figures


def _series(events: Log, read: Callable[[dict[str, Any]], Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values of the events for which `read` returns a number."""
    points = [(event["step"], read(event)) for event in events]
    points = [point for point in points if is_number(point[1])]
    return np.array([p[0] for p in points], dtype=float), np.array([p[1] for p in points], dtype=float)


def _entry(name: str, i: int) -> Callable[[dict[str, Any]], Any]:
    """Return a reader of entry i of the list under `name`; it returns None where there is no such entry."""

    def read(event: dict[str, Any]) -> Any:
        values = event.get(name)
        return values[i] if isinstance(values, list) and i < len(values) else None

    return read


def _max_length(events: Log, name: str) -> int:
    return max((len(event[name]) for event in events if isinstance(event.get(name), list)), default=0)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over about a twentieth of the curve; the window shrinks at the ends."""
    half = len(values) // 40
    total = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    low, high = np.maximum(i - half, 0), np.minimum(i + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _plot_loss(axes: Axes, events: Log, theme: Theme) -> bool:
    x, y = _series(events, lambda event: event.get("loss"))
    if not len(x):
        return False
    axes.plot(x, y, color=theme.accent, alpha=0.35, linewidth=0.8, marker="." if len(x) < 3 else None)
    axes.plot(x, _smooth(y), color=theme.accent, linewidth=1.8)
    _log_scale(axes, y)
    return True


def _plot_quarters(axes: Axes, events: Log, theme: Theme) -> bool:
    values = []
    for i, label in enumerate(_QUARTERS[: _max_length(events, "loss_by_quarter")]):
        x, y = _series(events, _entry("loss_by_quarter", i))
        if len(x):
            color = tuple(palette(4)[i] / 255)
            axes.plot(x, _smooth(y), color=color, linewidth=1.5, marker="." if len(x) < 3 else None, label=label)
            values.append(y)
    if values:
        _log_scale(axes, np.concatenate(values))
        _legend(axes, theme)
    return bool(values)


def _plot_curve(axes: Axes, events: Log, theme: Theme, curve: Curve) -> bool:
    if curve.band is not None:
        return _plot_shares(axes, events, curve.name, curve.band, theme)
    x, y = _series(events, methodcaller("get", curve.name))
    if not len(x):
        return False
    axes.plot(x, y, color=theme.accent, linewidth=1.5, marker="." if len(x) < 3 else None)
    axes.set_ylim(bottom=0, top=1.1 * max(y.max(), 1e-3))
    return True


def _plot_shares(axes: Axes, events: Log, name: str, label: str, theme: Theme) -> bool:
    """Draw shares of 1 as stacked bands, one for each entry of the list under ``name``."""
    k = _max_length(events, name)
    events = [event for event in events if isinstance(event.get(name), list)]
    if not k:
        return False
    x = [event["step"] for event in events]
    shares = [[v if is_number(v := _entry(name, i)(event)) else 0.0 for event in events] for i in range(k)]
    if len(x) == 1:  # a stacked plot needs two points
        x, shares = [x[0] - 0.5, x[0] + 0.5], [row * 2 for row in shares]
    axes.stackplot(x, shares, colors=palette(k) / 255, labels=[f"{label} {i + 1}".strip() for i in range(k)], alpha=0.9)
    axes.set_ylim(0, 1)
    axes.margins(x=0)
    _legend(axes, theme)
    return True


def _plot_alarms(figure: Figure, events: Log, theme: Theme, all_limits: Mapping[str, AlarmLimits]) -> bool:
    """Draw a small plot for each alarm, with its limits dashed and the range beyond them shaded.

    The limits are those of the newest checks, as far as the log has them.
    """
    any_values, logged = False, {check.get("name"): check for check in read_checks(events)}
    for place, (name, limits) in enumerate(all_limits.items(), start=1):
        axes = _axes(figure, theme, (-(-len(all_limits) // 2), 2, place))
        axes.set_title(limits.title, color=theme.ink, fontsize=8, loc="left")
        x, y = _series(events, methodcaller("get", name))
        any_values |= bool(len(x))
        axes.plot(x, y, color=theme.accent, linewidth=1.5, marker=".", markersize=5)
        bottom, top = min(0.0, y.min(initial=0.0)) - 0.03, max(1.0, y.max(initial=0.0)) + 0.03
        check = logged.get(limits.title, {"low": limits.low, "high": limits.high})
        for limit, beyond in ((check.get("low"), bottom), (check.get("high"), top)):
            if is_number(limit):
                axes.axhline(limit, color=theme.alarm, linewidth=1, linestyle="--")
                axes.axhspan(limit, beyond, color=theme.alarm, alpha=0.1, linewidth=0)
        axes.set_ylim(bottom, top)
    return any_values


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
    """Use a logarithmic axis where the values span more than a factor of five."""
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
