"""The table of an experiment: as data for JSON, as Markdown, and as text for a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from factorkit.reproduce.experiment import Citation, Column, Experiment, Setup
from factorkit.utils.errors import format_count


def make_table(
    experiment: Experiment,
    setup: Setup,
    rows: Mapping[str, Sequence[int]],
    records: Mapping[tuple[str, int], Mapping[str, Any]],
    missing: Mapping[tuple[str, int], str],
) -> dict[str, Any]:
    """Collect every cell, mean and spread of each row, the citations, and the reasons of missing cells.

    The spread is the standard deviation over the seeds (n-1), None for a single one.

    Args:
        records: of the finished cells, by row and seed.
        missing: reasons, by row and seed.
    """
    table = []
    for name, seeds in rows.items():
        cells = [records[name, seed] for seed in seeds if (name, seed) in records]
        absent = [seed for seed in seeds if (name, seed) not in records]
        row: dict[str, Any] = {"row": name, "cells": cells, "mean": {}, "spread": {}}
        row["not_run"] = {str(seed): missing.get((name, seed), "not run yet") for seed in absent}
        for column in experiment.columns:
            values = [c["scores"][column.key] for c in cells if c["scores"].get(column.key) is not None]
            if values:
                row["mean"][column.key] = statistics.fmean(values)
                row["spread"][column.key] = statistics.stdev(values) if len(values) > 1 else None
        table.append(row)
    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "scale": setup.scale,
        "data": "procedural" if setup.data is None else setup.data.expanduser().resolve().name,
        "settings": {**setup.options, **setup.changes},
        "rows": table,
        "citations": [{"row": c.row, "source": c.source, "values": dict(c.values)} for c in experiment.citations],
        "notes": list(experiment.notes),
    }


def format_markdown(experiment: Experiment, data: dict[str, Any]) -> str:
    """Format the page table.md."""
    head, lines = _format_rows(experiment, data, "±")
    page = [f"# {experiment.name}: {experiment.title}", "", f"Scale {data['scale']}, data {data['data']}."]
    if experiment.columns:
        page += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        page += ["| " + " | ".join(line) + " |" for line in lines]
        page += ["", "Mean ± standard deviation over the seeds. *Cited* rows are published numbers, not measured here."]
    page += [f"- {note}" for note in ["", *data["notes"]] if note]
    page += _format_missing(data) + _format_alarms(data)
    page += [line for image in data["images"] for line in ("", f"![{image}]({image})")]
    return "\n".join(page) + "\n"


def format_text(experiment: Experiment, data: dict[str, Any]) -> str:
    """Format the table in columns for a terminal."""
    head, lines = _format_rows(experiment, data, "+-")
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    text = [f"{experiment.name}: {experiment.title} ({data['scale']}, {data['data']})", ""]
    for line in [head, *lines] if experiment.columns else []:
        numbers = (number.rjust(width) for number, width in zip(line[1:], widths[1:], strict=True))
        text.append("  ".join([line[0].ljust(widths[0]), *numbers]).rstrip())
    return "\n".join(
        text + _format_missing(data) + _format_alarms(data) + [f"image  {image}" for image in data["images"]]
    )


def format_citation(experiment: Experiment, citation: Citation) -> str:
    """Format published numbers in one line."""
    columns = [column for column in experiment.columns if column.key in citation.values]
    numbers = ", ".join(f"{column.title} {_format_value(column, citation.values, {}, '')}" for column in columns)
    return f"{citation.row}: {numbers} ({citation.source})"


def _format_rows(experiment: Experiment, data: dict[str, Any], plus_minus: str) -> tuple[list[str], list[list[str]]]:
    """Return the titles of the columns, and the texts of every measured and cited row."""
    columns = experiment.columns
    lines = []
    for row in data["rows"]:
        count = len(row["cells"]) + len(row["not_run"])
        seeds = str(count) if not row["not_run"] else f"{len(row['cells'])} of {count}"
        numbers = [_format_value(column, row["mean"], row["spread"], plus_minus) for column in columns]
        lines.append([row["row"], seeds, *(numbers if row["cells"] else ["not run"] * len(columns))])
    for cited in data["citations"]:
        numbers = [_format_value(column, cited["values"], {}, plus_minus) for column in columns]
        lines.append([f"{cited['row']} (cited: {cited['source']})", "", *numbers])
    return ["", "seeds", *(column.title for column in columns)], lines


def _format_value(
    column: Column, means: Mapping[str, float], spreads: Mapping[str, float | None], plus_minus: str
) -> str:
    mean, spread = means.get(column.key), spreads.get(column.key)
    if mean is None:
        return "-"
    text = f"{mean * column.factor:.{column.digits}f}"
    return text if spread is None else f"{text} {plus_minus} {spread * column.factor:.{column.digits}f}"


def _format_missing(data: dict[str, Any]) -> list[str]:
    """Return a line for every row and reason of missing cells."""
    lines = []
    for row in data["rows"]:
        for reason in dict.fromkeys(row["not_run"].values()):
            seeds = ", ".join(seed for seed, why in row["not_run"].items() if why == reason)
            lines.append(f"- not run: {row['row']}, seed {seeds}: {reason}")
    return ["", *lines] if lines else []


def _format_alarms(data: dict[str, Any]) -> list[str]:
    """Return a line for every training whose checks without labels failed, or could not tell."""
    alarms = {
        name: texts for row in data["rows"] for cell in row["cells"] for name, texts in cell.get("alarms", {}).items()
    }
    lines = [f"- without labels, {name}: {'; '.join(texts)}" for name, texts in alarms.items() if texts]
    if len(lines) < len(alarms):
        lines.append(
            f"- without labels: no alarm in {len(alarms) - len(lines)} of {format_count(len(alarms), 'training')}"
        )
    return ["", *lines] if lines else []
