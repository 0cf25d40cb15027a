"""The parts of an experiment: the columns and rows of its table, the result of a cell, and published numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from factorkit.utils.errors import FactorkitError
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
        fingerprint: of the data (:mod:`factorkit.reproduce.fingerprint`) as JSON, a key for what is kept in memory.
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
