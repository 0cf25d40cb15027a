"""The report of a run: one self-contained HTML file, written from the files in the run folder."""

from __future__ import annotations

import base64
import html
import importlib.metadata
import io
import os
import platform
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from factorkit.report.content import (
    Log,
    Record,
    ReportContent,
    Tile,
    Verdict,
    describe_check,
    format_number,
    passed_decisively,
    read_checks,
    sorted_baselines,
)
from factorkit.report.curves import DARK, LIGHT, draw_curves
from factorkit.utils.errors import CheckpointError, WriteError
from factorkit.utils.files import is_number, read_json, read_log, replacing, timeline

REPORT_NAME = "report.html"
_SIGNATURE = "<p class='kicker'>factorkit run</p>"  # of every report, within the first characters
_SIGNATURE_WITHIN = 1 << 16
_GRID_NAME = re.compile(r"(?P<step>\d+)_(?P<kind>.+)")
_STRIP_LENGTH, _STRIP_SIZE = 8, (320, 240)  # earlier grids of one kind below the newest; bounds of each in pixels
_MAX_EVENTS = 200  # only the newest events are listed
_SCORES = (("acc", "Acc"), ("iou", "IoU"), ("dice", "Dice"))


def read_verdict(folder: str | os.PathLike[str], content: ReportContent) -> Verdict:
    """Judge the run in ``folder`` by its log and its scores, as far as there are any."""
    return content.judge(read_log(folder), _read_json(Path(folder) / "scores.json"))


def check_report(folder: str | os.PathLike[str]) -> None:
    """Raise WriteError if a run folder holds a report.html that factorkit did not write."""
    path = Path(folder) / REPORT_NAME
    with suppress(FileNotFoundError, NotADirectoryError), open(path, encoding="utf-8", errors="replace") as file:
        if _SIGNATURE not in file.read(_SIGNATURE_WITHIN):
            raise WriteError(f"{path} exists and was not written by factorkit. Move it away")


def write_report(folder: str | os.PathLike[str], content: ReportContent) -> Path:
    """Write ``folder/report.html`` from the files in the run folder, and return its path.

    The files are ``config.json``, ``log.jsonl``, ``scores.json`` and ``samples/<step>_<kind>.png``. What is missing,
    unknown or half written is left out, so this works at any moment of a run. The page has no scripts and refers to
    nothing outside itself. An older report is replaced only when the new one is complete.

    Raises:
        CheckpointError: the folder does not exist, or the file cannot be written.
        WriteError: the file is there, but no report.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist. Give the run folder: the out= of a training")
    config, log, scores = _read_json(folder / "config.json"), read_log(folder), _read_json(folder / "scores.json")
    verdict = content.judge(log, scores)
    name = folder.resolve().name
    body = [
        f"<header>{_SIGNATURE}<h1>{_text(name)}</h1><p>{_text(_progress(config, log))}</p></header>",
        _verdict_box(verdict, log),
        _checks_section(log),
        _headline_numbers(config, log, scores, content),
        _grids_section(folder / "samples", content.first_grids),
        _curves_section(log, content),
        _scores_section(scores),
        _events_section(log),
        _settings_section(config),
        _environment_section(),
    ]
    page = (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{_text(name)}: {_text(verdict.headline)}</title><style>{STYLE}</style></head>\n"
        "<body><main>\n" + "\n".join(body) + "\n</main></body></html>\n"
    )
    path = folder / REPORT_NAME
    check_report(folder)
    try:
        with replacing(path) as temporary:
            temporary.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise CheckpointError(
            f"could not write {path}: {error}. Free some space, or make the folder writable"
        ) from error
    return path


# --- reading ---


def _read_json(path: Path) -> Record:
    """Return the JSON object in a file; an empty one if it is missing, damaged or of another type."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _progress(config: Record, log: Log) -> str:
    """Return one sentence on how far the run is."""
    stages = [event for event in log if event.get("event") in ("start", "resume", "signal", "end")]
    steps = timeline(log, "step")
    step = steps[-1]["step"] if steps else 0
    place = f"step {step:,g}" + (f" of {config['steps']:,g}" if is_number(config.get("steps")) else "")
    last = stages[-1]["event"] if stages else None
    if last == "end":
        return f"Finished at {place}."
    if last == "signal":
        return f"Stopped by a signal at {place}; the same command again goes on from there."
    return f"Not finished: {place}." if last or steps else "Not started: the log holds no step yet."


# --- the page ---


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _section(title: str, body: str, missing: str) -> str:
    """Return a section; without a body, one line that says what is missing."""
    return f"<section><h2>{title}</h2>{body or f'<p class=missing>Not available yet: {_text(missing)}.</p>'}</section>"


def _table(rows: Iterable[tuple[object, object]]) -> str:
    lines = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in rows)
    return f"<div class=scroll><table>{lines}</table></div>" if lines else ""


def _verdict_box(verdict: Verdict, log: Log) -> str:
    checks = {f"{describe_check(check)}." for check in read_checks(log)}  # the next section lists them
    details = "".join(f"<p>{_text(sentence)}</p>" for sentence in verdict.details if sentence not in checks)
    return f"<section class='verdict {verdict.status}'><h2>{_text(verdict.headline)}</h2>{details}</section>"


def _checks_section(log: Log) -> str:
    rows = ((check.get("name"), describe_check(check).partition(": ")[2]) for check in read_checks(log))
    table = _table(rows)  # without checks the verdict says so
    return _section("Checks without labels", table, "") if table else ""


def _headline_numbers(config: Record, log: Log, scores: Record, content: ReportContent) -> str:
    steps, alarms = timeline(log, "step"), timeline(log, "alarms")
    last = steps[-1] if steps else {}
    seconds = [event["seconds"] for event in steps if is_number(event.get("seconds"))]
    total = f"of {format_number(config.get('steps'), 0)}" if "steps" in config else ""
    tiles = [
        *content.tiles(alarms[-1] if alarms else {}, scores),
        Tile("loss", format_number(last.get("loss"), 4), ""),
        Tile("step", format_number(last.get("step"), 0), total),
        Tile("images seen", format_number(last.get("images"), 0), ""),
        Tile("images per second", format_number(last.get("images_per_second"), 1), ""),
        Tile("training time", _duration(sum(seconds)) if seconds else "", ""),
    ]
    html_tiles = "".join(
        f"<div class=tile><span>{label}</span><b>{value}</b><small>{note}</small></div>"
        for label, value, note in tiles
        if value
    )
    body = f"<div class=tiles>{html_tiles}</div>" if html_tiles else ""
    return _section("Headline numbers", body, "the run has logged no step")


def _grids_section(folder: Path, first_kinds: tuple[str, ...]) -> str:
    """Show the newest sample grid of each kind, above a strip of earlier ones."""
    kinds: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(folder.glob("*.png")):
        match = _GRID_NAME.fullmatch(path.stem)
        step, kind = (int(match["step"]), match["kind"]) if match else (-1, path.stem)
        kinds.setdefault(kind, []).append((step, path))
    blocks = []
    for kind, series in sorted(kinds.items(), key=lambda item: (not item[0].startswith(first_kinds), item[0])):
        series = [(step, path) for step, path in sorted(series) if _readable(path)]
        if not series:
            continue
        step, latest = series[-1]
        block = f"<h3>{_text(kind)}{_at(step)}</h3>" + _figure(latest.read_bytes(), f"{kind}{_at(step)}")
        if len(series) > 1:
            chosen = sorted({round(i * (len(series) - 1) / (_STRIP_LENGTH - 1)) for i in range(_STRIP_LENGTH)})
            strip = (_figure(_small(series[i][1]), f"step {series[i][0]}", caption=True) for i in chosen)
            block += f"<div class=strip>{''.join(strip)}</div>"
        blocks.append(f"<article>{block}</article>")
    return _section("Latest sample grids", "".join(blocks), "no sample grid was drawn")


def _at(step: int) -> str:
    return f", step {step}" if step >= 0 else ""


def _readable(path: Path) -> bool:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):  # Pillow raises SyntaxError for some broken PNGs
        return False
    return True


def _small(path: Path) -> bytes:
    with Image.open(path, formats=["PNG"]) as stored:
        image = stored.convert("RGB")
    image.thumbnail(_STRIP_SIZE, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _figure(png: bytes, label: str, caption: bool = False) -> str:
    below = f"<figcaption>{_text(label)}</figcaption>" if caption else ""
    return f"<figure><img src='{_uri(png)}' alt='{_text(label)}'>{below}</figure>"


def _curves_section(log: Log, content: ReportContent) -> str:
    blocks = []
    both = zip(draw_curves(log, LIGHT, content), draw_curves(log, DARK, content), strict=True)
    for (title, note, light), (_, _, dark) in both:
        image = (
            f"<picture><source media='(prefers-color-scheme: dark)' srcset='{_uri(dark)}'>"
            f"<img src='{_uri(light)}' alt='{_text(title)}'></picture>"
        )
        caption = f"<figcaption>{_text(note)}</figcaption>"
        blocks.append(f"<figure class=curve><h3>{_text(title)}</h3>{image}{caption}</figure>")
    body = f"<div class=curves>{''.join(blocks)}</div>" if blocks else ""
    return _section("Curves", body, "the run has logged no step")


def _scores_section(scores: Record) -> str:
    ours = [
        ("this run", {name: scores.get(name) for name, _ in _SCORES}, "ours"),
        ("this run, per-image oracle", {name: scores.get(f"oracle_{name}") for name, _ in _SCORES}, "oracle"),
    ]
    rows = [row for row in ours if any(is_number(value) for value in row[1].values())]
    rows += [(name, values, "") for name, values in sorted_baselines(scores)]
    if not rows:
        table = _table((name, _plain(value)) for name, value in scores.items())
        return _section("Scores", table, "nothing was scored")
    lines = "".join(_score_line(*row) for row in rows)
    head = "<tr><th></th>" + "".join(f"<th>{label}</th>" for _, label in _SCORES) + "<th></th></tr>"
    known = {"baselines", *(name for name, _ in _SCORES), *(f"oracle_{name}" for name, _ in _SCORES)}
    rest = _table((name, _plain(value)) for name, value in scores.items() if name not in known)
    note = "The oracle maps regions to the object for each image by its own label: an upper bound, not a score."
    table = f"<div class=scroll><table class=scores>{head}{lines}</table></div><p class=note>{note}</p>"
    return _section("Scores", table + rest, "")


def _score_line(name: str, values: Record, kind: str) -> str:
    if "unavailable" in values:
        cells = f"<td colspan=4 class=missing>{_text(values['unavailable'])}</td>"
    else:
        share = min(max(values["iou"], 0), 1) if is_number(values.get("iou")) else 0
        cells = "".join(f"<td>{format_number(values.get(key)) or '&ndash;'}</td>" for key, _ in _SCORES)
        cells += f"<td class=bar><i style='width:{share:.1%}'></i></td>"
    return f"<tr class='{kind}'><th>{_text(name)}</th>{cells}</tr>"


def _events_section(log: Log) -> str:
    rows = []
    for event in log:
        kind = event.get("event")
        if kind == "step":
            continue
        if "message" in event:
            text = str(event["message"])
        elif isinstance(event.get("failures"), list):
            text = "; ".join(map(str, event["failures"])) or "no check that separates right from wrong runs has run"
            text = "no alarm" if passed_decisively([event]) else text
        else:
            text = _plain({name: value for name, value in event.items() if name not in ("event", "step", "time")})
        stamp = _clock(event["time"]) if is_number(event.get("time")) else ""
        cells = (stamp, format_number(event.get("step"), 0), kind, text)
        rows.append("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>")
    head = "<tr><th>time (UTC)</th><th>step</th><th>event</th><th></th></tr>"
    note = f"<p class=note>The newest {_MAX_EVENTS} of {len(rows)}.</p>" if len(rows) > _MAX_EVENTS else ""
    table = f"<div class=scroll><table class=events>{head}{''.join(rows[-_MAX_EVENTS:])}</table></div>{note}"
    return _section("Events", table if rows else "", "the log is empty")


def _settings_section(config: Record) -> str:
    rows = ((name, _plain(value)) for name, value in _flat(config))
    return _section("Settings", _table(rows), "there is no config.json")


def _environment_section() -> str:
    rows = [("report written", _clock(time.time()) + " UTC"), ("python", platform.python_version())]
    rows += [("platform", platform.platform()), ("processors", str(os.cpu_count()))]
    for package in ("factorkit", "torch", "triton", "numpy"):
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    note = "Of the process that wrote this report: the training, unless the report was written again later."
    return _section("Environment", f"{_table(rows)}<p class=note>{note}</p>", "")


# --- formatting ---


def _plain(value: object) -> str:
    """Format a setting or field for people."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    return str(value)


def _flat(config: Record, prefix: str = "") -> list[tuple[str, Any]]:
    """Return settings by name, those of nested groups as `group.name`."""
    flat = []
    for name, value in config.items():
        flat += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return flat


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _clock(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):  # of a damaged log
        return ""


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #23272b; --faint: #6a7178; --line: #e2e5e8; --panel: #f6f7f8;
  --good: #1a7f4b; --mixed: #b26a00; --bad: #b3261e; --open: #6a7178; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181a; --ink: #dfe3e6; --faint: #98a0a7; --line: #2c3135;
  --panel: #1d2023; --good: #57c78b; --mixed: #e9a84a; --bad: #ff7b6b; --open: #98a0a7; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1120px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
header p { margin: 0; color: var(--faint); }
h1 { margin: 0; font-size: 1.7rem; font-weight: 600; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.1rem; font-weight: 600; }
h3 { margin: 1.25rem 0 .4rem; font-size: .9rem; font-weight: 600; }
.kicker { font-size: .8rem; letter-spacing: .04em; }
.missing, .note, small, figcaption { color: var(--faint); font-size: .85rem; }
.verdict { margin-top: 1.25rem; padding: .9rem 1.1rem; border-left: 4px solid var(--tone); background: var(--panel); }
.verdict h2 { margin: 0 0 .25rem; font-size: 1.25rem; color: var(--tone); }
.verdict p { margin: .15rem 0; overflow-wrap: anywhere; }
.good { --tone: var(--good); } .mixed { --tone: var(--mixed); } .bad { --tone: var(--bad); }
.open { --tone: var(--open); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(155px, 1fr)); gap: .75rem; }
.tile { padding: .6rem .8rem; border: 1px solid var(--line); border-radius: 4px; }
.tile span, .tile b, .tile small { display: block; }
.tile span { color: var(--faint); font-size: .8rem; }
.tile b { font-size: 1.35rem; font-weight: 600; }
figure { margin: 0; }
img { max-width: 100%; height: auto; display: block; }
article > figure img { border: 1px solid var(--line); }
.strip { display: flex; gap: .6rem; overflow-x: auto; padding: .6rem 0; }
.strip figure { flex: none; }
.strip img { height: 150px; width: auto; max-width: none; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 1rem 1.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: .28rem .9rem .28rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
th { font-weight: 500; color: var(--faint); white-space: nowrap; }
.scores { min-width: 560px; }
.scores th { color: inherit; }
.ours > * { font-weight: 700; }
.oracle > * { color: var(--faint) !important; }
.bar { width: 200px; vertical-align: middle; }
.bar i { display: block; height: 8px; background: var(--faint); opacity: .55; }
.ours .bar i { background: var(--accent); opacity: 1; }
.events td:first-child, .events td:nth-child(3) { white-space: nowrap; }
@media (max-width: 420px) { .curves { grid-template-columns: 1fr; } }
"""
