"""An experiment's cells as a table: JSON, Markdown, and plain text for a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from factorkit.reproduce.experiment import Citation, Column, Experiment

if TYPE_CHECKING:
    from factorkit.reproduce.runner import Cells
    from factorkit.reproduce.setup import Setup


def as_json(experiment: Experiment, setup: Setup, cells: Cells) -> dict[str, Any]:
    """Every cell, mean and spread of each row, the citations, and what was not run and why.

    The spread is the standard deviation over the seeds (n-1), None for a single one.
    """
    rows = []
    for name, seeds in cells.rows:
        done = [cells.found[name, seed] for seed in seeds if (name, seed) in cells.found]
        reasons = {
            str(seed): cells.missing.get((name, seed), "not run yet")
            for seed in seeds
            if (name, seed) not in cells.found
        }
        row: dict[str, Any] = {"row": name, "cells": done, "not_run": reasons, "mean": {}, "spread": {}}
        for column in experiment.columns:
            values = [c["scores"][column.key] for c in done if c["scores"].get(column.key) is not None]
            if values:
                row["mean"][column.key] = statistics.fmean(values)
                row["spread"][column.key] = statistics.stdev(values) if len(values) > 1 else None
        rows.append(row)
    cited = [{"row": c.row, "source": c.source, "values": dict(c.values)} for c in experiment.citations]
    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "scale": setup.scale,
        "data": setup.data_name,
        "settings": {**setup.options, **setup.changes},
        "rows": rows,
        "citations": cited,
        "notes": list(experiment.notes),
    }


def as_markdown(experiment: Experiment, data: dict[str, Any]) -> str:
    """The page table.md."""
    head, lines = _lines(experiment, data, "±")
    page = [f"# {experiment.name}: {experiment.title}", "", f"Scale {data['scale']}, data {data['data']}."]
    if experiment.columns:
        page += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        page += ["| " + " | ".join(line) + " |" for line in lines]
        page += ["", "Mean ± standard deviation over the seeds. *Cited* rows are published numbers, not measured here."]
    page += [f"- {note}" for note in ["", *data["notes"]] if note]
    page += _unfinished(data)
    page += [line for picture in data["pictures"] for line in ("", f"![{picture}]({picture})")]
    return "\n".join(page) + "\n"


def as_text(experiment: Experiment, data: dict[str, Any]) -> str:
    """The same for a terminal, in columns."""
    head, lines = _lines(experiment, data, "+-")
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    text = [f"{experiment.name}: {experiment.title} ({data['scale']}, {data['data']})", ""]
    for line in [head, *lines] if experiment.columns else []:
        rest = (word.rjust(width) for word, width in zip(line[1:], widths[1:], strict=True))
        text.append("  ".join([line[0].ljust(widths[0]), *rest]).rstrip())
    return "\n".join(text + _unfinished(data) + [f"picture  {picture}" for picture in data["pictures"]])


def _lines(experiment: Experiment, data: dict[str, Any], between: str) -> tuple[list[str], list[list[str]]]:
    """The heads of the columns and the words of every row, measured and cited."""
    head = ["", "seeds", *(column.title for column in experiment.columns)]
    lines = []
    for row in data["rows"]:
        asked = len(row["cells"]) + len(row["not_run"])
        seeds = str(asked) if not row["not_run"] else f"{len(row['cells'])} of {asked}"
        if not row["cells"]:
            lines.append([row["row"], seeds, *["not run" for _ in experiment.columns]])
            continue
        words = [_value(c, row["mean"].get(c.key), row["spread"].get(c.key), between) for c in experiment.columns]
        lines.append([row["row"], seeds, *words])
    for cited in data["citations"]:
        words = [_value(column, cited["values"].get(column.key), None, between) for column in experiment.columns]
        lines.append([f"{cited['row']} (cited: {cited['source']})", "", *words])
    return head, lines


def _value(column: Column, mean: float | None, spread: float | None, between: str) -> str:
    if mean is None:
        return "-"
    shown = f"{mean * column.factor:.{column.digits}f}"
    return shown if spread is None else f"{shown} {between} {spread * column.factor:.{column.digits}f}"


def _unfinished(data: dict[str, Any]) -> Sequence[str]:
    """A line for every row with cells that are not there, by reason."""
    lines = []
    for row in data["rows"]:
        for reason in dict.fromkeys(row["not_run"].values()):
            seeds = ", ".join(seed for seed, why in row["not_run"].items() if why == reason)
            lines.append(f"- not run: {row['row']}, seed {seeds}: {reason}")
    return ["", *lines] if lines else []


def format_citation(experiment: Experiment, citation: Citation) -> str:
    """A published row in one line."""
    known = [column for column in experiment.columns if column.key in citation.values]
    words = ", ".join(f"{column.title} {_value(column, citation.values[column.key], None, '')}" for column in known)
    return f"{citation.row}: {words} ({citation.source})"
