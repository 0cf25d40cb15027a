"""The parts of an experiment: columns, rows, the result of a cell, published numbers, and the table of all of them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from factorkit.utils.errors import FactorkitError, format_count
from factorkit.utils.files import save_image

SCALES = ("small", "gpu", "full")
#: Duration by scale of an experiment that shares the training of table 2.1.
SHARED_TRAINING_DURATION = {
    "small": "5 minutes a seed for the default on one CPU core, 3 for each other form; none after table2.1",
    "gpu": "not measured",
    "full": "not measured",
}


class CellUnavailableError(FactorkitError):
    """A cell cannot be computed here. The message gives the reason and the remedy; the other cells are computed."""


@dataclass(frozen=True)
class Setup:
    """The arguments of one call of :func:`factorkit.reproduce.reproduce`.

    Attributes:
        name: of the experiment.
        data: what is trained on and scored; None for the procedural data of the package.
        scale: one of :data:`SCALES`.
        out: folder of all experiments; a training that two of them need is stored there once.
        device: where to train.
        progress: whether to report progress.
        options: how to read the data: ``ignore`` and ``holdout``, unless None.
        changes: settings of all trainings, which override those of the scale.
        fingerprint: of the data (:mod:`factorkit.reproduce.runner`) as JSON, a key for what is kept in memory.
        inputs: further data by name, such as ``video``.
        trainings: folders of the trainings that were used since this list was cleared.
    """

    name: str
    data: Path | None
    scale: str
    out: Path
    device: str = "auto"
    progress: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    inputs: Mapping[str, Path] = field(default_factory=dict)
    trainings: list[Path] = field(default_factory=list, compare=False)

    @property
    def folder(self) -> Path:
        """Folder of the cells, the table and the images of this experiment."""
        return self.out / self.name

    def run_folder(self, label: str, seed: int) -> Path:
        """Return the folder of the training that every experiment calls ``label``."""
        data = "procedural" if self.data is None else self.data.expanduser().resolve().name
        folder = self.out / "runs" / file_name(f"{self.scale}-{data}-{label}-seed{seed}")
        self.trainings.append(folder)
        return folder

    def save_image(self, image: Image.Image, name: str) -> str:
        """Write an image into the experiment's folder and return its path within it."""
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        save_image(image, self.folder / "images" / name)
        return f"images/{name}"


def file_name(text: str) -> str:
    """Turn a text into a file name."""
    return re.sub(r"[^\w.=+-]+", "_", text).strip("_")


@dataclass(frozen=True)
class Column:
    """One number of every row.

    Attributes:
        key: name among the scores of a cell.
        title: above the column.
        factor: by which the number is multiplied for printing; 100 for shares, as in the dissertation.
        digits: after the decimal point.
        lower: whether less is better.
    """

    key: str
    title: str
    factor: float = 1.0
    digits: int = 2
    lower: bool = False


def percent(key: str, title: str) -> Column:
    """Return a column of shares, printed in percent as in the dissertation."""
    return Column(key, title, 100.0, 1)


@dataclass(frozen=True)
class Citation:
    """Published numbers, not measured here.

    Attributes:
        row: what they belong to.
        source: where they were published.
        values: by the key of the column, in the units of this package (shares, not percents).
    """

    row: str
    source: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class CellResult:
    """The result of a cell: numbers for the table, arrays for image grids of several cells, paths of own images."""

    scores: Mapping[str, float] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    images: Sequence[str] = ()


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: as printed, and in file names.
        compute: the result for a seed; raises :class:`CellUnavailableError` if this machine cannot compute it.
        max_seeds: 1 if nothing is random; None for as many seeds as requested.
    """

    name: str
    compute: Callable[[int], CellResult]
    max_seeds: int | None = None


#: The arrays of each row's cell of seed 0, for the rows that have some.
RowArrays = Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table or figure of the dissertation.

    Attributes:
        name: on the command line, such as ``"table2.1"``.
        title: one line.
        data: what data it needs, and the alternatives.
        duration: for each of :data:`SCALES` in words; "not measured" if unknown.
        rows: makes the rows for a setup.
        columns: of the table.
        citations: published numbers.
        figures: other figures that this experiment draws.
        seeds: default number.
        notes: sentences that a reader of the table needs.
        inputs: names of further data that it uses, such as ``video``.
        draw: writes images of several cells, some of which may be missing, and returns their names.
    """

    name: str
    title: str
    data: str
    duration: Mapping[str, str]
    rows: Callable[[Setup], Sequence[Row]]
    columns: Sequence[Column] = ()
    citations: Sequence[Citation] = ()
    figures: Sequence[str] = ()
    seeds: int = 3
    notes: Sequence[str] = ()
    inputs: Sequence[str] = ()
    draw: Callable[[Setup, RowArrays], Sequence[str]] | None = None


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
